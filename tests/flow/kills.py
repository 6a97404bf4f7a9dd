"""A node whose processes are killed at named steps, and what must hold of it afterwards.

`steps/sitecustomize.py` names the steps and does the killing inside the process, `Hub.faults` does
it at requests; neither needs a hook in the code under test. A `Siege` feeds checkpoints to one node
while it is killed again and again, and `check` says what of the promises does not hold.
"""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.hub.local import xet
from ckptd.hub.local.traffic import Entry, Fault, Ledger
from ckptd.jobs.database import Database
from ckptd.jobs.job import TERMINAL, Job
from tests.flow.conftest import Deployment
from tests.flow.judgement import Figures, Judge
from tests.flow.kinds import Kind
from tests.flow.steps.arms import Steps

VARYING = re.compile(
    r"(?<=/ckptd/)[a-z]+-\d|[0-9a-f]{12,64}|(?<=/)\d+(?=/|$)|(?<=step-)\d+|(?<=pr%2F)\d+"
)
"""What differs between two requests of one kind: repos, hashes, numbers."""
REACH_JOBS = 2
"""Jobs a slot that are done from end to end before a step counts as one that does not come here."""
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


class Received(Ledger):
    """Every request so far, and which content was sent although the Hub had it."""

    def __init__(self, root: Path) -> None:
        super().__init__(_entries=deque())
        self._shards = root / "xet" / "shards"
        self._read: set[Path] = set()
        self._described: set[str] = set()
        self._sent: Counter[str] = Counter()
        self.resent: list[str] = []

    def add(self, entry: Entry) -> None:
        """Note a finished request; called on the Hub's own loop."""
        super().add(entry)
        if entry.status != 200:
            return
        if entry.method == "PUT":
            self._sent[entry.path] += 1
            if self._sent[entry.path] > 1:
                self.resent.append(f"{entry.path}: sent {self._sent[entry.path]} times")
        elif entry.path.endswith("/v1/shards"):
            for path in set(self._shards.glob("*.mdb")) - self._read:
                self._read.add(path)
                files = xet.read_shard(path.read_bytes())
                self._described |= {term.xorb for file in files for term in file.terms}
        elif entry.method == "POST" and (xorb := entry.path.rpartition("/")[2]) in self._described:
            self.resent.append(f"xorb {xorb}: sent again after its files were whole")


