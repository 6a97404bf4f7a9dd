"""SIGKILL at every named step and at any time: one commit each, right bytes, nothing left behind.

The suite strikes eight times; `CKPTD_KILLS=300` makes it the long run of the CI, and `-s` shows
its figures. The long run has every kind of work at once (plain, as a pull request, resized and cast,
dequantized), several slots, and uploads over LFS and Xet; the short one has one kind that needs no
torch. `CKPTD_KILLS_SEED` chooses other kinds and moments.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
from collections.abc import Iterator

import pytest

from tests.flow.conftest import Deployment
from tests.flow.kills import Kill, Siege
from tests.flow.kinds import KINDS, PLAIN

NUM_KILLS = int(os.environ.get("CKPTD_KILLS", "8"))
SEED = int(os.environ.get("CKPTD_KILLS_SEED", "0"))
LONG = 50
"""Kills from which on a run has everything."""
LONGEST_KILL_S = 15.0
"""Between two kills of a long run, on a machine that is busy with other things, too."""
ONCE = (
    " state",
    "state/lock",
    "identity",
    "mkdir runs/.ckptd",
    "probe*",
    "probed*",
    "pins",
    "live",
    "state/work",
    "state/pins/*",
    ".ckptd-root",
    "/root",
)
"""Ends of steps of a first start, which do not come again on the same node."""
FIRST_PUSH = ("repos/create", "validate-yaml")
"""Requests that are made once for each repo."""
IDLE = ("(nothing)", "status.json")
"""Steps that a daemon makes all the time."""
TRANSPORTS = (False, True) if importlib.util.find_spec("hf_xet") else (False,)
"""Whether uploads go over Xet."""
RECOVERY_S = 5.0
"""From a restart to work, on a machine that has its cores to itself."""
JOB_S = 1.5
"""About what a job and the wait for it take: random moments are spread over this."""


def plan_of(siege: Siege, num_kills: int, generator: random.Random) -> Iterator[Kill]:
    """Yield kills at every named step and request, or some of them, then at random moments for ever."""
    named = [Kill(victim="daemon", label=step) for step in _steps(siege, "daemon ")]
    for step in _steps(siege, "runner "):
        named += [Kill(victim=victim, label=step) for victim in ("runner", "both")]
    asked = [
        Kill(victim=victim, request=request, done=done)
        for request in siege.requests()
        if not request.endswith(FIRST_PUSH)
        for done in (False, True)
        for victim in ("runner", "both")
    ]
    generator.shuffle(named)
    generator.shuffle(asked)
    if num_kills < len(named) + len(asked):
        share = max(1, num_kills // 4)
        named, asked = named[: num_kills - 2 * share], asked[:share]
    yield from named
    yield from asked
    for victim in itertools.cycle(("daemon", "runner")):
        yield Kill(victim=victim, after_s=generator.uniform(0.0, JOB_S))


def _steps(siege: Siege, role: str) -> list[str]:
    steps = siege.named_steps(role)
    return [s for s in steps if not s.endswith(ONCE) and not any(idle in s for idle in IDLE)]


def _drawn(node: Deployment, generator: random.Random) -> Siege:
    """Return a siege with everything, or a short one."""
    if NUM_KILLS >= LONG:
        slots = generator.choice((2, 3))
        return Siege(node, KINDS, slots=slots, transports=TRANSPORTS, generator=generator)
    kind = generator.choice([kind for kind in KINDS if not kind.computes])
    transports = [generator.choice(TRANSPORTS)]
    return Siege(node, [kind], transports=transports, generator=generator)


def _allowed_s() -> float:
    """Return the time that a restart may take with as many others on each core as there are now."""
    return RECOVERY_S * max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.timeout(max(300.0, LONGEST_KILL_S * NUM_KILLS))
def test_killed_at_every_step_each_checkpoint_is_published_exactly_once(node: Deployment) -> None:
    """Whatever is killed, and when: nothing lost, doubled, torn, rewritten, sent again or left."""
    generator = random.Random(SEED)
    siege = _drawn(node, generator)
    siege.rehearse()
    for kill in plan_of(siege, NUM_KILLS, generator):
        if siege.suffer(kill) and siege.figures.kills % 25 == 0:
            print(siege.figures, flush=True)
        if siege.figures.kills == NUM_KILLS:
            break
    figures = siege.finish()
    print(f"\n{figures}", *figures.unreached, sep="\n  not reached: ")
    assert figures.faults == []
    assert len(figures.unreached) <= 0.05 * NUM_KILLS
    assert max(figures.recoveries_s) < _allowed_s()
    if NUM_KILLS < LONG:  # else each runner imports torch first, several of them at once
        assert max(figures.works_s, default=0.0) < _allowed_s()


def test_killed_during_its_first_start_the_daemon_starts_all_the_same(
    node: Deployment,
) -> None:
    """State folder, lock, identity, database and pin folder may be left half-made by a kill."""
    steps = [
        "daemon open state/lock",
        "daemon rename state/identity",
        "daemon commit (nothing) state/jobs.sqlite3",
        "daemon committed (nothing) state/jobs.sqlite3",
    ]
    lazy = ["daemon link runs/.ckptd/.probed*", "runner mkdir state/work/*/out"]
    siege = Siege(node, [PLAIN])
    for step in steps:
        siege.die_at_start(Kill(victim="daemon", label=step))
    siege.start()
    for step in lazy:
        assert siege.suffer(
            Kill(victim="both" if step.startswith("runner") else "daemon", label=step)
        )
    figures = siege.finish()
    assert figures.kills == len(steps) + len(lazy)
    assert figures.faults == []
