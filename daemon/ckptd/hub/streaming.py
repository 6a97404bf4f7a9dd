"""Content that lies in no file, on its way to the Hub: `transfer` for what is made while it is sent.

Part of the adapter (with `client`), blocking. Over LFS the library gets a file object; the sha256
comes first, so that its content is read twice, unless the digest is known or the Hub has it. Over
Xet it is read once, by `start_upload_stream` of hf_xet, for which the library has no door. There is
no way to ask Xet for a sha256: what an earlier attempt has sent is believed to be there, until the
commit says otherwise (see `translate.is_lost_upload`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub._commit_api import _fetch_upload_modes
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import _xet, _xet_progress_reporting

from ckptd import errors
from ckptd.hub import ledger, push, session, transfer

PIECE_BYTES = 4 << 20
"""Bytes that hf_xet is given at a time."""
_SAMPLE_BYTES = 512
"""What the Hub wants to see of a file before it says how it takes it."""
_XET = threading.Lock()
"""hf_xet takes in one file at a time (see `session.XET_DEFAULTS`): a second one that waits there,
with blocks in memory, might keep the first from getting its own."""


def preupload(
    api: HfApi, files: Sequence[push.LocalFile], *, repo_id: str, revision: str, create_pr: bool
) -> list[ledger.Record]:
    """Upload `files`, each of which has `content`, and return a record of each.

    Raises:
        push.ContentFailed: the content could not be made.
        errors.SourceChanged: it is not, or did not stay, what it is said to be.
        errors.HubRejected: the repo insists on ignoring a file.
    """
    place = _Place(api, repo_id, quote(revision, safe=""), create_pr=create_pr)
    return [_sent(place, file) for file in files]


class _Place:
    """Where files go."""

    def __init__(self, api: HfApi, repo_id: str, revision: str, *, create_pr: bool) -> None:
        self.api = api
        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        self.headers: dict[str, str] = api._build_hf_headers()

    def ask(self, operation: CommitOperationAdd) -> None:
        """Find out how the Hub takes a file, and whether it is ignored."""
        _fetch_upload_modes(
            [operation],
            repo_type="model",
            repo_id=self.repo_id,
            headers=self.headers,
            revision=self.revision,
            endpoint=self.api.endpoint,
            create_pr=self.create_pr,
            gitignore_content=transfer.NOTHING_IGNORED,
        )


def _sent(place: _Place, file: push.LocalFile) -> ledger.Record:
    assert file.content is not None
    with _explained(file.content), contextlib.closing(file.content.open()) as stream:
        operation = _operation(file, stream)
        place.ask(operation)
        content = None
        if operation._upload_mode != "lfs":
            content = _content(file, stream)
            sha256 = hashlib.sha256(content).hexdigest()
        elif session.uses_xet():
            sha256 = _over_xet(place, file, stream)
        else:
            sha256 = _over_lfs(place, file, stream, operation)
        if operation._should_ignore:
            raise errors.HubRejected(
                f"{file.path_in_repo} is ignored by the repo's .gitignore",
                hint="remove the rule from .gitignore on the Hub",
            )
    file.content.check()
    _require_same(file, sha256)
    return ledger.Record(
        path_in_repo=file.path_in_repo, nbytes=file.nbytes, sha256=sha256, content=content
    )


def _operation(file: push.LocalFile, stream: io.BufferedIOBase) -> CommitOperationAdd:
    """Return the library's operation for `stream`, which it would hash before anything else."""
    sample = stream.read(_SAMPLE_BYTES)
    stream.seek(0)
    operation = CommitOperationAdd(file.path_in_repo, b"")
    operation.path_or_fileobj = stream  # type: ignore[assignment]  # it says BinaryIO, and checks for this class
    operation.upload_info = UploadInfo(
        size=file.nbytes, sample=sample, sha256=bytes.fromhex(file.sha256 or "")
    )
    return operation


def _content(file: push.LocalFile, stream: io.BufferedIOBase) -> bytes:
    content = stream.read()
    if len(content) != file.nbytes:
        raise _changed(file, found=f"{len(content):,} bytes")
    return content


def _over_lfs(
    place: _Place, file: push.LocalFile, stream: io.BufferedIOBase, operation: CommitOperationAdd
) -> str:
    assert file.content is not None
    sha256 = file.sha256 or file.content.digest()
    operation.upload_info.sha256 = bytes.fromhex(sha256)
    stream.seek(0)
    place.api.preupload_lfs_files(
        place.repo_id,
        [operation],
        revision=place.revision,
        create_pr=place.create_pr,
        num_threads=1,
        gitignore_content=transfer.NOTHING_IGNORED,
    )
    return sha256


def _over_xet(place: _Place, file: push.LocalFile, stream: io.BufferedIOBase) -> str:
    """Send the content through hf_xet, which hashes it on the way; return its sha256."""
    assert file.content is not None
    if file.sha256 is not None and file.content.was_sent():
        return file.sha256
    get_session: Any = _xet.get_xet_session
    hf_xet: Any = importlib.import_module("hf_xet")  # it need not be installed
    refresh_url = _xet.xet_connection_info_refresh_url(
        token_type=_xet.XetTokenType.WRITE,
        repo_id=place.repo_id,
        repo_type="model",
        revision=None if place.create_pr else place.revision,
        endpoint=place.api.endpoint,
    )
    reporter = _xet_progress_reporting.XetUploadProgressReporter()  # `session` put its own there
    with (
        _XET,
        contextlib.closing(reporter),
        get_session().new_upload_commit(
            token_refresh_url=refresh_url + ("?create_pr=1" if place.create_pr else ""),
            token_refresh_headers=place.headers,
            custom_headers=_xet.xet_headers_without_auth(place.headers),
            progress_callback=reporter.update_progress,
        ) as commit,
    ):
        upload = commit.start_upload_stream(file.path_in_repo, sha256=hf_xet.COMPUTE_SHA256)
        while piece := stream.read(PIECE_BYTES):
            upload.write(piece)
        sent = upload.finish().xet_info
    return str(sent.sha256)


@contextlib.contextmanager
def _explained(content: push.Content) -> Iterator[None]:
    """Raise what went wrong with the content, and not what the library made of it."""
    try:
        yield
    except Exception as error:
        failure = content.failure
        if failure is None or failure is error:
            raise
        raise push.ContentFailed("the content could not be made") from failure


def _require_same(file: push.LocalFile, sha256: str) -> None:
    """Raise SourceChanged unless what was sent is what an earlier attempt has hashed."""
    if sha256 != (file.sha256 or sha256):
        raise _changed(file, found=f"sha256 {sha256}")


def _changed(file: push.LocalFile, *, found: str) -> errors.SourceChanged:
    expected = f"{file.nbytes:,} bytes" + (f", sha256 {file.sha256}" if file.sha256 else "")
    return errors.SourceChanged(path=file.path, expected=expected, found=found)
