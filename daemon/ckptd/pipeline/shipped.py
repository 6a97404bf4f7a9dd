"""The files that ship with ckptd: definitions and systemd units, found wherever it is installed.

In a wheel they lie in `ckptd/data/`; in an editable installation they are the folders of the
repository that pyproject.toml puts there.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

import ckptd
from ckptd import errors

SUFFIXES = frozenset({".yaml", ".yml"})


def folder(name: Literal["pipelines", "systemd"]) -> Path:
    """Return the folder of definitions, or of systemd units.

    Raises:
        StorageFailed: this installation lacks it.
    """
    package_path = Path(ckptd.__file__).parent
    installed_path = package_path / "data" / name
    repository_path = package_path.parents[1]
    if installed_path.is_dir():
        return installed_path
    if (repository_path / "pyproject.toml").is_file() and (repository_path / name).is_dir():
        return repository_path / name
    raise errors.StorageFailed(
        f"this installation lacks its {name}", path=installed_path, hint="install ckptd again"
    )


def names() -> list[str]:
    """Return the names of the definitions that ship."""
    return sorted(path.stem for path in folder("pipelines").iterdir() if path.suffix in SUFFIXES)


def definition_path(text: str) -> Path:
    """Return the definition file that `text` means: a path, or the name of one that ships.

    A file or anything spelled like a path is a path, so that a typo in it is reported as such.

    Raises:
        UsageError: a bare name that is neither.
    """
    path = Path(text)
    if path.suffix in SUFFIXES or "/" in text or path.is_file():
        return path
    known = names()
    if text in known:
        return folder("pipelines") / f"{text}.yaml"
    close = difflib.get_close_matches(text, known, 1)
    meant = f", did you mean {close[0]!r}?" if close else ""
    raise errors.UsageError(
        f"no definition {text!r}{meant}",
        hint=f"name a file, or one that ships: {', '.join(known)}",
    )
