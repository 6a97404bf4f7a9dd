"""SIGKILL at every named step and at any time: one commit each, right bytes, nothing left behind.

The suite strikes eight times; `CKPTD_KILLS=300` makes it the long run of the CI, and `-s` shows
its figures. `CKPTD_KILLS_SEED` chooses other moments.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

from tests.flow.conftest import Deployment
from tests.flow.kills import Kill, Siege

NUM_KILLS = int(os.environ.get("CKPTD_KILLS", "8"))
SEED = int(os.environ.get("CKPTD_KILLS_SEED", "0"))
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
)
"""Ends of steps of a first start, which do not come again on the same node."""
FIRST_PUSH = ("repos/create", "validate-yaml")
"""Requests that are made once for each repo."""
IDLE = ("(nothing)", "status.json")
"""Steps that a daemon makes all the time."""
RECOVERY_S = 5.0
"""From a restart to work, on a machine that has its cores to itself."""
JOB_S = 1.5
"""About what a job and the wait for it take: random moments are spread over this."""


def plan_of(siege: Siege, num_kills: int, generator: random.Random) -> Iterator[Kill]:
    """Yield kills at every named step and request, or some of them, then at random moments for ever."""
    named = [Kill(victim="daemon", label=step) for step in _steps(siege, "daemon")]
    for step in _steps(siege, "runner"):
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
    steps = [s for s in siege.named_steps() if s.startswith(role)]
    return [s for s in steps if not s.endswith(ONCE) and not any(idle in s for idle in IDLE)]


def _allowed_s() -> float:
    """Return the time that a restart may take with as many others on each core as there are now."""
    return RECOVERY_S * max(1.0, 1.5 * os.getloadavg()[0] / (os.cpu_count() or 1))


def test_killed_at_every_step_each_checkpoint_is_published_exactly_once(node: Deployment) -> None:
    """Whatever is killed, and when: nothing lost, doubled, torn, rewritten, sent again or left."""
    node.define()
    siege = Siege(node)
    siege.start()
    siege.feed()
    node.wait_for_ended(1)
    node.wait_for(node.clean)
    for kill in plan_of(siege, NUM_KILLS, random.Random(SEED)):
        if siege.suffer(kill) and siege.figures.kills % 25 == 0:
            print(siege.figures, flush=True)
        if siege.figures.kills == NUM_KILLS:
            break
    figures = siege.finish()
    print(f"\n{figures}", *figures.unreached, sep="\n  not reached: ")
    assert figures.faults == []
    assert len(figures.unreached) <= 0.05 * NUM_KILLS
    assert max(figures.recoveries_s) < _allowed_s()


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
    node.define()
    siege = Siege(node)
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
