"""Making commits: operations on top of a branch or a pull request, all or nothing.

The content of every file is in the blob store (or in Xet storage) before a commit is made, so that
a commit is only names. A refused commit changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptd.hub.local import discussions, history, names, refusal
from ckptd.hub.local.accounts import Account
from ckptd.hub.local.names import RepoId
from ckptd.hub.local.store import Store
from ckptd.hub.local.values import Commit, File, Repo, git_oid, pointer
from ckptd.hub.local.xet import XetStore

_PARENT = re.compile(r"[0-9a-f]{5,40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Set a path to a file."""

    path: str
    file: File


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Remove a file, or a folder with all that lies in it."""

    path: str
    folder: bool


Operation = Put | Remove


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A commit to be made."""

    revision: str
    title: str
    message: str
    parent: str | None
    """What the head must be (a prefix of it), or where a new pull request starts."""
    operations: Sequence[Operation]
    author: Account


def regular_file(store: Store, content: bytes) -> File:
    """Keep the content of a file that came inside a commit."""
    sha256 = store.blobs.put(content)
    return File(oid=git_oid(content), sha256=sha256, size=len(content), lfs=False)


def lfs_file(store: Store, sha256: str, size: int | None, *, xet: XetStore | None) -> File:
    """Return the file for content that was uploaded before.

    Raises:
        refusal.Refused: 400, the content never arrived, or has another size.
    """
    in_xet = xet.find(sha256) if xet is not None else None
    found = in_xet.size if in_xet else store.blobs.size(sha256)
    if found is None:
        raise refusal.bad_request(
            f"LFS pointer pointed to a file that does not exist: sha256:{sha256}"
        )
    if size is not None and size != found:
        raise refusal.bad_request(f"LFS object sha256:{sha256} has {found} bytes, not {size}")
    return File(
        oid=git_oid(pointer(sha256, found)),
        sha256=sha256,
        size=found,
        lfs=True,
        xet_hash=in_xet.hash if in_xet else None,
    )


def commit(store: Store, repo_id: RepoId, draft: Draft) -> Commit:
    """Make one commit on a branch or on an open pull request's ref.

    Raises:
        refusal.Refused: 404 no such branch or file to delete, 403 a closed pull request,
            412 the head is not `draft.parent`, 400 operations that contradict each other.
    """

    def change(repo: Repo) -> tuple[Repo, Commit]:
        oid = history.head(repo, draft.revision)
        if oid is None:
            raise refusal.no_revision(draft.revision)
        if draft.parent is not None and not oid.startswith(_checked_parent(draft.parent)):
            raise refusal.stale()
        made = _write(store, repo_id, draft, base=store.commit(repo_id, oid))
        number = history.pull_number(draft.revision)
        if number is None:
            branch = draft.revision.removeprefix("refs/heads/")
            return replace(repo, branches={**repo.branches, branch: made.oid}), made
        return discussions.with_commit(repo, number, made), made

    return store.update(repo_id, change)


def commit_to_new_pull(store: Store, repo_id: RepoId, draft: Draft) -> tuple[Commit, int]:
    """Make an open pull request against a branch with one commit, from `draft.parent` or its head.

    Raises:
        refusal.Refused: 404 no such branch or parent, and as for `commit`.
    """

    def change(repo: Repo) -> tuple[Repo, tuple[Commit, int]]:
        oid = repo.branches.get(draft.revision.removeprefix("refs/heads/"))
        if oid is None:
            raise refusal.no_revision(draft.revision)
        start = _checked_parent(draft.parent) if draft.parent else oid
        base = history.resolve(store, repo_id, repo, start)
        made = _write(store, repo_id, draft, base=base)
        after, number = discussions.opened(
            repo,
            title=draft.title,
            text=draft.message,
            author=draft.author.name,
            base=draft.revision.removeprefix("refs/heads/"),
            head=base.oid,
            status="open",
        )
        return discussions.with_commit(after, number, made), (made, number)

    return store.update(repo_id, change)


def squash(store: Store, repo_id: RepoId, branch: str, *, title: str, author: str) -> Commit:
    """Replace the history of a branch by one commit with the same files."""

    def change(repo: Repo) -> tuple[Repo, Commit]:
        if branch not in repo.branches:
            raise refusal.no_revision(branch)
        files = store.commit(repo_id, repo.branches[branch]).files
        made = store.write_commit(repo_id, files, title=title, author=author)
        return replace(repo, branches={**repo.branches, branch: made.oid}), made

    return store.update(repo_id, change)


def _write(store: Store, repo_id: RepoId, draft: Draft, *, base: Commit) -> Commit:
    if not draft.title.strip():
        raise refusal.bad_request("The commit summary is empty")
    files = _apply(base.files, draft.operations, oid=base.oid)
    return store.write_commit(
        repo_id,
        files,
        parent=base.oid,
        title=draft.title,
        message=draft.message,
        author=draft.author.name,
    )


def _apply(
    before: Mapping[str, File], operations: Sequence[Operation], *, oid: str
) -> dict[str, File]:
    """Return the files after `operations`: deletions see the old files, additions win."""
    after = dict(before)
    for operation in operations:
        names.path(operation.path)
        if isinstance(operation, Remove):
            gone = [
                path
                for path in before
                if (path.startswith(f"{operation.path}/") and operation.folder)
                or path == operation.path
            ]
            if not gone:
                raise refusal.no_entry(
                    f"A file with this name doesn't exist: {operation.path}", commit=oid
                )
            for path in gone:
                after.pop(path, None)
    puts = {put.path: put.file for put in operations if isinstance(put, Put)}
    after |= puts
    for path in puts:
        parts = path.split("/")
        folders = ("/".join(parts[:depth]) for depth in range(1, len(parts)))
        if clash := next((folder for folder in folders if folder in after), None):
            raise refusal.bad_request(f"{clash} is a file, so {path} cannot lie in it")
    held = {
        "/".join(path.split("/")[:depth])
        for path in after
        for depth in range(1, path.count("/") + 1)
    }
    if clash := next((path for path in puts if path in held), None):
        raise refusal.bad_request(f"{clash} is a folder")
    return after


def _checked_parent(parent: str) -> str:
    if not _PARENT.fullmatch(parent):
        raise refusal.bad_request(f"Invalid parentCommit: {parent!r}")
    return parent
