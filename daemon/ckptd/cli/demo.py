"""`ckptd demo`: everything at once on embedded defaults, with nothing simulated.

A loopback Hub and the daemon run in this process, a real training run in another one. The trainer
keeps one checkpoint and deletes the one before; the daemon publishes each of them, with a card, a
tag and a pull request. No network, no token, no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import anyio
from anyio import to_thread
from anyio.streams.buffered import BufferedByteReceiveStream

from ckptd import errors, units
from ckptd import settings as settings_module
from ckptd.cli.output import Output
from ckptd.hub.local import server
from ckptd.jobs.database import Database
from ckptd.jobs.job import Job, State
from ckptd.service.daemon import Daemon
from ckptd.service.notify import Notifier
from ckptd.settings import Settings
from ckptd.telemetry import logs
from ckptd.telemetry.status import DaemonStatus

RUN_NAME = "tiny-llama"
PATIENCE_S = 120.0
"""How long the demo waits for the daemon after training has ended."""
_LOOK_S = 0.25
_MAX_LINE_BYTES = 1 << 16
_DEFINITION = """\
pipeline: demo
watch:
  - path: {runs}/*/checkpoint-*
    settle: 1s
stages:
  - tie
  - resize: {{pad_to_multiple_of: 64}}
  - footprint: {{max: 1GB}}
  - reshard: {{max_shard_size: 500KB}}
push:
  repo_id: "ckptd/{{run}}"
  create_pr: true
  commit_message: "{{run}} at step {{step}}"
  tags: [ckptd, demo]
  git_tag: "step-{{step}}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One line of the demo's result."""

    checkpoint: str
    digest: str
    shards: int
    commit: str
    pull_request: str
    git_tag: str
    seconds: float


def demo(output: Output, *, keep: bool) -> None:
    """Run the demo, in a new folder that stays.

    Raises:
        CkptdError: a part could not start, or a checkpoint was not published; maybe in a group.
    """
    root_path = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
    with (root_path / "daemon.log").open("w") as log_file:
        anyio.run(functools.partial(_demo, root_path, output, log_file, keep=keep))


async def _demo(root_path: Path, output: Output, log_file: TextIO, *, keep: bool) -> None:
    logs.configure(log_file, output="console", level="debug")
    output.talk(f"everything is in {root_path}, the daemon's log in daemon.log there")
    async with anyio.create_task_group() as group:
        hub: server.Running = await group.start(
            functools.partial(server.serve, root=root_path / "hub")
        )
        output.talk(f"loopback Hub on {hub.url}")
        settings = _settings(root_path, hub)
        daemon = Daemon(settings, endpoint=hub.url, notifier=Notifier(""))
        await group.start(daemon.run)
        output.talk(f"daemon watches {root_path}/runs/*/checkpoint-*")
        jobs = await _train_and_wait(root_path, settings, output)
        published = [_published(job) for job in jobs]
        _show(published, hub, root_path, output)
        if keep:
            output.talk("everything keeps running; press Ctrl-C to end it")
            await anyio.sleep_forever()
        group.cancel_scope.cancel()
    output.talk(f"look again later: ckptd hub serve --root {root_path / 'hub'}")


def _settings(root_path: Path, hub: server.Running) -> Settings:
    """Return the daemon's settings, and set what runner processes take from the environment."""
    (root_path / "runs").mkdir()
    definitions_path = root_path / "pipelines.d"
    definitions_path.mkdir()
    (definitions_path / "demo.yaml").write_text(_DEFINITION.format(runs=root_path / "runs"))
    os.environ.update(
        HF_ENDPOINT=hub.url,
        HF_TOKEN=hub.token,
        HF_HOME=str(root_path / "hf-home"),
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    return settings_module.load(
        overrides={
            "state_dir": root_path / "state",
            "pipelines_dir": definitions_path,
            "hub_endpoint": hub.url,
            "scan_interval": 1.0,
        }
    )


async def _train_and_wait(root_path: Path, settings: Settings, output: Output) -> Sequence[Job]:
    """Start the training run; return its jobs once each checkpoint has one that has ended."""
    run_path = root_path / "runs" / RUN_NAME
    command = [sys.executable, "-m", "ckptd.cli.demo_training", str(run_path)]
    saved: list[int] = []
    began = time.monotonic()
    async with await anyio.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=None
    ) as trainer:
        output.talk("training starts (torch takes a few seconds to import)")
        async with anyio.create_task_group() as group:
            told = _Teller(settings, output)
            group.start_soon(told.run)
            assert trainer.stdout is not None
            lines = BufferedByteReceiveStream(trainer.stdout)
            with contextlib.suppress(anyio.IncompleteRead):
                while True:
                    step = json.loads(await lines.receive_until(b"\n", _MAX_LINE_BYTES))
                    saved.append(step["step"])
                    output.talk(f"trainer: step {step['step']} saved, loss {step['loss']:.2f}")
            if await trainer.wait() != 0:
                raise errors.UsageError(
                    "the demo's training run failed", hint=f"see above and {root_path}"
                )
            output.talk(f"training took {units.format_duration(time.monotonic() - began)}")
            jobs = await _wait(settings, len(saved), root_path)
            group.cancel_scope.cancel()
    return jobs