class Siege:
    """One node, its Hub, and the kills that befall it.

    Up to `slots` jobs run at a time. `generator` chooses among `kinds`, and among `transports` (True
    for Xet, False for LFS) at each start of the daemon.
    """

    def __init__(
        self,
        node: Deployment,
        kinds: Sequence[Kind],
        *,
        slots: int = 1,
        transports: Sequence[bool] = (False,),
        generator: random.Random | None = None,
    ) -> None:
        self.node = node
        self.kinds = kinds
        self.figures = Figures()
        self._slots = slots
        self._transports = transports
        self._uses_xet = transports[0]
        self._generator = generator or random.Random(0)
        self._steps = 0
        self._made = Steps(node.root)
        self._makers: dict[str, set[tuple[Kind, bool]]] = {}
        self._expected: dict[int, dict[str, str]] = {}
        self._staged: dict[tuple[str, str], tuple[int, int]] = {}
        self._fired = threading.Event()
        self._log_began = 0
        self._began_with_work: list[float] = []
        self._received = node.hub.traffic.ledger = Received(node.hub.root)
        for kind in kinds:
            kind.define(node)

    # What happens ---------------------------------------------------------------------------------

    def rehearse(self) -> None:
        """Let each kind be published once over each transport, and note which steps it makes."""
        for uses_xet in self._transports:
            self._uses_xet = uses_xet
            self.start()
            for kind in self.kinds:
                seen, received = len(self._made.lines()), len(self._received)
                self.feed(kind)
                self.node.wait_for_ended(self._steps)
                self.node.wait_for(self.node.clean)
                made = self._made.lines()[seen:]
                made += [kind_of(e.method, e.path) for e in list(self._received)[received:]]
                for step in made:
                    self._makers.setdefault(step, set()).add((kind, self._uses_xet))
            if uses_xet is not self._transports[-1]:
                assert self.node.stop() == 0

    def start(self) -> None:
        """Start the daemon and note how long it takes to get to work."""
        now = time.time()
        due = any(not job.state.terminal and (job.next_try_at or 0.0) < now for job in self._jobs())
        began = time.monotonic()
        self._launch()
        sign = "job started" if due else "daemon ready"
        self._wait(lambda: self._is_dead() or sign in self._log_of_this_life())
        if not self._is_dead():
            self.figures.recoveries_s.append(time.monotonic() - began)
            if due:
                self._began_with_work.append(began)

    def _launch(self) -> None:
        log_path = self.node.log_path
        self._log_began = log_path.stat().st_size if log_path.exists() else 0
        self.node.launch(
            CKPTD_SLOTS=str(self._slots),
            HF_HUB_DISABLE_XET=str(int(not self._uses_xet)),
            **self._made.environment,
        )

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

    def feed(self, kind: Kind) -> None:
        """Let the trainer save one more checkpoint."""
        self._steps += 1
        run = f"{kind.name}-{self._steps % self._slots}"
        folder = self.node.runs / run / f"checkpoint-{self._steps}"
        kind.save(folder, self._steps)
        self._expected[self._steps] = kind.made_of(folder, self.node)

    def suffer(self, kill: Kill) -> bool:
        """Arm `kill`, give the node work until it strikes, revive what died; False: it never came."""
        self._fired.clear()
        kinds = self._prepare(kill)
        self._arm(kill)
        deadline = time.monotonic() + REACH_S
        most = self._steps + REACH_JOBS * self._slots
        while not self._has_struck():
            if self._steps > most or time.monotonic() > deadline:
                self._disarm()
                self.figures.unreached.append(kill.name)
                if self._is_dead():  # it came at the last moment
                    self._bury("both")
                return False
            if not self._is_dead():
                self._feed_if_idle(kinds)
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
        self.figures.works_s = self._made.reached("runner ", self._began_with_work)
        self.figures.resent += self._received.resent
        judge = Judge(
            node=self.node, figures=self.figures, expected=self._expected, slots=self._slots
        )
        judge.judge(jobs)
        return self.figures

    def named_steps(self, role: str) -> list[str]:
        """Return the steps that daemon or runner have made so far, each once, in their order."""
        return [line for line in self._made.seen() if line.startswith(role)]

    def requests(self) -> list[str]:
        """Return the kinds of requests that the Hub has got so far."""
        return list(dict.fromkeys(kind_of(e.method, e.path) for e in self._received))

    # How it is done -------------------------------------------------------------------------------

    def _prepare(self, kill: Kill) -> list[Kind]:
        """Return the kinds that may lead to `kill`, with a daemon over whose transport it comes."""
        makers = self._makers.get(kill.label or kill.request or "")
        if not makers:
            return list(self.kinds)
        if all(uses_xet is not self._uses_xet for _, uses_xet in makers):
            self._uses_xet = not self._uses_xet
            assert self.node.stop() == 0
            self.start()
        return [kind for kind, uses_xet in makers if uses_xet is self._uses_xet]

    def _feed_if_idle(self, kinds: Sequence[Kind]) -> None:
        """Feed another checkpoint where a slot has nothing to do."""
        if self._steps - self._num_ended() < self._slots:
            self.feed(self._generator.choice(kinds))

    def _arm(self, kill: Kill) -> None:
        self._made.disarm()
        if kill.label is not None:
            self._made.arm(kill.label, "kill both" if kill.victim == "both" else "kill")
        elif kill.request is not None:
            self.node.hub.faults = functools.partial(self._at_request, kill)
        else:
            self._feed_if_idle(self.kinds)
            threading.Timer(kill.after_s, self._strike, (kill.victim,)).start()

    def _at_request(self, kill: Kill, request: Any) -> Fault | None:
        if kind_of(request.method, request.url.path) != kill.request or self._fired.is_set():
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
        if victim == "runner":
            self._look_at_staging()
            return
        assert self.node.process is not None
        self.node.process.wait(10)
        self._look_at_staging()
        self._uses_xet = self._generator.choice(self._transports)
        self.start()

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
        return self._asked(Database.list) or ()

    def _num_ended(self) -> int:
        counts = self._asked(Database.counts) or {}
        return sum(counts.get(state, 0) for state in TERMINAL)

    def _asked(self, question: Callable[[Database], Any]) -> Any:
        """Return what the job database says, None before it is there."""
        if not (self.node.state / "jobs.sqlite3").exists():
            return None
        try:
            with Database(self.node.state / "jobs.sqlite3", read_only=True) as database:
                return question(database)
        except Exception:  # noqa: BLE001 - killed between creating the file and its tables
            return None

    def _wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.node.log_path.read_text()[-6000:]
                raise AssertionError(f"never came true; the daemon's log:\n{log}")
            self._fired.wait(0.02)


def kind_of(method: str, path: str) -> str:
    """Return a request without what differs between two of one kind."""
    return f"{method} {VARYING.sub('*', path)}"
