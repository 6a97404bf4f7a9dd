"""The worker: takes jobs from the store and has runner processes do them, one a slot.

A slot keeps a runner waiting, so that a job starts at once. It holds the job's lease while the
runner works, and gives it back in every way a job can end: finished, failed, cancelled by a person,
the runner killed, the daemon stopped. A runner that failed is replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import structlog

from ckptd import errors
from ckptd.checkpoint.writer import Cache
from ckptd.jobs import progress
from ckptd.jobs.failing import RUNNER_DIED, Failure, RetryLimits
from ckptd.jobs.job import Job, Outcome, State
from ckptd.jobs.store import Admit, JobStore
from ckptd.pipeline.staged import StagingKind
from ckptd.service import housekeeping, policies
from ckptd.service.board import Board
from ckptd.service.runners import RunnerProcess
from ckptd.service.vigil import Vigil

log = structlog.get_logger()

START_PAUSE_S = 10.0
"""Pause after a runner could not be started: the node is short of something."""
CANCEL_PATIENCE_S = 15.0
"""How long a runner may take to stop a job before it is killed."""
RECORD_S = 10.0
"""How long an orderly stop waits for a job store that is locked; the next start knows as well."""
POLL_S = 2.0
"""How soon a change made by another process (`ckptd jobs retry`) is noticed."""
LEAST_BUDGET_BYTES = 16_000_000
"""A job that crashes its runner gets half the budget each time, down to this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What slots need to know of the settings."""

    state_path: Path
    slots: int
    byte_budget: int
    num_threads: int
    cache: Cache
    staging: StagingKind = "disk"
    endpoint: str | None
    upload_limit: int | None = None
    """Most bytes a second that one runner may send."""
    lease_s: float
    """How long a job stays ours without a sign of life."""
    limits: RetryLimits
    preload: Callable[[], bool]
    """Whether a definition in use computes, so that a runner should import torch ahead."""
    stall_s: float = 900.0
    """How long a runner may say nothing new before it is replaced."""
    vanished: Callable[[Job], None] = lambda _: None
    """Is told of jobs whose pin is gone: the source may be there still."""
    bounds: tuple[str, ...] = ()
    """What a runner may take of the node, as its options."""
    admit: Callable[[], Awaitable[Admit | None]]
    """The rule that says which job may begin, as it is now."""


class Worker:
    """All slots of a daemon."""

    def __init__(self, *, name: str, store: JobStore, board: Board, options: WorkerOptions) -> None:
        self._name = name
        self._store = store
        self._board = board
        self._options = options
        self._news = anyio.Event()
        self._draining = False
        self.ended = anyio.Event()
        """Set when the last job has ended after `drain`."""

    def drain(self) -> None:
        """Take no more jobs; those that run go on, and `run` returns when they have ended."""
        self._draining = True
        self.poke()

    def poke(self) -> None:
        """Look for a job now: one was queued."""
        self._news.set()
        self._news = anyio.Event()

    async def run(self) -> None:
        """Work until cancelled; then runners are stopped and leases are given back."""
        async with anyio.create_task_group() as tidying:
            tidying.start_soon(self._tidy_cancelled)
            async with anyio.create_task_group() as group:
                for number in range(self._options.slots):
                    group.start_soon(self._slot, f"{self._name}/{number}")
            tidying.cancel_scope.cancel()
        self.ended.set()

    async def _tidy_cancelled(self) -> None:
        """Remove pins and staging of jobs that a person cancels while they wait."""
        tidied: dict[str, float] = {}
        while True:
            for job in await self._store.list(states={State.CANCELLED}):
                if tidied.get(job.job_id) != job.updated_at:
                    await anyio.to_thread.run_sync(housekeeping.tidy, job, self._options.state_path)
                    tidied[job.job_id] = job.updated_at
            await anyio.sleep(POLL_S)

    async def _slot(self, worker: str) -> None:
        runner: RunnerProcess | None = None
        idle_deaths = 0
        try:
            while True:
                if runner is not None and runner.has_ended:
                    await self._mourn(runner, idle_deaths)
                    runner, idle_deaths = None, idle_deaths + 1
                if runner is None:
                    try:
                        runner = await RunnerProcess.start(
                            preload=self._options.preload(), bounds=self._options.bounds
                        )
                    except OSError as error:
                        log.error("runner not started", why=str(error))
                        await anyio.sleep(START_PAUSE_S)
                        continue
                if self._draining:
                    return
                admit = await self._options.admit()
                job = await self._store.acquire(
                    worker=worker, lease_s=self._options.lease_s, now=time.time(), admit=admit
                )
                if job is None:
                    await self._pause()
                    continue
                idle_deaths = 0
                if await self._passes_over(job, worker):
                    continue
                if not await self._do(job, runner, worker):
                    await runner.close()
                    runner = None
        finally:
            if runner is not None:
                await runner.close()

    async def _pause(self) -> None:
        """Wait for news, or until a job falls due."""
        news = self._news
        now = time.time()
        due = await self._store.next_due(now=now)
        with anyio.move_on_after(POLL_S if due is None else min(POLL_S, due - now + 0.01)):
            await news.wait()

    async def _mourn(self, runner: RunnerProcess, idle_deaths: int) -> None:
        """Tidy up after a runner that died while it waited: no job's fault, so no job's failure."""
        await runner.close()
        log.warning("runner replaced", status=await runner.exit_status())
        if idle_deaths:
            await anyio.sleep(START_PAUSE_S)

    async def _passes_over(self, job: Job, worker: str) -> bool:
        """Whether the job's definition ends it before it begins: its branch would go back.

        No other job of its target runs now, so what is published stays so until this one has ended.
        """
        if not policies.moves_forward_only(job.spec):
            return False
        newer = await self._store.list(
            states=[State.PUBLISHED], target=job.spec.target, after_step=job.spec.step
        )
        why = policies.goes_back(job, newer)
        if why is None:
            return False
        outcome = Outcome(state=State.SKIPPED, reason=why)
        ended = await self._store.finish(job.spec.job_id, outcome, worker=worker, now=time.time())
        log.info("job skipped", job=job.spec.job_id, checkpoint=job.spec.source_path, reason=why)
        await anyio.to_thread.run_sync(housekeeping.tidy, ended, self._options.state_path)
        return True

    async def _do(self, job: Job, runner: RunnerProcess, worker: str) -> bool:
        """Have `runner` do `job`; return whether the runner can take another one."""
        spec = job.spec
        logger = log.bind(
            job=spec.job_id, run=spec.run, step=spec.step, checkpoint=spec.name, target=spec.target
        )
        logger.info("job started", attempt=job.attempt, pipeline=spec.pipeline)
        self._board.started(job, worker=worker)
        ending: progress.Finished | progress.Failed | None = None
        lost = False
        vigil = Vigil(stall_s=self._options.stall_s)
        try:
            try:
                ending = await self._converse(job, runner, worker, vigil)
            except* errors.LeaseLost:
                lost = True
        except anyio.get_cancelled_exc_class():
            await runner.close()
            with anyio.move_on_after(RECORD_S, shield=True), contextlib.suppress(errors.LeaseLost):
                await self._release(spec.job_id, worker)
                logger.info("job released", reason="the daemon stops")
            raise
        finally:
            self._board.ended(spec.job_id)
        if lost:
            logger.warning("lease lost, job left to its new worker")
            return False
        try:
            if ending is None:
                await runner.close()
                ending = progress.Failed(failure=vigil.loss(await runner.exit_status()))
            return await self._settle(job, ending, worker, logger)
        except errors.LeaseLost:
            logger.warning("lease lost, the job's end is its new worker's to record")
            return False

    async def _converse(
        self, job: Job, runner: RunnerProcess, worker: str, vigil: Vigil
    ) -> progress.Finished | progress.Failed | None:
        """Return how the runner says the job ended; None if it died without a word."""
        spec = job.spec
        start = progress.Start(
            spec=spec,
            work_path=str(housekeeping.work_path(self._options.state_path, spec.job_id)),
            byte_budget=_budget(self._options.byte_budget, job.failure),
            num_threads=self._options.num_threads,
            cache=self._options.cache,
            staging=self._options.staging,
            endpoint=self._options.endpoint,
            upload_limit=self._options.upload_limit,
            attempt=job.attempt,
        )
        ending: progress.Finished | progress.Failed | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep_lease, spec.job_id, runner, worker, vigil)
            if await runner.send(start):
                try:
                    async with contextlib.aclosing(runner.reports()) as reports:
                        async for report in reports:
                            vigil.heard(report)
                            self._board.reported(spec.job_id, report)
                            if isinstance(report, progress.Finished | progress.Failed):
                                ending = report
                                break
                except ValueError as error:
                    log.error("runner wrote nonsense", job=spec.job_id, error=str(error))
                    vigil.give_up("wrote something that is no report")
            group.cancel_scope.cancel()
        return ending

    async def _keep_lease(
        self, job_id: str, runner: RunnerProcess, worker: str, vigil: Vigil
    ) -> None:
        asked_at: float | None = None
        lease_s = self._options.lease_s
        extended = time.monotonic()
        while True:
            await anyio.sleep(POLL_S)
            job = await self._store.get(job_id)
            if job.cancel_requested and asked_at is None:
                asked_at = time.monotonic()
                await runner.send(progress.Cancel(reason="cancelled by hand"))
            deaf = asked_at is not None and time.monotonic() - asked_at > CANCEL_PATIENCE_S
            if deaf or vigil.hangs():
                await runner.close()
            if time.monotonic() - extended > lease_s / 4:
                await self._store.extend(job_id, worker=worker, lease_s=lease_s, now=time.time())
                extended = time.monotonic()

    async def _settle(
        self,
        job: Job,
        ending: progress.Finished | progress.Failed,
        worker: str,
        logger: structlog.stdlib.BoundLogger,
    ) -> bool:
        """Record how the job ended and tidy up after it."""
        job_id = job.spec.job_id
        now = time.time()
        if isinstance(ending, progress.Finished):
            ended = await self._store.finish(job_id, ending.outcome, worker=worker, now=now)
            outcome = ending.outcome
            logger.info(
                f"job {ended.state.value}",
                commit=outcome.commit,
                pull_request=outcome.pr_num,
                git_tag=outcome.git_tag,
                shards=outcome.num_shards,
                seconds=round(outcome.duration_s, 2),
                reason=outcome.reason,
            )
        elif await self._was_cancelled(job_id, ending):
            ended = await self._release(job_id, worker)
            logger.info(f"job {ended.state.value}", reason=ended.reason)
        else:
            failure = ending.failure
            # The pin that was read is gone when a person reads the reason.
            told = failure.message.replace(job.spec.pinned_path, job.spec.source_path)
            failure = dataclasses.replace(failure, message=told)
            ended = await self._store.fail(
                job_id,
                failure,
                worker=worker,
                limits=self._options.limits,
                jitter=random.random(),  # noqa: S311 (spreads retries, guards nothing)
                now=now,
            )
            logger.warning(
                f"job {ended.state.value}",
                error=failure.code,
                reason=ended.reason,
                next_try_s=None if ended.next_try_at is None else round(ended.next_try_at - now, 1),
            )
        await anyio.to_thread.run_sync(housekeeping.tidy, ended, self._options.state_path)
        if ended.state is State.VANISHED:
            self._options.vanished(ended)
        # After a failure or a cancel, threads of the Hub's client may still be at work in it.
        return isinstance(ending, progress.Finished)

    async def _was_cancelled(self, job_id: str, ending: progress.Failed) -> bool:
        """Whether the job ended because it was told to, by the runner's word or by its death."""
        if ending.failure.code == RUNNER_DIED:
            return (await self._store.get(job_id)).cancel_requested
        return ending.failure.code == "Cancelled"

    async def _release(self, job_id: str, worker: str) -> Job:
        return await self._store.release(
            job_id, worker=worker, reason="stopped before it was done", now=time.time()
        )


def _budget(byte_budget: int, failure: Failure | None) -> int:
    """Return the bytes in flight of the next try: fewer where the last ones ran out of memory."""
    if failure is None or not failure.crashes:
        return byte_budget
    return max(min(byte_budget, LEAST_BUDGET_BYTES), byte_budget >> failure.crashes)
