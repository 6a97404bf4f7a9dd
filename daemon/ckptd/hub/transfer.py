"""File content on its way to the Hub: upload ahead of the commit, and the commit's operations.

Part of the adapter (with `client`), blocking. The library reads an operation's state from private
fields. They are read and set here only, so that a commit needs neither a second upload pass nor the
library's own idea of which files are unchanged: that one is as old as the upload, and would drop a
file which somebody else changed since.

Promise: what is uploaded is what the `LocalFile` says. Size, inode and modification time are
compared before and after, because a Xet upload of a file that is being rewritten commits a mixture
without any error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.lfs import UploadInfo

from ckptd import errors
from ckptd.hub import ledger, push

NOTHING_IGNORED = "# every file of this push is published\n"
"""Sent in place of the repo's .gitignore: a rule there would drop a file from the commit unsaid."""


def preupload(
    api: HfApi, files: Sequence[push.LocalFile], *, repo_id: str, revision: str, create_pr: bool
) -> list[ledger.Record]:
    """Upload the large ones of `files`, read the small ones, and return a record of each.

    Every call makes fresh operations, which is what makes it safe to repeat.

    Raises:
        errors.SourceChanged: a file is not, or did not stay, what its `LocalFile` says.
        errors.HubRejected: the repo insists on ignoring a file.
    """
    before = [_fingerprint(file) for file in files]
    operations = [_fresh(file) for file in files]
    api.preupload_lfs_files(
        repo_id,
        operations,
        revision=revision,
        create_pr=create_pr,
        num_threads=2,
        gitignore_content=NOTHING_IGNORED,
    )
    records = [_record(*pair) for pair in zip(files, operations, strict=True)]
    for file, seen in zip(files, before, strict=True):
        if _fingerprint(file) != seen:
            raise _changed(file, found="it was written to during the upload")
    return records


def operations(
    records: Sequence[ledger.Record], deleted: Sequence[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return fresh operations for one `create_commit`: sent as they are, never as a no-op."""
    return [
        *(_ready(record) for record in records),
        *(CommitOperationDelete(path, is_folder=False) for path in deleted),
    ]


def _fresh(file: push.LocalFile) -> CommitOperationAdd:
    operation = CommitOperationAdd(file.path_in_repo, str(file.path))
    if file.sha256 is not None:
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _record(file: push.LocalFile, operation: CommitOperationAdd) -> ledger.Record:
    """Return what was uploaded, or the content of a file that travels inside the commit."""
    if operation._should_ignore:
        raise errors.HubRejected(
            f"{file.path_in_repo} is ignored by the repo's .gitignore",
            hint="remove the rule from .gitignore on the Hub",
        )
    content = None
    if operation._upload_mode == "lfs":
        sha256 = operation.upload_info.sha256.hex()
    else:
        content = file.path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if len(content) != file.nbytes or sha256 != (file.sha256 or sha256):
            raise _changed(file, found=f"{len(content):,} bytes, sha256 {sha256}")
    return ledger.Record(
        path_in_repo=file.path_in_repo, nbytes=file.nbytes, sha256=sha256, content=content
    )


def _ready(record: ledger.Record) -> CommitOperationAdd:
    """Return a fresh operation that `create_commit` sends as it is: uploaded, never a no-op."""
    operation = CommitOperationAdd(record.path_in_repo, record.content or b"")
    operation._should_ignore = False
    if record.content is not None:
        operation._upload_mode = "regular"
        return operation
    operation._upload_mode = "lfs"
    operation._is_uploaded = True
    operation.upload_info = UploadInfo(
        size=record.nbytes, sample=b"", sha256=bytes.fromhex(record.sha256)
    )
    return operation


def _fingerprint(file: push.LocalFile) -> tuple[int, int, int, int]:
    """Return what changes when a file is rewritten or replaced, after checking its size."""
    try:
        seen = file.path.stat()
    except FileNotFoundError as exc:
        raise _changed(file, found="no file") from exc
    if seen.st_size != file.nbytes:
        raise _changed(file, found=f"{seen.st_size:,} bytes")
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def _changed(file: push.LocalFile, *, found: str) -> errors.SourceChanged:
    expected = f"{file.nbytes:,} bytes" + (f", sha256 {file.sha256}" if file.sha256 else "")
    return errors.SourceChanged(path=file.path, expected=expected, found=found)
