"""A node whose processes are killed at named steps, and what must hold of it afterwards.

`steps/sitecustomize.py` names the steps and does the killing inside the process, `Hub.faults` does
it at requests; neither needs a hook in the code under test. A `Siege` feeds checkpoints to one node
while it is killed again and again, and `check` says what of the promises does not hold.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from ckptd.hub.local.traffic import Fault
from ckptd.jobs.database import Database
from ckptd.jobs.job import Job, State
from ckptd.jobs.store import Moment
from ckptd.pipeline import definition
from ckptd.runner import job as runner_job
from tests.flow.conftest import Deployment, write_checkpoint
from tests.flow.steps.arms import Steps

PROGRAM = re.compile(r"[0-9a-f]{12,64}|(?<=/)\d+(?=/|$)|(?<=step-)\d+")
"""What differs between two requests of one kind."""
REACH_JOBS = 2
"""Jobs that are done from end to end before a step counts as one that does not come here."""
REACH_S = 120.0
"""The same in seconds, where nothing gets done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One death: at a step (`label`), at a request (`request`), or at a moment (`after_s`)."""

    victim: str
    """`daemon`, `runner` or `both`."""
    label: str | None = None
    request: str | None = None
    done: bool = False
    """Of a request: whether the Hub does the work, and only the answer is lost."""
    after_s: float = 0.0

    @property
    def name(self) -> str:
        """What it is in a report."""
        at = self.label or self.request or f"{self.after_s:.2f} s"
        return f"{self.victim} at {at}{' (done)' if self.done else ''}"


@dataclass(slots=True, kw_only=True)
class Figures:
    """What happened in a siege."""

    kills: int = 0
    by_victim: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    """From the start of a daemon to work: a job of before started, or ready where there is none."""
    jobs: int = 0
    attempts: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    resent: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    untrue: list[str] = field(default_factory=list)
    """Lines of a job's history that do not tell what happened."""

    @property
    def faults(self) -> list[str]:
        """Every promise that was broken."""
        named = ("lost", "doubled", "torn", "rewritten", "resent", "left", "untrue")
        return [f"{name}: {text}" for name in named for text in getattr(self, name)]

    def __str__(self) -> str:
        slowest = max(self.recoveries_s, default=0.0)
        median = sorted(self.recoveries_s)[len(self.recoveries_s) // 2] if self.recoveries_s else 0
        broken = {n: len(getattr(self, n)) for n in ("lost", "doubled", "torn", "rewritten")}
        broken |= {n: len(getattr(self, n)) for n in ("resent", "left", "untrue")}
        return (
            f"{self.kills} kills ({dict(self.by_victim)}), {self.jobs} jobs, {self.attempts} tries; "
            f"{broken}; back at work after {median:.2f} s (slowest {slowest:.2f} s of "
            f"{len(self.recoveries_s)} starts); {len(self.unreached)} steps not reached"
        )


class Siege:
    """One node, its Hub, and the kills that befall it."""

    def __init__(self, node: Deployment) -> None:
        self.node = node
        self.figures = Figures()
        self._steps = 0
        self._made = Steps(node.root)
        self._expected: dict[int, dict[str, str]] = {}
        self._staged: dict[tuple[str, str], tuple[int, int]] = {}
        self._fired = threading.Event()
        self._log_began = 0

    # What happens ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemon and note how long it takes to get to work."""
        unfinished = [job for job in self._jobs() if not job.state.terminal]
        due = bool(unfinished) and (unfinished[0].next_try_at or 0.0) < time.time()
        began = time.monotonic()
        self._launch()
        sign = "job started" if due else "daemon ready"
        self._wait(lambda: self._is_dead() or sign in self._log_of_this_life())
        if not self._is_dead():
            self.figures.recoveries_s.append(time.monotonic() - began)

    def _launch(self) -> None:
        log_path = self.node.log_path
        self._log_began = log_path.stat().st_size if log_path.exists() else 0
        self.node.launch(**self._made.environment)

    def _log_of_this_life(self) -> str:
        return self.node.log_path.read_bytes()[self._log_began :].decode()

    def die_at_start(self, kill: Kill) -> None:
        """Start the daemon, to be killed before it is ready."""
        self._arm(kill)
        self._launch()
        self._wait(self._is_dead)
        assert self._has_struck()
        self._disarm()
        self.figures.kills += 1

    def feed(self) -> None:
        """Let the trainer save one more checkpoint."""
        self._steps += 1
        folder = self.node.runs / "run" / f"checkpoint-{self._steps}"
        write_checkpoint(folder, self._steps, rows=300)
        self._expected[self._steps] = made_of(folder, self.node.definitions / "publish.yaml")

    def suffer(self, kill: Kill) -> bool:
        """Arm `kill`, give the node work until it strikes, revive what died; False: it never came."""
        self._fired.clear()
        self._arm(kill)
        deadline = time.monotonic() + REACH_S
        most = self._steps + REACH_JOBS
        while not self._has_struck():
            if self._steps > most or time.monotonic() > deadline:
                self._disarm()
                self.figures.unreached.append(kill.name)
                if self._is_dead():  # it came at the last moment
                    self._bury("both")
                return False
            if not any(not job.state.terminal for job in self._jobs()) and not self._is_dead():
                self._feed_if_taken()
            self._fired.wait(0.02)
        self._disarm()
        self.figures.kills += 1
        self.figures.by_victim[kill.victim] += 1
        self._bury(kill.victim)
        return True

    def finish(self) -> Figures:
        """Let everything be done in peace, and return what is true then."""
        self._disarm()
        jobs = self.node.wait_for_ended(self._steps)
        self.node.wait_for(self.node.clean)
        assert self.node.stop() == 0
        self._judge(jobs)
        return self.figures

    def named_steps(self) -> list[str]:
        """Return the steps that daemon and runner have made so far, each once, in their order."""
        return self._made.seen()

    def requests(self) -> list[str]:
        """Return the kinds of requests that the Hub has got so far."""
        kinds = (f"{e.method} {PROGRAM.sub('*', e.path)}" for e in self.node.hub.ledger)
        return list(dict.fromkeys(kinds))

    # How it is done -------------------------------------------------------------------------------

    def _feed_if_taken(self) -> None:
        """Feed another checkpoint once those before have become jobs."""
        if len(self._jobs()) >= self._steps:
            self.feed()

    def _arm(self, kill: Kill) -> None:
        self._made.disarm()
        if kill.label is not None:
            self._made.arm(kill.label, "kill both" if kill.victim == "both" else "kill")
        elif kill.request is not None:
            self.node.hub.faults = functools.partial(self._at_request, kill)
        else:
            self._feed_if_taken()
            threading.Timer(kill.after_s, self._strike, (kill.victim,)).start()

    def _at_request(self, kill: Kill, request: Any) -> Fault | None:
        kind = f"{request.method} {PROGRAM.sub('*', request.url.path)}"
        if kind != kill.request or self._fired.is_set():
            return None
        self._strike(kill.victim)
        return Fault.LOSE_ANSWER if kill.done else Fault.DROP

    def _strike(self, victim: str) -> None:
        """Kill from outside; a runner that is not there at the moment was spared."""
        assert self.node.process is not None
        pids = self.node.runner_pids() if victim != "daemon" else []
        if victim != "runner":
            self.node.process.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._fired.set()

    def _has_struck(self) -> bool:
        return self._fired.is_set() or self._made.fired.exists()

    def _disarm(self) -> None:
        self.node.hub.faults = None
        self._made.disarm()

    def _bury(self, victim: str) -> None:
        """Look at what a death left, and start the daemon again where it is gone."""
        if victim != "runner":
            assert self.node.process is not None
            self.node.process.wait(10)
            self._look_at_staging()
            self.start()
        else:
            self._look_at_staging()

    def _look_at_staging(self) -> None:
        """Finished shards must be the very files that they were at an earlier look."""
        for job_id, path in self._staged_shards():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # published meanwhile
            stamp = (stat.st_ino, stat.st_mtime_ns)
            before = self._staged.setdefault((job_id, path.name), stamp)
            if before != stamp:
                self.figures.rewritten.append(f"{job_id}/{path.name}: {before} then {stamp}")

    def _staged_shards(self) -> Iterator[tuple[str, Path]]:
        for path in (self.node.state / "work").glob("*/out/*.safetensors"):
            if not path.name.startswith("."):
                yield path.parent.parent.name, path

    def _is_dead(self) -> bool:
        return self.node.process is None or self.node.process.poll() is not None

    def _jobs(self) -> Sequence[Job]:
        if not (self.node.state / "jobs.sqlite3").exists():
            return ()
        try:
            return self.node.jobs()
        except Exception:  # noqa: BLE001 - killed between creating the file and its tables
            return ()

    def _wait(self, condition: Any, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.node.log_path.read_text()[-6000:]
                raise AssertionError(f"never came true; the daemon's log:\n{log}")
            self._fired.wait(0.02)

    # What must hold -------------------------------------------------------------------------------

    def _judge(self, jobs: Sequence[Job]) -> None:
        figures = self.figures
        figures.jobs, figures.attempts = len(jobs), sum(job.attempt for job in jobs)
        steps = Counter(job.spec.step for job in jobs)
        figures.lost += [f"step {s}: no job" for s in self._expected if s not in steps]
        figures.doubled += [f"step {s}: {n} jobs" for s, n in steps.items() if n > 1]
        ids = Counter(re.findall(r"ckptd-push-id: *(\S+)", "\n".join(self.node.commits())))
        figures.doubled += [f"push {i}: {n} commits" for i, n in ids.items() if n > 1]
        if len(ids) != len(jobs):
            figures.lost.append(f"{len(jobs)} jobs but {len(ids)} pushes on the branch")
        with Database(self.node.state / "jobs.sqlite3", read_only=True) as database:
            for job in jobs:
                figures.untrue += untruths(job, database.history(job.job_id))
                figures.torn += self._torn(job)
        if figures.attempts - len(jobs) > figures.kills:
            figures.untrue.append(f"{figures.attempts} tries of {len(jobs)} jobs")
        puts = Counter(e.path for e in self.node.hub.ledger.find("PUT") if e.status == 200)
        figures.resent += [f"{path}: sent {n} times" for path, n in puts.items() if n > 1]
        figures.left += [str(path) for path in self._leftovers()]

    def _torn(self, job: Job) -> list[str]:
        """What of the published model is not what a job in peace makes."""
        if job.state is not State.PUBLISHED or job.outcome is None:
            self.figures.lost.append(f"step {job.spec.step}: {job.state.value}: {job.reason}")
            return []
        assert job.spec.step is not None
        api = HfApi(endpoint=self.node.hub.url, token=self.node.hub.token)
        files = api.list_repo_tree("ckptd/run", revision=f"step-{job.spec.step}", recursive=True)
        found = {f.path: f for f in files if isinstance(f, RepoFile)}
        wrong = []
        for name, sha256 in self._expected[job.spec.step].items():
            file = found.get(name)
            if file is None:
                wrong.append(f"step {job.spec.step}: {name} is not there")
            elif sha256 not in (file.lfs.sha256 if file.lfs else None, file.blob_id):
                wrong.append(f"step {job.spec.step}: {name} differs")
        weights = {name for name in found if name.endswith(".safetensors")}
        if extra := weights - self._expected[job.spec.step].keys():
            wrong.append(f"step {job.spec.step}: {extra} too much")
        return wrong

    def _leftovers(self) -> Iterator[Path]:
        """Files of ours that nobody needs: all but database, identity, lock, status and known roots."""
        kept = {"lock", "identity", "status.json", "jobs.sqlite3", "root"}
        for folder in (self.node.state, self.node.runs / ".ckptd"):
            for path in folder.rglob("*"):
                if path.is_file() and path.name not in kept and "sqlite3-" not in path.name:
                    yield path


def made_of(folder: Path, definition_path: Path) -> dict[str, str]:
    """Return name -> sha256 of the weights, git id of config and index, as a job in peace makes."""
    work = runner_job.Work(
        checkpoint_path=folder,
        name=folder.name,
        run=folder.parent.name,
        layout="auto",
        definition=definition.load_definition(definition_path),
        content_digest=None,
        fingerprint=None,
        pipeline_digest="",
        work_path=folder.parents[2] / "expected" / folder.name,
        output_path=None,
        push=False,
        endpoint=None,
        within=None,
        byte_budget=64_000_000,
        num_threads=1,
    )
    anyio.run(functools.partial(runner_job.execute, work, report=lambda _: None))
    made = {}
    for path in (work.work_path / "out").iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            made[path.name] = hashlib.sha256(content).hexdigest()
        elif path.name in {"config.json", "model.safetensors.index.json"}:
            blob = b"blob %d\0" % len(content) + content
            made[path.name] = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    return made


def untruths(job: Job, history: Sequence[Moment]) -> list[str]:
    """Return what of `history` cannot have happened, or does not say why."""
    wrong = []
    told = [(moment.state, moment.attempt) for moment in history]
    if told[0] != (State.QUEUED, 1):
        wrong.append(f"begins with {told[0]}")
    if told[-1] != (job.state, job.attempt):
        wrong.append(f"ends with {told[-1]}, the job is {job.state} at {job.attempt}")
    for before, after in itertools.pairwise(history):
        step = after.attempt - before.attempt
        match before.state, after.state:
            case (State.QUEUED | State.RETRYING, State.RUNNING) if step == 0:
                continue
            case (State.RUNNING, State.PUBLISHED) if step == 0:
                continue
            case (State.RUNNING, State.QUEUED) if step == 1 and "was lost" in (after.reason or ""):
                continue
            case (State.RUNNING, State.RETRYING) if step == 1 and after.reason:
                continue
        wrong.append(f"{before.state.value} {before.attempt} then {after.state.value} "
                     f"{after.attempt} ({after.reason})")  # fmt: skip
    return [f"{job.job_id}: {text}" for text in wrong]
