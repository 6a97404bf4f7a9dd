"""Whom the roster lists: those that change at once, the quiet ones for next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.checkpoint import listing
from ckptd.checkpoint.listing import Listing
from ckptd.watch import roster as roster_module
from ckptd.watch.events import Events, Hints
from ckptd.watch.roster import FILES_SHARE, FOLDERS_SHARE, NUM_YOUNG, OPEN_SHARE, Roster, Told
from ckptd.watch.scan import Candidate
from ckptd.watch.settle import Change
from ckptd.watch.tree import Changes
from tests.watch.conftest import Clock, save

SETTLE_S = 10.0
COST_S = 0.01
"""What each listing costs on the clock of these tests."""


class Listed:
    """Counts listings by candidate, and makes each cost the same."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.cost_s = 0.0
        self.refused = False

    def list_files(self, path: Path) -> Listing:
        self.names.append(path.name)
        self.cost_s += COST_S
        if self.refused:
            raise errors.CheckpointRefused("may not be read by this user", path=path)
        return REAL_LIST_FILES(path)


REAL_LIST_FILES = listing.list_files


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Listed:
    counting = Listed()
    monkeypatch.setattr(listing, "list_files", counting.list_files)
    return counting


@pytest.fixture
def events(clock: Clock) -> Iterator[Events]:
    made = Events(place="/runs/*", clock=clock)
    yield made
    made.close()


@pytest.fixture
def roster(events: Events, clock: Clock, listed: Listed) -> Roster:
    return Roster(
        events, of_files=False, settle_s=SETTLE_S, clock=clock, cost_clock=lambda: listed.cost_s
    )


def follow(roster: Roster, folders: list[Path]) -> None:
    """Take in `folders` and list them all."""
    root = folders[0].parent
    candidates = {path: Candidate(path=path, root_path=root) for path in folders}
    roster.take_in(Changes(added=frozenset(folders)), candidates, ())
    roster.list_pending(most_s=60)


def all_quiet(roster: Roster, clock: Clock, folders: list[Path]) -> None:
    """Take in `folders`, all of them quiet, with nothing due for a while."""
    follow(roster, folders)
    clock.now += SETTLE_S
    roster.list_pending(most_s=60)
    assert roster.num_open == 0
    roster.patrol(clock.now, lost=False)
    roster.list_pending(most_s=60)


def saved(runs: Path, number: int) -> list[Path]:
    return [save(runs / "a" / f"checkpoint-{step}") for step in range(number)]


def changes(told: list[Told]) -> list[tuple[Change, str]]:
    return [(change, candidate.path.name) for change, candidate, _ in told]


def test_quiet_candidates_are_not_listed(
    roster: Roster, runs: Path, clock: Clock, listed: Listed
) -> None:
    """A full pass over quiet candidates lists none of them before their round is due."""
    all_quiet(roster, clock, saved(runs, 5))
    listed.names.clear()
    clock.now += COST_S / FILES_SHARE - 0.1
    assert roster.patrol(clock.now, lost=False) == []
    assert roster.list_pending(most_s=60) == []
    assert listed.names == []


def test_young_candidates_are_looked_at_in_every_pass(
    roster: Roster, runs: Path, clock: Clock, listed: Listed
) -> None:
    """A file that comes into a quiet folder is found by the next full pass, without any event."""
    folders = saved(runs, 5)
    all_quiet(roster, clock, folders)
    (folders[3] / "late.bin").touch()
    clock.now += 0.1
    roster.patrol(clock.now, lost=False)
    assert changes(roster.list_pending(most_s=60)) == [(Change.CHANGED, "checkpoint-3")]


