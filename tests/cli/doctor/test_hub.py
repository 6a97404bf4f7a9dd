"""The doctor's checks of token and Hub."""

from __future__ import annotations

from typing import Any

import pytest

from ckptd.cli.doctor import hub
from ckptd.cli.doctor.finding import Grade
from ckptd.cli.doctor.hub import Reached, TokenFound
from ckptd.hub import reach


def _reached(**changes: Any) -> Reached:
    given: dict[str, Any] = {
        "endpoint": "https://hub",
        "skew_s": 0.4,
        "account": "ada",
        "role": "write",
        "namespaces": frozenset({"ada", "acme"}),
    }
    return Reached(**(given | changes))


@pytest.mark.parametrize(
    ("found", "pushes", "grade"),
    [
        (TokenFound(origin="HF_TOKEN"), True, Grade.OK),
        (TokenFound(), True, Grade.FAILED),
        (TokenFound(), False, Grade.SKIPPED),
        (TokenFound(error="is open to others", hint="chmod"), False, Grade.FAILED),
    ],
)
def test_token(found: TokenFound, pushes: bool, grade: Grade) -> None:
    """A token is needed where something is pushed, and must be private."""
    assert hub.token(found, pushes=pushes).grade is grade


def test_reached() -> None:
    """A Hub that does not answer fails what is pushed, and only that."""
    away = _reached(error="no answer")
    assert hub.reached(away, pushes=True).grade is Grade.FAILED
    assert hub.reached(away, pushes=False).grade is Grade.WARNING
    assert hub.reached(_reached(), pushes=True).grade is Grade.OK


@pytest.mark.parametrize(
    ("changes", "targets", "grade", "text"),
    [
        ({}, {"acme"}, Grade.OK, "ada, write"),
        ({}, {"other"}, Grade.WARNING, "no member of other"),
        ({"role": "read"}, {"ada"}, Grade.FAILED, "only read"),
        ({"role": "read"}, set(), Grade.OK, "ada, read"),
        ({"writable": frozenset({"ada"})}, {"ada"}, Grade.OK, "ada"),
        ({"writable": frozenset({"ada"})}, {"acme"}, Grade.FAILED, "no write access to acme/"),
        ({"account": None}, {"ada"}, Grade.SKIPPED, "whose token"),
    ],
)
def test_account(changes: dict[str, Any], targets: set[str], grade: Grade, text: str) -> None:
    """The token may write where definitions push."""
    (found,) = hub.account(_reached(**changes), targets=targets)
    assert found.grade is grade
    assert text in found.what


@pytest.mark.parametrize(
    ("skew", "grade", "text"),
    [
        (None, Grade.SKIPPED, "what time"),
        (59.0, Grade.OK, "59 s"),
        (-61.0, Grade.WARNING, "61 s ahead"),
        (301.0, Grade.FAILED, "301 s behind"),
    ],
)
def test_clock(skew: float | None, grade: Grade, text: str) -> None:
    """A clock that is off by minutes makes signed URLs fail."""
    found = hub.clock(_reached(skew_s=skew))
    assert found.grade is grade
    assert text in found.what


def test_fine_grained_token() -> None:
    """Where such a token may write is read from its scopes, single repos as their namespace."""
    scoped = [
        {"entity": {"type": "org", "name": "acme"}, "permissions": ["repo.content.read"]},
        {"entity": {"type": "user", "name": "ada"}, "permissions": ["repo.write"]},
        {"entity": {"type": "model", "name": "lab/m"}, "permissions": ["repo.write"]},
    ]
    token = {"role": "fineGrained", "fineGrained": {"scoped": scoped}}
    found = reach.identity(
        {"name": "ada", "orgs": [{"name": "acme"}], "auth": {"accessToken": token}}
    )
    assert found.namespaces == {"ada", "acme"}
    assert found.writable == {"ada", "lab"}
