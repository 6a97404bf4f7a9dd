"""The source of a class that lives outside this package, saved beside its weights.

A class registered for an auto class is loaded from the folder's own code: its module's file, and
those it imports from beside itself, go into the folder, and `config.auto_map` names the class.
"""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def gather(owner: Any, config: Any) -> dict[str, bytes]:
    """Return file name -> content of the code to save, and name the class in `config.auto_map`.

    Empty for a class that is not registered, and, with a warning, for one defined in `__main__` or
    without a source file: nobody could import it.

    Args:
        owner: a model or a configuration whose class may have an `_auto_class`.
        config: the configuration that is saved with it.
    """
    auto_class = getattr(owner, "_auto_class", None)
    if auto_class is None:
        return {}
    kind = type(owner)
    source = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if kind.__module__ == "__main__" or source is None:
        _log.warning(
            "the code of %s cannot be saved: it is defined in %s; put it into a module of its own",
            kind.__name__,
            kind.__module__,
        )
        return {}
    module_name = kind.__module__.rpartition(".")[2]
    known: dict[str, str] = getattr(config, "auto_map", None) or {}
    config.auto_map = known | {auto_class: f"{module_name}.{kind.__name__}"}
    return {path.name: path.read_bytes() for path in _with_neighbours(Path(source))}


def _with_neighbours(start: Path) -> list[Path]:
    """Return `start` and the files that it imports relatively, themselves or through each other."""
    found = [start]
    for path in found:
        for neighbour in _neighbours(path):
            if neighbour not in found and neighbour.is_file():
                found.append(neighbour)
    return found


def _neighbours(path: Path) -> list[Path]:
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return [path.parent.joinpath(*name.split(".")).with_suffix(".py") for name in names]
