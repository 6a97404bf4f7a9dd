"""A picture of jobs over time: how fast each lane moved bytes, one above the other.

Where lanes are busy at the same time, work overlaps. Scalable vector graphics, by hand: no drawing
library is needed, and every browser shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape

from ckptd import units
from ckptd.bench.child import Sample
from ckptd.bench.measure import Measured

LANES = ("read", "computed", "written", "uploaded")
_COLOURS = {"read": "#4878a8", "computed": "#b0782c", "written": "#4c8c4a", "uploaded": "#8c5a9c"}
_WIDTH, _LANE_HEIGHT, _LEFT, _TOP, _GAP = 900, 48, 110, 34, 26
_COLUMNS = 120
"""Steps of time in the picture."""


def picture(jobs: Sequence[Measured]) -> str:
    """Return the SVG text of all jobs, each with its own scale of time."""
    parts: list[str] = []
    top = _TOP
    for job in jobs:
        parts += _job(job, top)
        top += _height(job) + _GAP
    total = top + _GAP
    style = "<style>text{font:12px sans-serif;fill:#333}</style>"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{total}" '
        f'viewBox="0 0 {_WIDTH} {total}">'
    )
    return "\n".join([head, style, *parts, "</svg>", ""])


def rates(samples: Sequence[Sample], lane: str, *, seconds: float, columns: int) -> list[float]:
    """Return the bytes a second that `lane` moved in each of `columns` equal steps of time."""
    times = [0.0, *(sample.at_s for sample in samples)]
    done = [0, *(getattr(sample, lane) for sample in samples)]
    step = seconds / columns
    values = [_at(times, done, number * step) for number in range(columns + 1)]
    return [(after - before) / step for before, after in itertools.pairwise(values)]


def _at(times: Sequence[float], done: Sequence[int], at: float) -> float:
    """Return the bytes done at a time, between samples in proportion."""
    for number in range(1, len(times)):
        if times[number] >= at:
            begin, end = times[number - 1], times[number]
            share = (at - begin) / (end - begin) if end > begin else 1.0
            return done[number - 1] + share * (done[number] - done[number - 1])
    return float(done[-1])


def _lanes(job: Measured) -> list[str]:
    last = job.samples[-1] if job.samples else None
    return [lane for lane in LANES if last is not None and getattr(last, lane)]


def _height(job: Measured) -> int:
    return (len(_lanes(job)) + 1) * _LANE_HEIGHT


def _job(job: Measured, top: int) -> Iterator[str]:
    title = f"{job.name}: {job.seconds:.2f} s, {job.share:.0%} of the {job.bottleneck.name}'s limit"
    yield f'<text x="{_LEFT}" y="{top - 8}" font-weight="bold">{escape(title)}</text>'
    wide = _WIDTH - _LEFT - 20
    seconds = max([job.seconds, *(sample.at_s for sample in job.samples)])
    for number, lane in enumerate(_lanes(job)):
        bottom = top + (number + 1) * _LANE_HEIGHT - 6
        values = rates(job.samples, lane, seconds=seconds, columns=_COLUMNS)
        most = max(values) or 1.0
        points = [f"{_LEFT},{bottom}"]
        for place, value in enumerate(values):
            y = bottom - (_LANE_HEIGHT - 14) * value / most
            left, right = (_LEFT + wide * at / _COLUMNS for at in (place, place + 1))
            points += [f"{left:.1f},{y:.1f}", f"{right:.1f},{y:.1f}"]
        points.append(f"{_LEFT + wide},{bottom}")
        yield f'<polygon points="{" ".join(points)}" fill="{_COLOURS[lane]}"/>'
        yield f'<text x="8" y="{bottom - 14}">{lane}</text>'
        yield f'<text x="8" y="{bottom}">{units.format_bytes(most)}/s</text>'
    bottom = top + len(_lanes(job)) * _LANE_HEIGHT + 10
    for part in range(5):
        x = _LEFT + wide * part / 4
        yield f'<text x="{x:.0f}" y="{bottom}" text-anchor="middle">{seconds * part / 4:.2f} s</text>'
