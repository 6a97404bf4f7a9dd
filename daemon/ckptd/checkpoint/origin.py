"""Where a pin comes from: a note in it, so that after a restart its owner knows it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ckptd.checkpoint import writer

NAME = ".ckptd-origin.json"
"""The file in a pin that says whose it is and which folder it is a pin of."""


def write(pin_path: Path, origin: Mapping[str, str]) -> None:
    """Note in the pin where it comes from; durable after `sync`.

    Raises:
        NoSpace, StorageFailed: the pin folder cannot be written.
    """
    writer.make_folder(pin_path)
    path = pin_path / NAME
    temporary = path.with_name(f".{NAME}.new")
    try:
        temporary.write_text(json.dumps(dict(origin)))
        temporary.rename(path)
    except OSError as error:
        raise writer.translated(error, path, 0) from error


def sync(pin_path: Path) -> None:
    """Make the note durable: a pin without one belongs to nobody.

    Raises:
        NoSpace, StorageFailed: the file system refused.
    """
    try:
        for path in (pin_path / NAME, pin_path, pin_path.parent):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise writer.translated(error, pin_path / NAME, 0) from error


def read(pin_path: Path) -> dict[str, str] | None:
    """Return what `write` noted; None where there is nothing readable."""
    try:
        value = json.loads((pin_path / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
