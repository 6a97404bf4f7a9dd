"""The repos on disk: who exists, what each ref points to, the snapshots. Knows no HTTP.

    ROOT/lock                              held by the one Hub that serves this folder
    ROOT/blobs, ROOT/incoming              content, see `blobs`
    ROOT/repos/KIND/NAMESPACE/NAME/repo.json         the `Repo` value, replaced in one step
    ROOT/repos/KIND/NAMESPACE/NAME/commits/OID.json  one `Commit`, written before a ref names it

One write of `repo.json` is the transaction: a kill leaves the state before or after it. Readers
get immutable values without waiting; writers of one repo take turns. Synchronous, thread-safe.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from ckptd import errors
from ckptd.hub.local import refusal, rules
from ckptd.hub.local.blobs import Blobs, sync_folder, write_durably
from ckptd.hub.local.names import RepoId
from ckptd.hub.local.values import KINDS, MAIN, Commit, File, Repo, git_oid

CACHED_COMMITS = 256

_REPO = TypeAdapter(Repo)
_COMMIT = TypeAdapter(Commit)
T = TypeVar("T")


class Store:
    """All repos of one folder.

    Args:
        root: made where absent.

    Raises:
        errors.StorageFailed: the folder cannot be made or read, or another Hub serves it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._repos: dict[RepoId, Repo] = {}
        self._locks: dict[RepoId, threading.RLock] = {}
        self._names = threading.RLock()
        """Held to add, remove or move a repo."""
        self._commits: OrderedDict[tuple[RepoId, str], Commit] = OrderedDict()
        self._parents: dict[RepoId, dict[str, str | None]] = {}
        """Of commits that were read: a history is told without reading each of them again."""
        self._lock = -1
        try:
            _make_root(self.root)
            self._lock = _lock(self.root / "lock")
            self.blobs = Blobs(self.root)
            self._load()
        except OSError as exc:
            self.close()
            why = f"the Hub's folder cannot be used: {exc.strerror}"
            raise errors.StorageFailed(why, path=self.root) from exc
        except errors.StorageFailed:
            self.close()
            raise

    def close(self) -> None:
        """Let another Hub serve the folder. Calling it twice is safe."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def ids(self) -> list[RepoId]:
        """Return every repo, sorted."""
        return sorted(self._repos)

    def find(self, repo_id: RepoId) -> Repo | None:
        """Return the repo as it is now, or None."""
        return self._repos.get(repo_id)

    def create(self, repo_id: RepoId, *, private: bool) -> Repo:
        """Make a repo whose first commit holds the default .gitattributes.

        Raises:
            refusal.Refused: 409, it exists.
        """
        with self._names:
            if repo_id in self._repos:
                raise refusal.taken(f"You already created this repo: {repo_id}")
            content = rules.DEFAULT_GITATTRIBUTES.encode()
            file = File(
                oid=git_oid(content), sha256=self.blobs.put(content), size=len(content), lfs=False
            )
            folder = self._folder(repo_id)
            (folder / "commits").mkdir(parents=True)
            files = {".gitattributes": file}
            first = self.write_commit(repo_id, files, title="initial commit", author="system")
            repo = Repo(
                kind=repo_id.kind,
                namespace=repo_id.namespace,
                name=repo_id.name,
                private=private,
                date=now(),
                branches={MAIN: first.oid},
            )
            for parent in (folder.parent.parent, folder.parent):
                sync_folder(parent)
            self._write(repo_id, repo)
            return repo

    def delete(self, repo_id: RepoId) -> None:
        """Remove a repo; its blobs stay, others may share them. Raises Refused when absent."""
        with self._names, self._turn(repo_id):
            if repo_id not in self._repos:
                raise refusal.no_repo(anonymous=False)
            folder = self._folder(repo_id)
            grave = self.root / "incoming-deleted"
            grave.mkdir(exist_ok=True)
            gone = grave / secrets.token_hex(8)
            folder.rename(gone)
            sync_folder(folder.parent)
            del self._repos[repo_id]
            self._forget(repo_id)
        shutil.rmtree(gone, ignore_errors=True)

    def move(self, source: RepoId, target: RepoId) -> None:
        """Rename a repo. Raises Refused: no such repo, or the new name is taken."""
        with self._names, self._turn(source):
            repo = self._repos.get(source)
            if repo is None:
                raise refusal.no_repo(anonymous=False)
            if target in self._repos:
                raise refusal.taken("A repository with that name already exists")
            folder = self._folder(target)
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder(source).rename(folder)
            for parent in (folder.parent, self._folder(source).parent):
                sync_folder(parent)
            del self._repos[source]
            self._repos[target] = _renamed(repo, target)
            self._forget(source)

    def update(self, repo_id: RepoId, change: Callable[[Repo], tuple[Repo, T]]) -> T:
        """Replace a repo by what `change` makes of it, durably, and return its second value.

        `change` runs alone for this repo, and may write commits; when it raises, nothing changed.

        Raises:
            refusal.Refused: 404 when the repo is gone, or whatever `change` refuses with.
        """
        with self._turn(repo_id):
            repo = self._repos.get(repo_id)
            if repo is None:
                raise refusal.no_repo(anonymous=False)
            after, answer = change(repo)
            if after is not repo:
                self._write(repo_id, after)
            return answer

    def write_commit(
        self,
        repo_id: RepoId,
        files: Mapping[str, File],
        *,
        parent: str | None = None,
        title: str,
        message: str = "",
        author: str,
    ) -> Commit:
        """Write a snapshot, durably. Nothing points to it until a ref does."""
        fields = {"parent": parent, "title": title, "message": message, "author": author}
        salt = json.dumps([fields, sorted((p, f.oid) for p, f in files.items())]).encode()
        oid = hashlib.sha1(salt + secrets.token_bytes(16), usedforsecurity=False).hexdigest()
        commit = Commit(
            oid=oid,
            parent=parent,
            title=title,
            message=message,
            author=author,
            date=now(),
            files=dict(sorted(files.items())),
        )
        path = self._folder(repo_id) / "commits" / f"{oid}.json"
        write_durably(path, _COMMIT.dump_json(commit))
        return commit

    def commit(self, repo_id: RepoId, oid: str) -> Commit:
        """Return a snapshot. Raises Refused (404) when there is no such commit."""
        key = (repo_id, oid)
        cached = self._commits.get(key)
        if cached is not None:
            with contextlib.suppress(KeyError):  # another thread may just have dropped it
                self._commits.move_to_end(key)
            return cached
        try:
            text = (self._folder(repo_id) / "commits" / f"{oid}.json").read_bytes()
        except FileNotFoundError:
            raise refusal.no_revision(oid) from None
        self._commits[key] = commit = _COMMIT.validate_json(text)
        self._parents.setdefault(repo_id, {})[oid] = commit.parent
        while len(self._commits) > CACHED_COMMITS:
            self._commits.popitem(last=False)
        return commit

    def past(self, repo_id: RepoId, oid: str) -> list[str]:
        """Return the oids of a commit and of what came before it, newest first."""
        known = self._parents.setdefault(repo_id, {})
        found: list[str] = []
        older: str | None = oid
        while older is not None:
            found.append(older)
            older = known[older] if older in known else self.commit(repo_id, older).parent
        return found

    def oids(self, repo_id: RepoId, prefix: str) -> list[str]:
        """Return the commits whose oid begins with the hexadecimal `prefix`."""
        return [path.stem for path in (self._folder(repo_id) / "commits").glob(f"{prefix}*.json")]

    def _load(self) -> None:
        for kind in KINDS:
            for folder in (self.root / "repos" / kind).glob("*/*"):
                repo_id = RepoId(kind, folder.parent.name, folder.name)
                try:
                    repo = _REPO.validate_json((folder / "repo.json").read_bytes())
                except FileNotFoundError:
                    shutil.rmtree(folder)  # killed while it was being made
                except ValidationError as exc:
                    why = f"not the state of a repo: {exc.error_count()} fields are wrong"
                    raise errors.StorageFailed(why, path=folder / "repo.json") from exc
                else:
                    self._repos[repo_id] = _renamed(repo, repo_id)
        shutil.rmtree(self.root / "incoming-deleted", ignore_errors=True)

    def _write(self, repo_id: RepoId, repo: Repo) -> None:
        write_durably(self._folder(repo_id) / "repo.json", _REPO.dump_json(repo))
        self._repos[repo_id] = repo

    def _folder(self, repo_id: RepoId) -> Path:
        return self.root / "repos" / repo_id.kind / repo_id.namespace / repo_id.name

    def _forget(self, repo_id: RepoId) -> None:
        self._parents.pop(repo_id, None)
        for key in [key for key in list(self._commits) if key[0] == repo_id]:
            self._commits.pop(key, None)

    def _turn(self, repo_id: RepoId) -> threading.RLock:
        with self._names:
            return self._locks.setdefault(repo_id, threading.RLock())


def ancestors(store: Store, repo_id: RepoId, oid: str | None) -> Iterator[Commit]:
    """Yield a commit and what came before it, newest first."""
    while oid is not None:
        commit = store.commit(repo_id, oid)
        yield commit
        oid = commit.parent


def now() -> str:
    """Return the time as the API writes it: `2026-01-31T12:00:00.000Z`."""
    moment = datetime.datetime.now(datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _renamed(repo: Repo, repo_id: RepoId) -> Repo:
    """Return the repo under the name of the folder it lies in, which a move changes first."""
    if (repo.namespace, repo.name) == (repo_id.namespace, repo_id.name):
        return repo
    fields = {name: getattr(repo, name) for name in Repo.__dataclass_fields__}
    return Repo(**fields | {"namespace": repo_id.namespace, "name": repo_id.name})


def _make_root(root: Path) -> None:
    """Make the folder; one that holds something else is left alone.

    Raises:
        errors.StorageFailed: there are files in it, and they are not a Hub's.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds private repos and tokens
    if not (root / "lock").exists() and any(root.iterdir()):
        raise errors.StorageFailed(
            "the folder is not empty and holds no Hub", path=root, hint="name a new folder"
        )


def _lock(path: Path) -> int:
    """Take the folder's lock, which the kernel gives back when the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise errors.StorageFailed(
            "another Hub serves this folder", path=path.parent, hint="stop it, or use another root"
        ) from None
    return descriptor
