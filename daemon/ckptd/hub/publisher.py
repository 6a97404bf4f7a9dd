"""A push from finished files to one verified commit: the order of things.

`open` checks everything that can be checked before the first byte is sent; `upload` takes each file
as it is finished, several at once; `commit` makes the one commit (or draft, commit, open for a pull
request), compares the Hub's tree with what was sent, and tags it.

Promises: one commit per push id, however often and wherever it is killed and run again; exactly the
given files are added, and of the others only stale weights are deleted (`ledger` has the rule); the
card keeps its body; a git tag points at this commit or the push fails. Files must stay on disk,
unchanged, until `commit` has returned.

Needs anyio and nothing of the daemon; synchronous code enters through a blocking portal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

from ckptd import errors
from ckptd.aio import backoff
from ckptd.hub import attempts, landing, ledger, preflight, pull_request, push, sending, session
from ckptd.hub.client import HubClient
from ckptd.hub.push import Happening, HubEvent, LocalFile, Publication, Target

__all__ = ["Happening", "HubEvent", "LocalFile", "Publication", "Publisher", "Target"]

SMALL_BYTES = 512 * 1024
"""Files below this, weights aside, wait for the commit and are asked about in one request."""
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
MOST_BEGINNINGS = 2
"""Of one push: the first one, and one more after the repo or the branch went away."""

T = TypeVar("T")


class Publisher:
    """One push of one checkpoint to one target.

    Args:
        target: where to, with every placeholder resolved.
        push_id: see `push.push_id`; the same id never makes a second commit.
        hub: may be shared with other publishers.
        report: is told what happens; called from the event loop only, and must not block.
        patience: how often and how long failures that may pass are retried.
        clock: the time of the waits.
    """

    def __init__(
        self,
        *,
        target: Target,
        push_id: str,
        hub: HubClient,
        report: attempts.Report = lambda _: None,
        patience: backoff.Backoff | None = None,
        clock: backoff.Time = backoff.REAL_TIME,
    ) -> None:
        self._target = target
        self._push_id = push_id
        self._hub = hub
        self._report = report
        self._attempts = attempts.Attempts(
            report=report, patience=patience or backoff.Backoff(), clock=clock
        )
        self._checks = preflight.Preflight(
            hub=hub, target=target, push_id=push_id, attempts=self._attempts
        )
        self._revision = target.revision or push.MAIN
        self._opened: preflight.Opened | None = None
        self._beginnings = 0
        self._beginning = anyio.Lock()
        self._records: dict[LocalFile, ledger.Record] = {}

    async def open(self) -> None:
        """Check token, names, repo, revision, tag and card; make the repo and the branch if absent.

        Raises:
            errors.HubUnauthorized, errors.HubForbidden: the token; nothing was changed or sent.
            errors.HubRejected: the target cannot be published to as it is; the text says why.
        """
        self._opened = await self._checks.run()
        self._target = dataclasses.replace(self._target, repo_id=self._opened.repo_id)
        self._beginnings += 1
        if session.uses_xet() and not await self._attempts.run(
            lambda: self._hub.serves_xet(
                self._target.repo_id, self._revision, create_pr=self._target.create_pr
            )
        ):
            self._sender.drop_xet("this Hub does not serve Xet")

    async def upload(self, file: LocalFile) -> str | None:
        """Send one finished file ahead of the commit; returns its sha256 when the Hub has it.

        Safe to call concurrently (the client's limiter decides how many are sent at once) and again
        after a restart: what the Hub has is not sent twice. Small files wait for the commit (None).

        Raises:
            errors.SourceChanged: the file was touched; nothing of it will be committed.
            errors.HubError: see `translate`; `HubUnavailable` after the retries.
        """
        if not _is_small(file) and file not in self._records:
            self._records[file] = await self._despite_absence(lambda: self._sender.send(file))
        record = self._records.get(file)
        return None if record is None else record.sha256

    async def commit(
        self, files: Sequence[LocalFile], *, card_section: str | None = None
    ) -> Publication:
        """Make the one commit of exactly `files` and return it, verified and tagged.

        `card_section` is what ckptd itself says in the model card, see `card.with_section`.

        Files that were not uploaded yet are. With `create_pr`, a revision that already holds
        exactly these files gets no pull request. Safe to call again after any failure.

        Raises:
            errors.CheckFailed: the commit is not what was sent.
            errors.HubRejected: the git tag exists elsewhere, or the Hub refuses for good.
            errors.HubConflict, errors.HubUnavailable: not now; nothing half-published.
        """
        self._checks.take_local_card(files)
        self._checks.card_section = card_section
        rest = [file for file in files if not preflight.is_card(file)]
        whole = self._propose if self._target.create_pr else self._commit
        return await self._despite_absence(lambda: whole(rest))

    async def _commit(self, files: Sequence[LocalFile]) -> Publication:
        """Publish as a commit on the revision."""
        records = await self._gather(files)
        if await self._checks.foreign_tag() is not None:
            base = await self._lander.base(self._revision, records, self._checks.card_for)
            await self._checks.check_tag_before_commit(base.head if base.is_same else None)
        return await self._publish(self._revision, files, records)

    async def _propose(self, files: Sequence[LocalFile]) -> Publication:
        """Publish as a pull request, unless the revision holds exactly the files already."""
        records = await self._gather(files)
        base = await self._lander.base(self._revision, records, self._checks.card_for)
        if base.is_same and base.head is not None:
            landed = landing.Landed(oid=base.head, created=False, records=base.records)
            return await self._finish(self._revision, landed)
        await self._checks.check_tag_before_commit(None)
        draft = pull_request.Draft(
            hub=self._hub,
            target=self._target,
            push_id=self._push_id,
            account=self._opened.account if self._opened is not None else "",
            attempts=self._attempts,
        )
        found = await draft.ensure()
        try:
            return await self._publish(
                found.revision, files, records, draft=draft, pr_num=found.num
            )
        except (errors.HubForbidden, errors.HubRejected, errors.HubConflict):
            await draft.require_live(found.num)
            raise

    @property
    def _sender(self) -> sending.Sender:
        return sending.Sender(
            hub=self._hub, target=self._target, revision=self._revision, attempts=self._attempts
        )

    @property
    def _lander(self) -> landing.Lander:
        opened = self._opened
        return landing.Lander(
            hub=self._hub,
            target=self._target,
            push_id=self._push_id,
            attempts=self._attempts,
            since=opened.head if opened is not None and not self._target.create_pr else None,
        )

    async def _despite_absence(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return what `call` returns; begin again, once, where repo or revision went away meanwhile.

        Somebody deleted them while the push ran. They are made as a first push would make them, and
        every file is offered once more: what the repo had taken went with it.

        Raises:
            errors.HubNotFound: they went away again, or cannot be made.
        """
        beginnings = self._beginnings
        try:
            return await call()
        except errors.HubNotFound as error:
            missed = error
        async with self._beginning:
            if self._beginnings == beginnings:
                if beginnings >= MOST_BEGINNINGS:
                    raise missed
                text = f"{missed.message}: it was there before, so the push begins anew"
                self._report(HubEvent(happening=Happening.BEGUN_AGAIN, text=text))
                self._records.clear()
                await self.open()
        return await call()

    async def _publish(
        self,
        revision: str,
        files: Sequence[LocalFile],
        records: Sequence[ledger.Record],
        *,
        draft: pull_request.Draft | None = None,
        pr_num: int | None = None,
    ) -> Publication:
        """Commit to a ref, verify, open the pull request, tag."""

        async def send_again(resend: int) -> list[ledger.Record]:
            if resend > 1 and session.uses_xet():
                self._sender.drop_xet("the Xet storage does not keep what it confirmed")
            self._records.clear()
            return await self._gather(files)

        landed = await self._lander.land(
            revision, records, card_for=self._checks.card_for, send_again=send_again
        )
        await self._lander.verify(landed)
        if draft is not None and pr_num is not None:
            await draft.open(pr_num)
        return await self._finish(revision, landed, pr_num=pr_num)

    async def _finish(
        self, revision: str, landed: landing.Landed, *, pr_num: int | None = None
    ) -> Publication:
        repo_id, tag = self._target.repo_id, self._target.git_tag
        if tag is not None:
            await self._checks.tag(tag, landed.oid)
        base = f"{self._hub.endpoint}/{repo_id}"
        return Publication(
            repo_id=repo_id,
            revision=revision,
            commit=landed.oid,
            commit_url=f"{base}/commit/{landed.oid}",
            pr_num=pr_num,
            pr_url=f"{base}/discussions/{pr_num}" if pr_num is not None else None,
            git_tag=tag,
            created=landed.created,
        )

    async def _gather(self, files: Sequence[LocalFile]) -> list[ledger.Record]:
        """Return a record for each file, uploading what is missing: small ones in one request."""
        missing = [file for file in files if file not in self._records]
        small = [file for file in missing if _is_small(file)]
        if small:
            records = await self._sender.send_small(small)
            self._records.update(zip(small, records, strict=True))
        await self._upload_all(missing)
        return [self._records[file] for file in files]

    async def _upload_all(self, files: Sequence[LocalFile]) -> None:
        """Upload side by side; the first failure stops the others and is raised as it is."""
        failures: list[errors.CkptdError] = []

        async def one(file: LocalFile) -> None:
            try:
                await self.upload(file)
            except errors.CkptdError as error:
                failures.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for file in files:
                group.start_soon(one, file)
        if failures:
            raise failures[0]


def _is_small(file: LocalFile) -> bool:
    return file.nbytes < SMALL_BYTES and file.path.suffix not in _WEIGHTS
