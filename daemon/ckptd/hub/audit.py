"""A published model against its own `ckptd.json`: is what stands on the Hub what was made?

Names and sizes come from the tree of the commit, and so does the sha256 of a file in large-file
storage; files that travel inside the commit are read, for git has another hash. `deep` reads the
large ones too and hashes what really comes back. Nothing is written anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import anyio
from anyio import from_thread, to_thread
from huggingface_hub import get_session
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status

from ckptd import __version__, errors
from ckptd.hub import ledger, tokens, translate
from ckptd.hub.client import HubClient

RECORD_NAME = "ckptd.json"
MOST_TRIES = 5
"""Tries for one large file without a byte in between; each goes on where the last one stopped."""
PAUSE_S = 1.0
"""Pause before the first further try; it grows with each."""
_PARTIAL = 206


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedFile:
    """A file as it was when it was made."""

    name: str
    nbytes: int
    sha256: str | None
    """None where it was not hashed, which is so for output that was not to be pushed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What `ckptd.json` says."""

    files: tuple[RecordedFile, ...]
    has_side_files: bool
    """False for records that name weights alone."""
    ckptd: str
    source: Mapping[str, Any]
    pipeline: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as it was made."""

    name: str
    what: str
    """`absent`, `size`, `sha256`, `not recorded` or `no sha256 recorded`."""
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        sides = [("expected", self.expected), ("found", self.found)]
        told = ", ".join(f"{side} {value}" for side, value in sides if value is not None)
        return f"{self.name}: {self.what}" + (f" ({told})" if told else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found at one commit."""

    repo_id: str
    commit: str
    record: Record
    differences: tuple[Difference, ...]
    hashed_bytes: int
    """Bytes that were read and hashed for it."""


async def audit(
    client: HubClient,
    repo_id: str,
    revision: str,
    *,
    deep: bool = False,
    begun: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Audit:
    """Compare the model at `revision` with its record; `begun` hears of each file that is read.

    Raises:
        errors.HubError: no such repo or revision for this token, or the Hub fails.
        errors.CheckFailed: there is no record, or it cannot be read.
    """
    commit = await client.head(repo_id, revision)
    if commit is None:
        raise errors.HubNotFound(f"{revision} has no commit", repo_id=repo_id)
    tree = await client.tree(repo_id, commit)
    if RECORD_NAME not in tree:
        raise errors.CheckFailed(
            f"{repo_id}@{commit[:12]} has no {RECORD_NAME}: it was not published by ckptd",
            check="verify-remote",
        )
    record = parse(await client.read(repo_id, commit, RECORD_NAME))
    differences = list(compare(record, tree))
    wrong = {difference.name for difference in differences}
    unread = [
        file
        for file in record.files
        if file.name not in wrong and (deep or tree[file.name].sha256 is None)
    ]
    for file in unread:
        begun(file.name, file.nbytes)
        found = await _sha256(client, repo_id, commit, tree[file.name])
        if found != file.sha256:
            differences.append(
                Difference(name=file.name, what="sha256", expected=file.sha256, found=found)
            )
    return Audit(
        repo_id=repo_id,
        commit=commit,
        record=record,
        differences=tuple(differences),
        hashed_bytes=sum(file.nbytes for file in unread),
    )


def parse(content: bytes) -> Record:
    """Return the record in `ckptd.json`.

    Raises:
        errors.CheckFailed: it is no record.
    """
    try:
        value = json.loads(content)
        entries = [*value["weights"], *value.get("files", ())]
        files = tuple(
            RecordedFile(
                name=str(entry["name"]), nbytes=int(entry["nbytes"]), sha256=entry["sha256"]
            )
            for entry in entries
        )
        return Record(
            files=files,
            has_side_files="files" in value,
            ckptd=str(value["ckptd"]),
            source=dict(value["source"]),
            pipeline=dict(value["pipeline"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise errors.CheckFailed(
            f"{RECORD_NAME} is no record of ckptd: {type(exc).__name__}: {exc}",
            check="verify-remote",
        ) from exc


def compare(record: Record, tree: Mapping[str, ledger.RemoteFile]) -> tuple[Difference, ...]:
    """Return what names, sizes and the tree's own hashes show, in the record's order."""
    found: list[Difference] = []
    for file in record.files:
        remote = tree.get(file.name)
        if remote is None:
            found.append(Difference(name=file.name, what="absent"))
        elif remote.nbytes != file.nbytes:
            sizes = f"{file.nbytes:,} bytes", f"{remote.nbytes:,}"
            found.append(Difference(name=file.name, what="size", expected=sizes[0], found=sizes[1]))
        elif file.sha256 is None:
            found.append(Difference(name=file.name, what="no sha256 recorded"))
        elif remote.sha256 not in (None, file.sha256):
            found.append(
                Difference(name=file.name, what="sha256", expected=file.sha256, found=remote.sha256)
            )
    return (*found, *_strange_weights(record.files, tree))


def _strange_weights(
    files: Sequence[RecordedFile], tree: Mapping[str, ledger.RemoteFile]
) -> list[Difference]:
    """Return weight files that nobody recorded: a reader could load them in place of ours."""
    known = {file.name for file in files}
    return [
        Difference(name=path, what="not recorded", found=f"{remote.nbytes:,} bytes")
        for path, remote in sorted(tree.items())
        if path not in known and ledger.is_weights(path)
    ]


async def _sha256(client: HubClient, repo_id: str, commit: str, remote: ledger.RemoteFile) -> str:
    """Return the sha256 of what the Hub sends; small files are read whole."""
    name = remote.path_in_repo
    if remote.sha256 is None:
        return hashlib.sha256(await client.read(repo_id, commit, name)).hexdigest()
    return await to_thread.run_sync(_digest, client.endpoint, repo_id, commit, name)


def _digest(endpoint: str, repo_id: str, commit: str, path_in_repo: str) -> str:
    """Return the sha256 of a file as the Hub sends it. Blocks; ends when cancelled.

    Raises:
        errors.HubError: it cannot be read, after some tries.
    """
    url = f"{endpoint}/{repo_id}/resolve/{commit}/{quote(path_in_repo)}"
    digest, done, tries = hashlib.sha256(), 0, 0
    while True:
        before = done
        try:
            with translate.translated(f"reading {path_in_repo}", repo_id=repo_id):
                for piece in _pieces(url, after=done):
                    from_thread.check_cancelled()
                    digest.update(piece)
                    done += len(piece)
                return digest.hexdigest()
        except errors.HubUnavailable:
            tries = 1 if done > before else tries + 1
            if tries >= MOST_TRIES:
                raise
            from_thread.run(anyio.sleep, PAUSE_S * tries)


def _pieces(url: str, *, after: int) -> Any:
    """Yield the content of `url` from byte `after` on."""
    found = tokens.find()
    headers = build_hf_headers(
        token=False if found is None else found.text,
        library_name="ckptd",
        library_version=__version__,
    )
    headers["Accept-Encoding"] = "identity"
    if after:
        headers["Range"] = f"bytes={after}-"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        skip = 0 if not after or response.status_code == _PARTIAL else after
        for piece in response.iter_bytes():
            yield piece[skip:]
            skip = max(0, skip - len(piece))