async def _wait(settings: Settings, wanted: int, root_path: Path) -> Sequence[Job]:
    with anyio.move_on_after(PATIENCE_S):
        while True:
            jobs = await to_thread.run_sync(_jobs, settings)
            if len(jobs) >= wanted and all(job.state.terminal for job in jobs):
                break
            await anyio.sleep(_LOOK_S)
    unpublished = [job for job in jobs if job.state is not State.PUBLISHED]
    if unpublished or len(jobs) < wanted:
        why = "; ".join(
            f"{job.spec.name} is {job.state.value}: {job.reason}" for job in unpublished
        )
        raise errors.CheckFailed(
            f"{len(jobs) - len(unpublished)} of {wanted} checkpoints were published. {why}",
            check="demo",
            hint=f"the daemon's log is {root_path / 'daemon.log'}",
        )
    return jobs


def _jobs(settings: Settings) -> Sequence[Job]:
    with Database(settings.database_path, read_only=True) as database:
        return database.list()


class _Teller:
    """Says what the daemon does, once for each change."""

    def __init__(self, settings: Settings, output: Output) -> None:
        self._path = settings.state_dir / "status.json"
        self._settings = settings
        self._output = output
        self._told: dict[str, str] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await to_thread.run_sync(self._look)
            await anyio.sleep(_LOOK_S)

    def _look(self) -> None:
        for job in _jobs(self._settings):
            if job.state is not State.RUNNING:
                self._tell(job.spec.name, job.state.value)
        try:
            status = DaemonStatus.from_json(self._path.read_bytes())
        except (OSError, ValueError):
            return
        for running in status.jobs:
            uploaded = running.counters.uploaded
            share = f", {uploaded.share:.0%} uploaded" if uploaded.done_bytes else ""
            self._tell(running.name, f"{running.phase.value}{share}")

    def _tell(self, name: str, what: str) -> None:
        if self._told.get(name) not in (what, State.PUBLISHED.value):
            self._told[name] = what
            self._output.talk(f"daemon:  {name}: {what}")


def _published(job: Job) -> Published:
    outcome = job.outcome
    assert outcome is not None
    return Published(
        checkpoint=f"{job.spec.run}/{job.spec.name}",
        digest=job.spec.content_digest.removeprefix("sha256:")[:12],
        shards=outcome.num_shards,
        commit=outcome.commit or "",
        pull_request=outcome.pr_url or "",
        git_tag=outcome.git_tag or "",
        seconds=round(outcome.duration_s, 2),
    )


def _show(
    published: Sequence[Published], hub: server.Running, root_path: Path, output: Output
) -> None:
    if output.as_json:
        output.value({"hub": hub.url, "root": root_path, "published": published})
        return
    output.table(
        ("checkpoint", "digest", "shards", "commit", "pull request", "tag", "seconds"),
        [
            (
                line.checkpoint,
                line.digest,
                str(line.shards),
                line.commit[:10],
                line.pull_request.removeprefix(hub.url + "/"),
                line.git_tag,
                f"{line.seconds:.2f}",
            )
            for line in published
        ],
        right=("shards", "seconds"),
    )
    output.data(f"\nlook at it: {hub.url}/ckptd/{RUN_NAME}")
