"""`staging`: where it may be said, and what counts where it is not."""

from __future__ import annotations

import pytest

from ckptd import errors
from ckptd.pipeline import staged
from ckptd.pipeline.definition import parse_definition, pipeline_digest

PUSH = "push:\n  repo_id: a/b\n"
VERIFY = "stages: [tie, verify]\n"
TIE = "stages: [tie]\n"


def _text(*parts: str) -> str:
    return "pipeline: p\n" + "".join(parts)


@pytest.mark.parametrize(
    ("parts", "why"),
    [((TIE,), "nothing is pushed"), ((VERIFY, PUSH), "the stage verify loads the written files")],
)
def test_none_is_refused_where_files_are_needed(parts: tuple[str, ...], why: str) -> None:
    """Without a push, and with verify: at its own line, with the reason."""
    text = _text(*parts, "staging: none\n")
    with pytest.raises(errors.DefinitionError) as caught:
        parse_definition(text, "p.yaml")
    (problem,) = caught.value.problems
    assert why in problem.what
    assert problem.line == text.splitlines().index("staging: none") + 1


def test_an_unknown_kind_is_refused() -> None:
    """Only the two."""
    with pytest.raises(errors.DefinitionError, match="staging"):
        parse_definition(_text(TIE, PUSH, "staging: memory\n"), "p.yaml")


@pytest.mark.parametrize(
    ("parts", "default", "kind"),
    [
        ((TIE, PUSH), "disk", "disk"),
        ((TIE, PUSH), "none", "none"),
        ((TIE, PUSH, "staging: disk\n"), "none", "disk"),
        ((TIE, PUSH, "staging: none\n"), "disk", "none"),
        ((TIE,), "none", "disk"),
        ((VERIFY, PUSH), "none", "disk"),
    ],
)
def test_the_setting_counts_where_nothing_is_said(
    parts: tuple[str, ...], default: staged.StagingKind, kind: str
) -> None:
    """The definition has the last word; what needs files has them, whatever the setting says."""
    assert staged.kind(parse_definition(_text(*parts), "p.yaml"), default) == kind


def test_it_does_not_change_what_is_published() -> None:
    """The same bytes come of both, so that the job's identity is the same."""
    digests = {
        pipeline_digest(parse_definition(_text(TIE, PUSH, f"staging: {kind}\n"), "p.yaml"))
        for kind in ("disk", "none")
    }
    assert len(digests) == 1
