"""File content on its way to the Hub, ahead of the commit: retries, progress, damage, Xet or LFS.

A file stays as it is until the push has ended, so that it can be sent again whatever happened: the
Hub unavailable (waits), bytes that arrived damaged (at once, a few times), Xet storage that gave up
(over LFS, and so does everything after it).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread

from ckptd import errors
from ckptd.hub import attempts, ledger, push, session, translate
from ckptd.hub.client import HubClient
from ckptd.hub.push import Happening, HubEvent, LocalFile

PROGRESS_EVERY_S = 0.25
MOST_DAMAGED = 3
"""Transfers of one file that may arrive damaged; then something on the way is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Sends the files of one push."""

    hub: HubClient
    target: push.Target
    revision: str
    attempts: attempts.Attempts

    async def send(self, file: LocalFile) -> ledger.Record:
        """Upload one file, reporting its progress meanwhile."""
        progress = _Progress()
        failure: errors.CkptdError | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(progress.run, file, self.attempts.report)
            try:
                (record,) = await self._send([file], progress)
            except errors.CkptdError as error:
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        self._uploaded(file)
        return record

    async def send_small(self, files: Sequence[LocalFile]) -> list[ledger.Record]:
        """Ask about small files in one request, read them, and send what goes ahead anyway."""
        records = await self._send(files, _Progress())
        for file in files:
            self._uploaded(file)
        return records

    def drop_xet(self, why: str) -> None:
        """Send the uploads of this process over LFS from now on."""
        if session.uses_xet():
            session.disable_xet()
            self._tell(Happening.XET_OFF, why)

    async def _send(self, files: Sequence[LocalFile], progress: _Progress) -> list[ledger.Record]:
        """Upload with retries; what arrived damaged is sent again as long as it is whole here."""
        damaged = 0
        while True:
            try:
                return await self.attempts.run(lambda: self._try(files, progress))
            except errors.HubError as error:
                if not translate.is_corrupt_transfer(error):
                    raise
                failure = error
            for file in files:
                await anyio.to_thread.run_sync(_require_whole, file)
            damaged += 1
            if damaged >= MOST_DAMAGED:
                raise errors.HubUnavailable(
                    f"{failure.message}: arrived damaged {damaged} times, though whole here",
                    status=failure.status,
                    hint="something between here and the Hub changes what is sent: a proxy?",
                ) from failure
            self._tell(Happening.SENT_AGAIN, failure.message)

    async def _try(self, files: Sequence[LocalFile], progress: _Progress) -> list[ledger.Record]:
        """Upload once; an upload that hf_xet gave up on goes over LFS at once."""
        progress.restart()
        try:
            return await self._upload(files, progress.add)
        except errors.HubError as error:
            if not translate.is_xet_failure(error):
                raise
            self.drop_xet(error.message)
        progress.restart()
        return await self._upload(files, progress.add)

    async def _upload(
        self, files: Sequence[LocalFile], meter: session.Meter
    ) -> list[ledger.Record]:
        return await self.hub.upload(
            files,
            repo_id=self.target.repo_id,
            revision=self.revision,
            create_pr=self.target.create_pr,
            meter=meter,
        )

    def _uploaded(self, file: LocalFile) -> None:
        self.attempts.report(
            HubEvent(
                happening=Happening.UPLOADED, path_in_repo=file.path_in_repo, nbytes=file.nbytes
            )
        )

    def _tell(self, happening: Happening, text: str) -> None:
        self.attempts.report(HubEvent(happening=happening, text=text))


def _require_whole(file: LocalFile) -> None:
    """Raise SourceChanged unless the file on disk is what it is said to be. Reads it."""
    with file.open() as content:
        # Typed for what can readinto; of our two kinds of file both can, BinaryIO does not say so.
        found = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
        nbytes = content.tell()
    if (nbytes, found) != (file.nbytes, file.sha256 or found):
        raise errors.SourceChanged(
            path=file.path,
            expected=f"{file.nbytes:,} bytes, sha256 {file.sha256}",
            found=f"{nbytes:,} bytes, sha256 {found}",
        )


class _Progress:
    """Bytes of one upload: added in worker threads, reported from the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent_bytes = 0

    def restart(self) -> None:
        """Begin at zero: another try."""
        with self._lock:
            self._sent_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that were handed to the network (thread-safe)."""
        with self._lock:
            self._sent_bytes += num_bytes

    async def run(self, file: LocalFile, report: attempts.Report) -> None:
        """Report until cancelled, whenever there is something new."""
        told_bytes = -1
        while True:
            now_bytes = max(0, min(self._sent_bytes, file.nbytes))
            if now_bytes != told_bytes:
                told_bytes = now_bytes
                report(
                    HubEvent(
                        happening=Happening.UPLOADING,
                        path_in_repo=file.path_in_repo,
                        done_bytes=now_bytes,
                        nbytes=file.nbytes,
                    )
                )
            await anyio.sleep(PROGRESS_EVERY_S)
