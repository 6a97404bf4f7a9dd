"""`--set stage.option=value`."""

from __future__ import annotations

from typing import Any

import pytest

from ckptd import errors
from ckptd.pipeline import definition, overrides

TEXT = "pipeline: p\nstages: [tie, resize: {to: 5}]"


def test_set_options_win(stages: dict[str, Any]) -> None:
    """An option set on the command line replaces that of the file, the last one wins."""
    base = definition.parse_definition(TEXT, "p.yaml", stages=stages)
    found = overrides.apply(base, ["resize.to=7", "tie.force=true", "resize.to=9"], stages=stages)
    assert found.dump()["stages"] == [
        {"tie": {"force": True}},
        {"resize": {"to": 9, "pad_to_multiple_of": None}},
    ]


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("resize", "write stage.option=value"),
        ("resize=1", "write stage.option=value"),
        ("resise.to=1", "unknown stage 'resise'; did you mean 'resize'?"),
        ("reshard.max_shard_size=1GB", "unknown stage 'reshard'"),
        ("resize.two=1", "unknown option 'two'; did you mean 'to'?"),
        ("resize.to=0", "must be greater than 0, found 0"),
        ("resize.to=[", "the value cannot be read"),
        ("resize.to=" + "[" * 500, "the value cannot be read"),
        ("resize.to=2024-02-31", "the value cannot be read"),
        ("resize.to=!!int x", "the value cannot be read"),
    ],
)
def test_wrong_settings(setting: str, what: str, stages: dict[str, Any]) -> None:
    """A wrong --set says which one it is and what is wrong with it."""
    base = definition.parse_definition(TEXT, "p.yaml", stages=stages)
    with pytest.raises(errors.UsageError) as caught:
        overrides.apply(base, [setting], stages=stages)
    assert setting in str(caught.value)
    assert what in str(caught.value)


def test_a_pattern_without_quotes(stages: dict[str, Any]) -> None:
    """An asterisk means something in YAML: the error says how a pattern is written."""
    base = definition.parse_definition(TEXT, "p.yaml", stages=stages)
    with pytest.raises(errors.UsageError) as caught:
        overrides.apply(base, ["resize.to=*norm*"], stages=stages)
    assert """--set 'resize.to=["*norm*"]'""" in str(caught.value.hint)
