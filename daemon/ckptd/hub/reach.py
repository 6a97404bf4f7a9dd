"""Whether a Hub answers, what time it has, and what it says of a token: one request. Blocks."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from ckptd import __version__
from ckptd.hub import session, translate

_WRITE = frozenset({"repo.write", "repo.content.write"})
_UNAUTHORIZED = 401


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose token it is and where it may write."""

    name: str
    role: str
    """`read`, `write`, `fineGrained`, or empty where unknown."""
    namespaces: frozenset[str]
    """The account and its organisations."""
    writable: frozenset[str] | None
    """Of a fine-grained token: where it may write; None for the other kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    seconds: float
    hub_time: float | None
    """The Hub's clock in seconds since the epoch, to the second."""
    identity: Identity | None
    """None where no token was shown."""


def look(endpoint: str, token: str | None) -> Answer:
    """Ask the Hub at `endpoint` who it thinks we are.

    Raises:
        errors.HubError: it cannot be reached, fails, or refuses the token.
    """
    session.configure()
    headers = build_hf_headers(
        token=token or False, library_name="ckptd", library_version=__version__
    )
    began = time.monotonic()
    with translate.translated("asking whose token it is"):
        response = get_session().get(f"{endpoint}/api/whoami-v2", headers=headers)
        seconds = time.monotonic() - began
        anonymous = token is None and response.status_code == _UNAUTHORIZED
        if not anonymous:
            hf_raise_for_status(response)
    return Answer(
        seconds=seconds,
        hub_time=_time(response.headers.get("Date")),
        identity=None if anonymous else identity(response.json()),
    )


def identity(answer: Mapping[str, Any]) -> Identity:
    """Return what a whoami answer says."""
    name = str(answer.get("name", ""))
    orgs = {str(org.get("name", "")) for org in answer.get("orgs") or ()}
    token = (answer.get("auth") or {}).get("accessToken") or {}
    role = str(token.get("role") or "")
    return Identity(
        name=name,
        role=role,
        namespaces=frozenset({name, *orgs} - {""}),
        writable=_writable(token.get("fineGrained") or {}) if role == "fineGrained" else None,
    )


def _writable(scopes: Mapping[str, Any]) -> frozenset[str]:
    """Return the namespaces in which some repo may be written; single repos count for theirs."""
    found = set()
    for scope in scopes.get("scoped") or ():
        if _WRITE & set(scope.get("permissions") or ()):
            entity = str((scope.get("entity") or {}).get("name", ""))
            found.add(entity.partition("/")[0])
    return frozenset(found - {""})


def _time(text: str | None) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    except ValueError:
        return None
