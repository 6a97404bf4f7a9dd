"""The daemon's composition root: every part is made here, started in order and ended in order.

Start: lock the state folder, take back the leases of a daemon that was killed, remove what it left
behind, start runners, watch. Stop (SIGTERM, SIGINT): stop watching, stop taking jobs, stop the
runners (their finished shards stay), give back the leases. A second signal ends the process at
once; nothing is lost by it, for the next start takes up from any point.
"""

from __future__ import annotations

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
from ckptd.jobs.sqlite import SqliteStore
from ckptd.jobs.store import JobStore
from ckptd.pipeline.definition import Definition
from ckptd.service.board import Board
from ckptd.service.definitions import Definitions
from ckptd.service.housekeeping import Janitor, PinLimits
from ckptd.service.identify import KnownBases
from ckptd.service.intake import Intake
from ckptd.service.notify import Notifier
from ckptd.service.pins import Pins
from ckptd.service.worker import Worker, WorkerOptions
from ckptd.settings import Settings
from ckptd.telemetry.status import WatchStatus
from ckptd.watch import scan
from ckptd.watch.watcher import Watcher

log = structlog.get_logger()

RELOAD_S = 2.0
"""Seconds between two looks at the definitions folder."""


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
        settings = self._settings
        reaped = await store.reap(now=time.time(), every=True)
        if reaped:
            log.info("jobs taken back", jobs=[job.job_id for job in reaped])
        await to_thread.run_sync(self._definitions.look)
        await (janitor := self._janitor(store)).sweep(await store.list())
        worker = Worker(
            name=f"{socket.gethostname()}:{os.getpid()}",
            store=store,
            board=self._board,
            options=WorkerOptions(
                state_path=settings.state_dir,
                slots=settings.slots,
                byte_budget=settings.byte_budget,
                num_threads=settings.threads,
                cache=settings.cache,
                endpoint=settings.hub_endpoint,
                lease_s=settings.lease,
                limits=settings.retry_limits,
                preload=lambda: self._definitions.computes,
            ),
        )
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(worker.run)
                await self._apply(group, store, worker)
                group.start_soon(janitor.run)
                group.start_soon(self._reload, group, store, worker)
                self._board.state = "running"
                group.start_soon(
                    self._board.publish, settings.state_dir, store, self._notifier.status
                )
                self._notifier.ready()
                log.info("daemon ready", definitions=list(self._definitions.in_use))
                task_status.started()
        finally:
            self._board.state = "stopping"
            self._notifier.stopping()
            log.info("daemon stopped")

    async def _reload(self, group: TaskGroup, store: JobStore, worker: Worker) -> None:
        while True:
            await anyio.sleep(RELOAD_S)
            if await to_thread.run_sync(self._definitions.look):
                await self._apply(group, store, worker)

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
                    )
                    await group.start(intake.run)
                self._watchers[definition.pipeline] = watchers
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

    Raises:
        SettingsError, StorageFailed: see `Daemon.run`.
    """
    async with anyio.create_task_group() as group:
        group.start_soon(_wait_for_signals, group)
        await daemon.run()


async def _wait_for_signals(group: TaskGroup) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        stopping = False
        async for number in signals:
            if stopping:
                os._exit(128 + number)
            stopping = True
            log.info("stopping", signal=signal.Signals(number).name)
            group.cancel_scope.cancel()


def _lock(state_path: Path) -> int:
    """Make the state folder ours alone; the lock lives as long as the descriptor."""
    writer.make_folder(state_path)
    state_path.chmod(0o700)
    fd = os.open(state_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
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
    try:
        return path.read_text()
    except FileNotFoundError:
        pass
    identity = secrets.token_hex(8)
    writer.write_file(path, identity.encode())
    return identity
