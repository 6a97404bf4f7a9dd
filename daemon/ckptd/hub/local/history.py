"""Reading a repo's past: what a revision means, what a folder holds, who touched a file last."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptd.hub.local import refusal
from ckptd.hub.local.names import RepoId
from ckptd.hub.local.store import Store, ancestors
from ckptd.hub.local.values import MAIN, Commit, File, Repo

_OID = re.compile(r"[0-9a-f]{40}")
_SHORT_OID = re.compile(r"[0-9a-f]{7,39}")
_PULL = re.compile(r"refs/pr/([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder of a commit; `oid` changes with anything below it."""

    path: str
    oid: str


def pull_number(revision: str) -> int | None:
    """Return N of `refs/pr/N`, or None for any other revision."""
    match = _PULL.fullmatch(revision)
    return int(match[1]) if match else None


def head(repo: Repo, revision: str) -> str | None:
    """Return the commit that a branch or a pull request's ref points to; None for no such ref."""
    number = pull_number(revision)
    if number is not None:
        return repo.pulls.get(number)
    return repo.branches.get(revision.removeprefix("refs/heads/"))


def resolve(store: Store, repo_id: RepoId, repo: Repo, revision: str) -> Commit:
    """Return the commit that a branch, tag, ref or (short) oid names. Raises Refused (404)."""
    oid = head(repo, MAIN if revision == "HEAD" else revision)
    if oid is None:
        tag = repo.tags.get(revision.removeprefix("refs/tags/"))
        oid = tag.commit if tag else None
    if oid is None and _OID.fullmatch(revision):
        oid = revision
    if oid is None and _SHORT_OID.fullmatch(revision):
        found = store.oids(repo_id, revision)
        oid = found[0] if len(found) == 1 else None
    if oid is None:
        raise refusal.no_revision(revision)
    return store.commit(repo_id, oid)


def tree(commit: Commit, folder: str, *, recursive: bool) -> list[tuple[str, File | Folder]]:
    """Return what lies in `folder` ("" is the top) by path, sorted.

    Raises:
        refusal.Refused: 404, the commit has no such folder.
    """
    prefix = f"{folder}/" if folder else ""
    below = [(path, file) for path, file in commit.files.items() if path.startswith(prefix)]
    if folder and not below:
        raise refusal.no_entry(f"{folder} does not exist on this revision", commit=commit.oid)
    entries: dict[str, File | Folder] = {}
    inside: dict[str, list[tuple[str, File]]] = {}
    for path, file in below:
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            inside.setdefault(prefix + "/".join(parts[:depth]), []).append((path, file))
        if recursive or len(parts) == 1:
            entries[path] = file
    entries |= {path: Folder(path=path, oid=_oid(files)) for path, files in inside.items()}
    return sorted(entries.items())


def entry(commit: Commit, path: str) -> File | Folder | None:
    """Return the file or folder of that name, or None."""
    if path in commit.files:
        return commit.files[path]
    below = [(name, file) for name, file in commit.files.items() if name.startswith(f"{path}/")]
    return Folder(path=path, oid=_oid(below)) if below else None


def last_changes(
    store: Store, repo_id: RepoId, commit: Commit, paths: Iterable[str]
) -> dict[str, Commit]:
    """Return for each file or folder the newest commit that changed it."""
    missing = {path: entry(commit, path) for path in paths}
    found: dict[str, Commit] = {}
    newer = commit
    for older in ancestors(store, repo_id, commit.parent):
        for path in [path for path, held in missing.items() if entry(older, path) != held]:
            found[path] = newer
            del missing[path]
        if not missing:
            return found
        newer = older
    return found | dict.fromkeys(missing, newer)


def changes(
    before: Mapping[str, File], after: Mapping[str, File]
) -> dict[str, tuple[File | None, File | None]]:
    """Return path -> (file before, file after) of everything that differs, sorted."""
    return {
        path: (before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def fork_point(store: Store, repo_id: RepoId, one: str, other: str) -> Commit | None:
    """Return the newest commit that both histories share."""
    known = {commit.oid for commit in ancestors(store, repo_id, one)}
    shared = (commit for commit in ancestors(store, repo_id, other) if commit.oid in known)
    return next(shared, None)


def _oid(files: Iterable[tuple[str, File]]) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path, file in files:
        digest.update(f"{path}\0{file.oid}\n".encode())
    return digest.hexdigest()
