"""The daemon's composition root: every part is made here, started in order and ended in order.

Start: lock the state folder, take back the leases of a daemon that was killed, remove what it left
behind, start runners, watch. Stop (SIGTERM, SIGINT): stop watching, stop taking jobs, stop the
runners (their finished shards stay), give back the leases. A second signal ends the process at
once; nothing is lost by it, for the next start takes up from any point.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import time
from pathlib import Path

import anyio
import structlog
from anyio import to_thread
from anyio.abc import TaskGroup, TaskStatus

from ckptd.checkpoint import writer
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.errors import SettingsError
from ckptd.jobs.job import Job
from ckptd.jobs.sqlite import SqliteStore
from ckptd.jobs.store import JobStore
from ckptd.pipeline.definition import Definition
from ckptd.service import credentials, limits, stopping, watchdog
from ckptd.service.admission import Admission, Caps
from ckptd.service.board import Board
from ckptd.service.definitions import Definitions
from ckptd.service.housekeeping import Janitor, PinLimits
from ckptd.service.identify import KnownBases
from ckptd.service.intake import Intake
from ckptd.service.notify import Notifier
from ckptd.service.pins import Pins
from ckptd.service.worker import Worker, WorkerOptions
from ckptd.settings import Settings
from ckptd.telemetry import node
from ckptd.telemetry.status import WatchStatus
from ckptd.watch import scan
from ckptd.watch.watcher import Watcher

log = structlog.get_logger()

RELOAD_S = 2.0
"""Seconds between two looks at the definitions folder."""
REPLACING_S = 120.0
"""How long the worker may take to replace a runner that hangs before the watchdog starves."""
FORGET_S = 86_400.0
"""Seconds between two looks for history that is too old."""


class Daemon:
    """One daemon with one state folder."""

    def __init__(self, settings: Settings, *, endpoint: str, notifier: Notifier) -> None:
        self._settings = settings
        self._notifier = notifier
        self._definitions = Definitions(settings.pipelines_dir)
        self._board = Board(endpoint=endpoint, slots=settings.slots)
        self._board.definitions = lambda: self._definitions.statuses
        self._board.watches = self._watch_statuses
        self._identity = ""
        self._bases = KnownBases(endpoint=settings.hub_endpoint)
        self._held = OpenFiles()
        self._watchers: dict[str, list[Watcher]] = {}
        self._scopes: dict[str, tuple[Definition, anyio.CancelScope]] = {}
        self._worker: Worker | None = None
        self._reload_asked = anyio.Event()
        caps = Caps(
            per_repo=settings.jobs_per_repo,
            per_device=settings.jobs_per_device,
            min_free_bytes=settings.min_free_bytes,
        )
        self._admission = Admission(caps, state_path=settings.state_dir)
        self._board.limits = lambda counts: limits.statuses(
            settings,
            counts=counts,
            caps=caps,
            found=self._admission.found,
            pins=self._board.pins(),
        )

    def reload(self) -> None:
        """Read the definitions again now."""
        self._reload_asked.set()

    async def drain(self) -> None:
        """Stop watching and taking jobs; return when those that run have ended or had their time.

        A daemon that is still starting has nothing to wait for.
        """
        self._notifier.stopping()
        if self._board.state != "running" or self._worker is None:
            return
        self._board.state = "stopping"
        for _, scope in self._scopes.values():
            scope.cancel()
        self._worker.drain()
        await stopping.drain(
            self._worker.ended,
            self._notifier,
            board=self._board,
            grace_s=self._settings.stop_grace,
        )

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started when everything that is defined is watched.

        Raises:
            SettingsError: another daemon has the state folder.
            StorageFailed: the state folder cannot be used.
        """
        settings = self._settings
        lock_fd = await to_thread.run_sync(_lock, settings.state_dir)
        try:
            self._identity = await to_thread.run_sync(_identity, settings.state_dir)
            store = await SqliteStore.open(settings.database_path)
            try:
                await self._serve(store, task_status)
            finally:
                with anyio.CancelScope(shield=True):
                    await store.aclose()
        finally:
            os.close(lock_fd)

    async def _serve(self, store: JobStore, task_status: TaskStatus[None]) -> None:
        janitor = await self._tidied(store)
        worker = self._worker = self._make_worker(store)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(worker.run)
                await self._apply(group, store, worker)
                group.start_soon(janitor.run)
                group.start_soon(self._reload, group, store, worker)
                self._board.state = "running"
                group.start_soon(self._feed_watchdog, store)
                group.start_soon(self._forget, store)
                group.start_soon(credentials.follow, store, worker.poke)
                group.start_soon(
                    self._board.publish, self._settings.state_dir, store, self._notifier.status
                )
                self._notifier.ready()
                log.info("daemon ready", definitions=list(self._definitions.in_use))
                task_status.started()
        finally:
            self._board.state = "stopping"
            self._notifier.stopping()
            log.info("daemon stopped")

    async def _tidied(self, store: JobStore) -> Janitor:
        """Take back what a daemon that was killed held, remove what it left behind."""
        reaped = await store.reap(now=time.time(), every=True)
        if reaped:
            log.info("jobs taken back", jobs=[job.job_id for job in reaped])
        await to_thread.run_sync(self._definitions.look)
        janitor = self._janitor(store)
        await janitor.sweep()
        return janitor

    def _make_worker(self, store: JobStore) -> Worker:
        settings = self._settings
        return Worker(
            name=f"{socket.gethostname()}:{os.getpid()}",
            store=store,
            board=self._board,
            options=WorkerOptions(
                state_path=settings.state_dir,
                slots=settings.slots,
                byte_budget=settings.byte_budget,
                num_threads=settings.threads,
                cache=settings.cache,
                staging=settings.staging,
                endpoint=settings.hub_endpoint,
                upload_limit=_share(settings.upload_limit, settings.slots),
                lease_s=settings.lease,
                limits=settings.retry_limits,
                stall_s=settings.stall_timeout,
                vanished=self._look_again,
                preload=lambda: self._definitions.computes,
                bounds=_bounds(settings),
                admit=self._admission.look,
            ),
        )

    def _look_again(self, job: Job) -> None:
        """A job's pin is gone: the trainer's folder may be there still."""
        for watcher in self._watchers.get(job.spec.pipeline, ()):
            watcher.rearm(Path(job.spec.source_path))

    async def _feed_watchdog(self, store: JobStore) -> None:
        await watchdog.feed(
            self._notifier,
            board=self._board,
            silence_s=self._settings.stall_timeout + REPLACING_S,
            answers=store.counts,
        )

    async def _forget(self, store: JobStore) -> None:
        while True:
            dropped = await store.forget(before=time.time() - self._settings.history)
            if dropped:
                log.info("old history dropped", rows=dropped)
            await anyio.sleep(FORGET_S)

    async def _reload(self, group: TaskGroup, store: JobStore, worker: Worker) -> None:
        while True:
            with anyio.move_on_after(RELOAD_S):
                await self._reload_asked.wait()
            asked = self._reload_asked.is_set()
            if asked and self._board.state != "running":
                return  # it stops: READY would say otherwise
            if asked:
                self._reload_asked = anyio.Event()
                self._notifier.reloading()
            changed = await to_thread.run_sync(self._definitions.look)
            if changed and self._board.state == "running":
                await self._apply(group, store, worker)
            if asked and self._board.state == "running":
                log.info("definitions reloaded", definitions=list(self._definitions.in_use))
                self._notifier.ready()

    async def _apply(self, group: TaskGroup, store: JobStore, worker: Worker) -> None:
        """Watch what the definitions in use say, and nothing else."""
        in_use = self._definitions.in_use
        for name, (definition, scope) in list(self._scopes.items()):
            if in_use.get(name) != definition:
                scope.cancel()
                del self._scopes[name]
                self._watchers.pop(name, None)
        if not in_use:
            log.warning("no definitions", folder=str(self._settings.pipelines_dir))
        for name, definition in in_use.items():
            if name not in self._scopes:
                scope = anyio.CancelScope()
                self._scopes[name] = (definition, scope)
                await group.start(self._follow, definition, scope, store, worker)

    async def _follow(
        self,
        definition: Definition,
        scope: anyio.CancelScope,
        store: JobStore,
        worker: Worker,
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run the intakes of one definition until it changes."""
        watchers = []
        followed = False
        with scope:
            async with anyio.create_task_group() as group:
                for watch, pins in zip(definition.watch, self._pins(definition), strict=True):
                    watcher = Watcher(
                        key=definition.pipeline,
                        pattern=watch.path,
                        settle_s=watch.settle,
                        scan_interval_s=self._settings.scan_interval,
                        network_scan_interval_s=self._settings.network_scan_interval,
                    )
                    watchers.append(watcher)
                    intake = Intake(
                        definition=definition,
                        watch=watch,
                        watcher=watcher,
                        pins=pins,
                        store=store,
                        bases=self._bases,
                        queued=worker.poke,
                        max_queued=self._settings.max_queued,
                    )
                    await group.start(intake.run)
                self._watchers[definition.pipeline] = watchers
                followed = True
                task_status.started()
        if not followed:  # the daemon stops while it starts to watch
            task_status.started()

    def _janitor(self, store: JobStore) -> Janitor:
        settings = self._settings
        janitor = Janitor(
            owner=self._identity,
            state_path=settings.state_dir,
            store=store,
            held=self._held,
            limits=PinLimits(max_bytes=settings.pin_limit, max_age_s=settings.pin_age),
            definitions=lambda: None if self._definitions.any_broken else self._definitions.in_use,
        )
        self._board.pins = lambda: janitor.status
        return janitor

    def _pins(self, definition: Definition) -> list[Pins]:
        return [
            Pins(
                owner=self._identity,
                pipeline=definition.pipeline,
                place=scan.parse(watch.path),
                state_path=self._settings.state_dir,
                held=self._held,
            )
            for watch in definition.watch
        ]

    def _watch_statuses(self) -> tuple[WatchStatus, ...]:
        return tuple(w.status for watchers in self._watchers.values() for w in watchers)


async def run_until_signal(daemon: Daemon) -> None:
    """Run `daemon` until SIGTERM or SIGINT; a second one ends the process at once.

    SIGHUP has the definitions read again.

    Raises:
        SettingsError, StorageFailed: see `Daemon.run`.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(_wait_for_signals, group, daemon)
        await daemon.run()


async def _wait_for_signals(group: TaskGroup, daemon: Daemon) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        told = False
        async for number in signals:
            if number == signal.SIGHUP:
                daemon.reload()
                continue
            if told:
                os._exit(128 + number)
            told = True
            log.info("stopping", signal=signal.Signals(number).name)
            group.start_soon(_end, group, daemon)


async def _end(group: TaskGroup, daemon: Daemon) -> None:
    await daemon.drain()
    group.cancel_scope.cancel()


def _share(limit: int | None, slots: int) -> int | None:
    return None if limit is None else max(1, limit // slots)


def _bounds(settings: Settings) -> tuple[str, ...]:
    """Return what a runner may take of the node, as options of `ckptd.runner`."""
    bounds = (f"--nice={settings.nice}", f"--io-priority={settings.io_priority}")
    if node.accelerators():  # what a GPU's driver maps for itself would count
        return bounds
    return (*bounds, f"--memory-bytes={settings.runner_memory}")


def _lock(state_path: Path) -> int:
    """Make the state folder ours alone; the lock lives as long as the descriptor.

    Raises:
        SettingsError: another daemon has it.
        StorageFailed: it cannot be written.
    """
    writer.make_folder(state_path)
    try:
        state_path.chmod(0o700)
        fd = os.open(state_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise writer.translated(error, state_path / "lock", 0) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise SettingsError(
            f"{state_path}: another ckptd daemon uses this state folder",
            hint="stop it, or give this one another state_dir",
        ) from error
    return fd


def _identity(state_path: Path) -> str:
    """Return what tells this state folder's daemons from others; made on the first start.

    Raises:
        StorageFailed: the state folder cannot be written.
    """
    path = state_path / "identity"
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text().strip("\0\n"):  # a crash of the machine may leave zeros
            return known
    identity = secrets.token_hex(8)
    writer.write_file(path, identity.encode())
    return identity
