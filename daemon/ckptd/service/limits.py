"""The limits of this daemon as people see them in `ckptd status`: each one, and what is used of it."""

from __future__ import annotations

from collections.abc import Mapping

from ckptd import units
from ckptd.service import admission
from ckptd.service.admission import Caps, Node
from ckptd.settings import Settings
from ckptd.telemetry.status import LimitStatus, PinStatus


def statuses(
    settings: Settings,
    *,
    counts: Mapping[str, int],
    caps: Caps,
    found: Node,
    pins: PinStatus | None = None,
) -> tuple[LimitStatus, ...]:
    """Return every limit with its setting's name; `counts` are the jobs by state name.

    `pins` is None until the daemon has looked at them.
    """
    size, free = units.format_bytes, found.free_bytes
    names = [state.value for state in admission.UNFINISHED]
    unfinished = sum(counts.get(name, 0) for name in names)
    return (
        _limit("slots", str(settings.slots), f"{counts.get('running', 0)} running"),
        _limit(
            "max_queued",
            str(settings.max_queued),
            f"{unfinished} unfinished",
            reached=unfinished >= settings.max_queued,
        ),
        _limit("jobs_per_repo", str(settings.jobs_per_repo)),
        _limit("jobs_per_device", str(settings.jobs_per_device)),
        _limit("byte_budget", size(settings.byte_budget)),
        _limit("runner_memory", size(settings.runner_memory), _unbounded(found)),
        _limit(
            "upload_limit",
            "none" if settings.upload_limit is None else f"{size(settings.upload_limit)}/s",
        ),
        _limit("threads", str(settings.threads)),
        _limit("nice", str(settings.nice)),
        _limit("io_priority", settings.io_priority),
        _limit(
            "min_free",
            size(caps.min_free_bytes),
            "unknown" if free is None else f"{size(free)} free",
            reached=free is not None and free < caps.min_free_bytes,
        ),
        # Never what holds work back: over it, pins of jobs that wait are dropped.
        _limit("pin_limit", size(settings.pin_limit), _held(pins)),
        _limit("pin_age", units.format_duration(settings.pin_age)),
    )


def _limit(name: str, value: str, now: str | None = None, *, reached: bool = False) -> LimitStatus:
    return LimitStatus(name=name, value=value, now=now, reached=reached)


def _held(pins: PinStatus | None) -> str | None:
    return None if pins is None else f"{units.format_bytes(pins.held_bytes)} held"


def _unbounded(found: Node) -> str | None:
    return "not set beside an accelerator" if found.accelerators else None
