"""What `ckptd bench` measures: limits that are real, jobs that are whole, shares that add up."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ckptd.bench import limits, measure, timeline
from ckptd.bench.child import Sample
from ckptd.bench.limits import Limit
from ckptd.bench.measure import Measured, Resource
from ckptd.cli import main


def _job(*samples: Sample, seconds: float = 2.0) -> Measured:
    return Measured(
        name="a <job>",
        seconds=seconds,
        start_s=0.5,
        peak_bytes=1,
        resources=(
            Resource(name="disk", nbytes=100, seconds=1.5),
            Resource(name="memory", nbytes=100, seconds=0.5),
        ),
        samples=samples,
    )


def _sample(at_s: float, *, read: int = 0, written: int = 0) -> Sample:
    return Sample(at_s=at_s, read=read, computed=0, written=written, uploaded=0)


def test_the_limits_of_a_disk_are_positive_and_leave_nothing(tmp_path: Path) -> None:
    """Whatever the file system: rates come out, and no file stays."""
    found = limits.disk(tmp_path, nbytes=9 << 20, threads=2)
    assert all(one.bytes_per_s > 0 for one in (found.write, found.cached_write, found.read))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("measured", [limits.memory_copy, limits.sha256])
def test_the_limits_of_memory_are_positive(measured: object) -> None:
    """Copying and hashing have rates, with more threads than blocks, too."""
    assert callable(measured)
    limit = measured(nbytes=4 << 20, threads=3)
    assert isinstance(limit, Limit)
    assert limit.bytes_per_s > 0


def test_the_bottleneck_is_what_is_busy_longest() -> None:
    """Its seconds over the job's are the share."""
    job = _job()
    assert job.bottleneck.name == "disk"
    assert job.share == 0.75


def test_a_lane_moves_what_its_samples_say() -> None:
    """Rates over time add up to all bytes, whatever the steps."""
    samples = [_sample(0.5, read=100), _sample(1.9, read=700), _sample(2.0, read=800)]
    for columns in (1, 7, 120):
        rates = timeline.rates(samples, "read", seconds=2.0, columns=columns)
        assert len(rates) == columns
        assert sum(rates) * 2.0 / columns == pytest.approx(800)


def test_the_picture_shows_the_lanes_that_moved() -> None:
    """Well-formed, one lane for each that moved bytes, names escaped, also for an empty job."""
    text = timeline.picture([_job(_sample(1.0, read=5, written=3)), _job()])
    root = ElementTree.fromstring(text)
    shown = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert shown.count("read") == shown.count("written") == 1
    assert "uploaded" not in shown
    assert any(line and line.startswith("a <job>: 2.00 s, 75%") for line in shown)


def test_the_command_measures_jobs_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Hub on loopback: every job is pushed, and the folder is as before."""
    monkeypatch.setenv("CKPTD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    plot = tmp_path / "plot.svg"
    code = main.call(
        ["bench", "--size", "20MB", "--folder", str(tmp_path / "room"), "--push", "--json",
         "--plot", str(plot)]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    facts = json.loads(said.out)
    assert set(facts["jobs"]) == set(measure.JOBS)
    for job in facts["jobs"].values():
        assert job["seconds"] > 0
        assert job["share"] > 0
        assert job["resources"]["sha256"]["bytes"] > 0
    assert "uploaded" in plot.read_text()
    assert not list((tmp_path / "room").iterdir())


def test_a_job_that_fails_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is no checkpoint: the error of the job, not of Python."""
    monkeypatch.setenv("CKPTD_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "empty").mkdir()
    code = main.call(["bench", str(tmp_path / "empty"), "--size", "9MB"])
    assert code == 5
    assert "the job 'copy' failed" in capsys.readouterr().err