def test_old_candidates_are_looked_at_as_their_share_allows(
    roster: Roster, runs: Path, clock: Clock, listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders of all candidates are compared when that costs no more than its share."""
    folders = saved(runs, NUM_YOUNG + 1)
    all_quiet(roster, clock, folders)
    has_moved = Roster._has_moved

    def costly(self: Roster, path: Path) -> bool:
        listed.cost_s += 5e-5
        return has_moved(self, path)

    monkeypatch.setattr(Roster, "_has_moved", costly)
    clock.now += 1
    roster.patrol(clock.now, lost=False)
    roster.list_pending(most_s=60)
    (folders[0] / "late.bin").touch()
    clock.now += (NUM_YOUNG + 1) * 5e-5 / FOLDERS_SHARE - 0.1
    roster.patrol(clock.now, lost=False)
    assert changes(roster.list_pending(most_s=60)) == []
    clock.now += 0.2
    roster.patrol(clock.now, lost=False)
    assert changes(roster.list_pending(most_s=60)) == [(Change.CHANGED, "checkpoint-0")]


def test_lost_events_are_made_up_for(
    roster: Roster, runs: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When events were lost all folders are compared at once, whatever that costs."""
    monkeypatch.setattr(roster_module, "NUM_YOUNG", 0)
    folders = saved(runs, 3)
    all_quiet(roster, clock, folders)
    roster._folders_round._pace.spent(clock.now, 1e9)
    (folders[0] / "late.bin").touch()
    roster.patrol(clock.now, lost=False)
    assert roster.list_pending(most_s=60) == []
    roster.patrol(clock.now, lost=True)
    assert changes(roster.list_pending(most_s=60)) == [(Change.CHANGED, "checkpoint-0")]


def test_round_finds_what_was_rewritten_in_place(
    roster: Roster, runs: Path, clock: Clock, listed: Listed
) -> None:
    """Writes that move no folder are found, one step of the round after the other, oldest last."""
    folders = saved(runs, 3)
    all_quiet(roster, clock, folders)
    for folder in folders:
        (folder / "model.safetensors").write_bytes(b"resumed")
    listed.names.clear()
    found = []
    for _ in range(3):
        clock.now += COST_S / FILES_SHARE
        found += changes(roster.patrol(clock.now, lost=False))
    assert len(listed.names) == 3
    assert {name for _, name in found} == {f"checkpoint-{step}" for step in range(3)}
    assert {change for change, _ in found} == {Change.CHANGED}


def test_open_candidates_are_listed_as_their_share_allows(
    roster: Roster, runs: Path, clock: Clock, listed: Listed
) -> None:
    """Candidates that change are listed in a full pass, but never all day; when due, always."""
    follow(roster, saved(runs, 5))
    listed.names.clear()
    clock.now += 1
    roster.patrol(clock.now, lost=False)
    roster.list_pending(most_s=60)
    assert listed.names == []
    clock.now += 5 * COST_S / OPEN_SHARE - 1
    roster.patrol(clock.now, lost=False)
    assert len(roster.list_pending(most_s=60)) == 5  # settled: they were due as well
    assert len(listed.names) == 5


def test_unreadable_candidate_is_never_due(
    roster: Roster, runs: Path, clock: Clock, listed: Listed
) -> None:
    """What cannot be listed is tried at its pace, not again and again because it is due."""
    folders = saved(runs, 1)
    follow(roster, folders)
    listed.refused = True
    clock.now += SETTLE_S
    assert roster.due_at() == clock.now
    assert roster.list_pending(most_s=60) == []
    assert roster.due_at() is None
    assert "may not be read" in roster.problems[folders[0]]
    listed.refused = False
    clock.now += COST_S / OPEN_SHARE
    roster.patrol(clock.now, lost=False)
    assert changes(roster.list_pending(most_s=60)) == [(Change.SETTLED, "checkpoint-0")]
    assert roster.problems == {}


def test_gone_between_two_passes_is_never_due(roster: Roster, runs: Path, clock: Clock) -> None:
    """A candidate that went before the next full pass is no reason to look until then."""
    [folder] = saved(runs, 1)
    follow(roster, [folder])
    (folder / "model.safetensors").unlink()
    folder.rmdir()
    clock.now += SETTLE_S
    assert roster.list_pending(most_s=60) == []
    assert roster.due_at() is None
    gone = Changes(removed=frozenset({folder}))
    assert changes(roster.take_in(gone, {}, ())) == [(Change.VANISHED, "checkpoint-0")]


def test_out_of_sight_is_not_gone(roster: Roster, runs: Path, clock: Clock) -> None:
    """Candidates under a folder that cannot be read are followed on, are never due, and come back."""
    folders = saved(runs, 2)
    follow(roster, folders)
    assert roster.take_in(Changes(removed=frozenset(folders)), {}, [runs / "a"]) == []
    assert roster.take_in(Changes(), {}, [runs / "a"]) == []
    assert roster.num_followed == 2
    clock.now += SETTLE_S
    assert roster.due_at() is None
    follow(roster, folders)
    assert (roster.num_followed, roster.num_open) == (2, 0)
    roster.take_in(Changes(removed=frozenset(folders)), {}, [runs / "a"])
    assert changes(roster.take_in(Changes(), {}, ())) == [
        (Change.VANISHED, "checkpoint-0"),
        (Change.VANISHED, "checkpoint-1"),
    ]


def test_hint_lists_its_candidate_alone(roster: Roster, runs: Path, clock: Clock) -> None:
    """An event in a folder of a candidate, however deep, makes that one be listed."""
    folders = saved(runs, 3)
    (folders[1] / "global_step1").mkdir()
    all_quiet(roster, clock, folders)
    (folders[1] / "global_step1" / "latest").touch()
    roster.hint(Hints(names={folders[1] / "global_step1": frozenset({"latest"})}))
    assert changes(roster.list_pending(most_s=60)) == [(Change.CHANGED, "checkpoint-1")]
    roster.hint(Hints(names={runs / "elsewhere": frozenset({"latest"})}))
    assert not roster.has_pending


def test_memory_of_a_quiet_candidate_has_one_size(roster: Roster, runs: Path, clock: Clock) -> None:
    """What is kept of a quiet candidate does not grow with its files."""
    folder = save(runs / "a" / "checkpoint-0")
    for number in range(100):
        (folder / f"model-{number}.safetensors").touch()
    all_quiet(roster, clock, [folder])
    followed = roster._followed[folder]
    print_ = followed.track.fingerprint
    assert (len(print_.content), len(print_.changes), len(followed.signatures)) == (16, 16, 1)


def test_remade_candidate_is_a_change(roster: Roster, runs: Path, clock: Clock) -> None:
    """A folder that was removed and made again with the same names is not taken for the old one."""
    [folder] = saved(runs, 1)
    all_quiet(roster, clock, [folder])
    folder.rename(folder.with_name("old"))
    save(folder)
    clock.now += 1
    roster.patrol(clock.now, lost=False)
    assert changes(roster.list_pending(most_s=60)) == [(Change.CHANGED, "checkpoint-0")]
