"""Files of a save that stand complete under their final names, told to whoever listens.

`save_pretrained` reports; `push_to_hub` listens, so that a shard goes up while the next is written,
whatever a subclass does around its `save_pretrained`. The listener is the thread's (and task's) own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

Listener = Callable[[Path], None]
"""Is told a file's path once it is durable; what it raises ends the save."""

_LISTENER: ContextVar[Listener | None] = ContextVar("ckptd_saved_files", default=None)


@contextlib.contextmanager
def reported(to: Listener) -> Iterator[None]:
    """Let `to` hear of every file that saves of this thread complete meanwhile."""
    token = _LISTENER.set(to)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def report(path: Path) -> None:
    """Say that the file at `path` is complete; nobody may write it any more."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(path)
