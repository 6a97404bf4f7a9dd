"""The settle machine, against a model of what quiet means."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ckptd.checkpoint import listing
from ckptd.watch import settle
from ckptd.watch.settle import Change, Fingerprint, State, Track

QUIET_S = 10.0


def fingerprint(version: int) -> Fingerprint:
    return Fingerprint(content=b"%d" % version, changes=b"%d" % version, access=b"", num_links=1)


def play(observations: list[tuple[float, int | None]]) -> list[tuple[Change, ...]]:
    """Return what each observation (time, version or None for gone) means."""
    track: Track | None = None
    told = []
    for now, version in observations:
        track, changes = settle.observe(
            track, None if version is None else fingerprint(version), now=now, quiet_s=QUIET_S
        )
        told.append(changes)
    return told


def test_settles_once_after_the_quiet_period() -> None:
    """A candidate is seen at once, settles when it was quiet for long enough, and says so once."""
    assert play([(0, 1), (5, 1), (10, 1), (20, 1)]) == [
        (Change.SEEN,),
        (),
        (Change.SETTLED,),
        (),
    ]


def test_every_change_starts_the_quiet_period_again() -> None:
    """While files change nothing settles, however long it takes."""
    assert play([(0, 1), (9, 2), (18, 3), (27, 3), (28, 3)]) == [
        (Change.SEEN,),
        (Change.CHANGED,),
        (Change.CHANGED,),
        (),
        (Change.SETTLED,),
    ]


def test_rewritten_after_it_settled() -> None:
    """A resumed run that rewrites a settled folder makes it settle a second time."""
    told = play([(0, 1), (10, 1), (50, 2), (55, 2), (60, 2)])
    assert told == [(Change.SEEN,), (Change.SETTLED,), (Change.CHANGED,), (), (Change.SETTLED,)]


def test_gone_and_back() -> None:
    """A folder that was gone begins anew, also with the same content."""
    assert play([(0, 1), (10, 1), (11, None), (12, None), (13, 1)]) == [
        (Change.SEEN,),
        (Change.SETTLED,),
        (Change.VANISHED,),
        (),
        (Change.SEEN,),
    ]


def test_no_quiet_period() -> None:
    """With a quiet period of nothing, first sight settles."""
    track, changes = settle.observe(None, fingerprint(1), now=0.0, quiet_s=0.0)
    assert changes == (Change.SEEN, Change.SETTLED)
    assert track is not None
    assert settle.due_at(track, quiet_s=0.0) is None


def test_rearmed_candidate_settles_again() -> None:
    """Whoever could not use a settled candidate can ask to be told once more."""
    track, _ = settle.observe(None, fingerprint(1), now=0.0, quiet_s=0.0)
    assert track is not None
    again = settle.rearm(track, now=5.0)
    assert settle.due_at(again, quiet_s=QUIET_S) == 15.0
    _, changes = settle.observe(again, fingerprint(1), now=15.0, quiet_s=QUIET_S)
    assert changes == (Change.SETTLED,)


def seen(path: Path) -> Fingerprint:
    return settle.fingerprint_of(listing.list_files(path))


def test_writer_that_puts_the_times_back(tmp_path: Path) -> None:
    """Bytes that change under the same name, size and modification time are a change."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    before, times = seen(tmp_path), file.stat()
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 3) as mapped:
        mapped[:] = b"new"
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = seen(tmp_path)
    assert after.content == before.content
    assert not after.is_quiet_since(before)


def test_hard_links_are_no_writing(tmp_path: Path) -> None:
    """Our own pin moves a file's change time, and the quiet period goes on."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    before = seen(folder)
    (tmp_path / "pin").hardlink_to(folder / "model.safetensors")
    pinned = seen(folder)
    assert pinned != before
    assert pinned.is_quiet_since(before)
    track, _ = settle.observe(None, before, now=0.0, quiet_s=QUIET_S)
    track, changes = settle.observe(track, pinned, now=5.0, quiet_s=QUIET_S)
    assert changes == ()
    os.utime(
        folder / "model.safetensors", ns=(0, (folder / "model.safetensors").stat().st_mtime_ns)
    )
    _, changes = settle.observe(track, seen(folder), now=10.0, quiet_s=QUIET_S)
    assert changes == (Change.CHANGED,)  # compared with the pinned state, not with the first


def test_who_may_read_it_is_told_from_a_link_of_ours(tmp_path: Path) -> None:
    """A pin's link goes and the mode changes between two looks: that is a change all the same."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    os.link(folder / "model.safetensors", folder.parent / "pinned")
    before = seen(folder)
    (folder.parent / "pinned").unlink()
    unpinned = seen(folder)
    assert unpinned.is_quiet_since(before)
    (folder / "model.safetensors").chmod(0o640)
    assert not seen(folder).is_quiet_since(before)
    assert not seen(folder).is_quiet_since(unpinned)


@given(
    st.lists(st.tuples(st.floats(0, 15), st.none() | st.integers(0, 2)), min_size=1, max_size=30)
)
def test_what_is_told_agrees_with_the_observations(steps: list[tuple[float, int | None]]) -> None:
    """Settled is said exactly when the version stood for the quiet period and was not said yet."""
    track: Track | None = None
    now = 0.0
    version_before: int | None = None
    since = 0.0
    said = False
    for pause, version in steps:
        now += pause
        track, changes = settle.observe(
            track, None if version is None else fingerprint(version), now=now, quiet_s=QUIET_S
        )
        if version != version_before:
            since, said = now, False
        expect_settled = version is not None and not said and now - since >= QUIET_S
        said = said or expect_settled
        assert (Change.SETTLED in changes) == expect_settled
        assert (Change.SEEN in changes) == (version is not None and version_before is None)
        assert (Change.VANISHED in changes) == (version is None and version_before is not None)
        assert (Change.CHANGED in changes) == (
            None not in (version, version_before) and version != version_before
        )
        assert (track is None) == (version is None)
        if track is not None:
            assert (track.state is State.SETTLED) == said
        version_before = version
