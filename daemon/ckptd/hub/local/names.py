"""Which names a repo, a ref or a path in a repo may have. Pure; refuses with 400.

What passes here is safe as one component of a path on disk (repos), or is never one (files).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptd.hub.local import refusal
from ckptd.hub.local.values import KINDS, Kind

LONGEST_PATH_CHARS = 4096

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REF = re.compile(r"[^\x00-\x20\x7f~^:?*\[\\]{1,200}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_RESERVED = frozenset({"api", "cas", "lfs", "datasets", "spaces", "models", "favicon.ico"})


@dataclass(frozen=True, slots=True, order=True)
class RepoId:
    """Names a repo: its kind, namespace and name."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def repo_id(kind: str, namespace: str, name: str) -> RepoId:
    """Return the checked id of a repo. Raises Refused (400)."""
    known = next((known for known in KINDS if known in (kind, kind + "s")), None)
    if known is None:
        raise refusal.bad_request(f"Invalid repo type: {kind!r}")
    for part in (namespace, name):
        if not _PART.fullmatch(part) or ".." in part or "--" in part or part.endswith(".git"):
            raise refusal.bad_request(f"Invalid repo name: {namespace!r}/{name!r}")
    if namespace in _RESERVED:
        raise refusal.bad_request(f"Reserved namespace: {namespace!r}")
    return RepoId(known, namespace, name)


def ref(name: str) -> str:
    """Return a checked branch or tag name (the rules of git check-ref-format). Raises Refused."""
    parts = name.split("/")
    if (
        not _REF.fullmatch(name)
        or name.startswith(("refs/", "-"))
        or name.endswith(".")
        or ".." in name
        or "@{" in name
        or name in ("@", "HEAD")
        or any(not part or part.startswith(".") or part.endswith(".lock") for part in parts)
    ):
        raise refusal.bad_request(f"Invalid ref name: {name!r}")
    return name


def path(name: str) -> str:
    """Return a checked path of a file in a repo. Raises Refused (400)."""
    parts = name.split("/")
    if (
        not name
        or len(name) > LONGEST_PATH_CHARS
        or _CONTROL.search(name)
        or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
        or any(len(part.encode()) > 255 for part in parts)
    ):
        raise refusal.bad_request(f"Invalid path: {name!r}")
    return name
