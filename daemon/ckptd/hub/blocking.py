"""The publisher for synchronous code: files handed over at once, sent meanwhile, one commit.

A `with` block runs an event loop in a thread of its own. `upload` returns immediately; a failure of
an earlier upload is raised by the next call. `commit` blocks until the one commit stands and is
verified. Leaving the block with an exception cancels what is under way: nothing is committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from ckptd import errors
from ckptd.aio.backoff import Backoff
from ckptd.hub import attempts, push
from ckptd.hub.client import HubClient
from ckptd.hub.publisher import Publisher


class BlockingPublisher:
    """One push, driven from one synchronous thread.

    Args:
        target: where to; a `repo_id` without a namespace is completed with the token's account, and
            `private` holds only for a repo that this push makes.
        push_id: see `push.push_id`; the same id never makes a second commit.
        endpoint: base URL of the Hub; None takes HF_ENDPOINT or the public Hub.
        token: None takes what `tokens` finds.
        report: is told what happens, from the event loop's thread; must not block.
        patience: how often and how long failures that may pass are retried.
    """

    def __init__(
        self,
        *,
        target: push.Target,
        push_id: str,
        endpoint: str | None = None,
        token: str | None = None,
        report: Callable[[push.HubEvent], None] = lambda _: None,
        patience: Backoff | None = None,
    ) -> None:
        self.target = target
        self.endpoint = endpoint or ""
        self._push_id = push_id
        self._token = token
        self._report = report
        self._patience = patience or Backoff()
        self._stack = contextlib.ExitStack()
        self._portal: BlockingPortal | None = None
        self._publisher: Publisher | None = None
        self._uploads: dict[push.LocalFile, Future[str | None]] = {}

    def __enter__(self) -> Self:
        """Check token, repo, revision and card; make the repo and the branch if absent.

        Raises:
            errors.HubError: what stands in the way; nothing was sent.
        """
        with self._stack:
            self._portal = self._stack.enter_context(start_blocking_portal())
            self._portal.call(self._open)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if exc is not None:
            for upload in self._uploads.values():
                upload.cancel()
        self._stack.__exit__(kind, exc, trace)

    def upload(self, file: push.LocalFile) -> None:
        """Begin to send a finished file, which must stay as it is, and return at once.

        Raises:
            errors.HubError, errors.SourceChanged: an earlier upload has failed for good.
        """
        self._raise_failed()
        assert self._portal is not None
        assert self._publisher is not None
        if file not in self._uploads:
            self._uploads[file] = self._portal.start_task_soon(self._publisher.upload, file)

    def commit(self, *files: push.LocalFile) -> push.Publication:
        """Wait for the uploads, make the one commit of them and of `files`, and return it.

        Raises:
            errors.HubError, errors.SourceChanged, errors.CheckFailed: see `Publisher.commit`.
        """
        assert self._portal is not None
        assert self._publisher is not None
        for upload in self._uploads.values():
            upload.result()
        return self._portal.call(self._publisher.commit, [*self._uploads, *files])

    def _raise_failed(self) -> None:
        for upload in self._uploads.values():
            if upload.done():
                upload.result()

    async def _open(self) -> None:
        hub = HubClient(endpoint=self.endpoint or None, token=self._token)
        self.endpoint = hub.endpoint
        again = attempts.Attempts(report=self._report, patience=self._patience)
        repo_id = self.target.repo_id
        if "/" not in repo_id:
            repo_id = f"{(await again.run(hub.whoami)).name}/{repo_id}"
        private = self.target.private
        if private is not None and await again.run(lambda: _exists(hub, repo_id)):
            private = None
        self.target = dataclasses.replace(self.target, repo_id=repo_id, private=private)
        self._publisher = Publisher(
            target=self.target,
            push_id=self._push_id,
            hub=hub,
            report=self._report,
            patience=self._patience,
        )
        await self._publisher.open()


async def _exists(hub: HubClient, repo_id: str) -> bool:
    try:
        await hub.repo(repo_id)
    except errors.HubNotFound:
        return False
    return True
