"""Exception groups at boundaries: task groups wrap what a caller wants to see as one failure."""

from __future__ import annotations

from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def first(group: BaseExceptionGroup[BaseException], kind: type[E]) -> E:
    """Return the first exception of `kind` in `group`, however deep it is nested.

    Raises:
        LookupError: there is none.
    """
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            try:
                return first(error, kind)
            except LookupError:
                continue
        if isinstance(error, kind):
            return error
    raise LookupError(f"no {kind.__name__} in the group")
