"""The definitions folder: which definitions are in use, reloaded when their files change.

Level-triggered like everything that watches: every look compares the folder with what is loaded. A
definition that no longer parses is reported, and the last good one stays in use; a removed file
ends its definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog

from ckptd import errors
from ckptd.pipeline import definition as definitions
from ckptd.pipeline import registry
from ckptd.pipeline.definition import Definition
from ckptd.telemetry.status import DefinitionStatus

log = structlog.get_logger()

SUFFIXES = frozenset({".yaml", ".yml"})
_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One file: the definition in use, if any, and what is wrong with the file, if anything."""

    path: Path
    stamp: _Stamp
    definition: Definition | None
    problem: str | None = None


class Definitions:
    """What is loaded; belongs to one task. `look` blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[Path, Loaded] = {}

    def look(self) -> bool:
        """Bring what is loaded up to the folder; return whether definitions in use changed."""
        before = self.in_use
        found = self._files()
        for path in [path for path in self._loaded if path not in found]:
            log.info("definition removed", path=str(path))
            del self._loaded[path]
        for path, stamp in found.items():
            loaded = self._loaded.get(path)
            # What is wrong may lie elsewhere (a name that another file has): look again.
            if loaded is None or loaded.stamp != stamp or loaded.problem is not None:
                self._loaded[path] = self._load(path, stamp, loaded)
        return before != self.in_use

    @property
    def in_use(self) -> dict[str, Definition]:
        """The definitions by name; of two files with one name the first has it."""
        by_name: dict[str, Definition] = {}
        for loaded in self._loaded.values():
            if loaded.definition is not None:
                by_name.setdefault(loaded.definition.pipeline, loaded.definition)
        return by_name

    @property
    def any_broken(self) -> bool:
        """Whether some file has a problem, so that its definition may be missing from `in_use`."""
        return any(loaded.problem is not None for loaded in self._loaded.values())

    @property
    def computes(self) -> bool:
        """Whether any definition in use has a stage that may need torch."""
        calls = (call for used in self.in_use.values() for call in used.stages)
        return any(registry.STAGES[call.name].computes for call in calls)

    @property
    def statuses(self) -> tuple[DefinitionStatus, ...]:
        """Every file, as a value."""
        return tuple(
            DefinitionStatus(
                path=str(loaded.path),
                pipeline=loaded.definition.pipeline if loaded.definition else None,
                problem=loaded.problem,
            )
            for loaded in self._loaded.values()
        )

    def _files(self) -> dict[Path, _Stamp]:
        found = {}
        for path in sorted(self._folder.glob("*")):
            if path.suffix not in SUFFIXES or path.name.startswith("."):
                continue
            try:
                stat = path.stat()
            except OSError:
                continue
            found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def _load(self, path: Path, stamp: _Stamp, before: Loaded | None) -> Loaded:
        last_good = before.definition if before is not None else None
        try:
            parsed = definitions.load_definition(path)
            self._check_name(path, parsed)
        except errors.DefinitionError as error:
            kept = "the last good one stays" if last_good else "not in use"
            if before is None or before.problem != error.message:
                log.error("definition broken", path=str(path), kept=kept, problems=error.message)
            return Loaded(path=path, stamp=stamp, definition=last_good, problem=error.message)
        log.info("definition loaded", path=str(path), pipeline=parsed.pipeline)
        return Loaded(path=path, stamp=stamp, definition=parsed)

    def _check_name(self, path: Path, parsed: Definition) -> None:
        for other in self._loaded.values():
            taken = other.definition is not None and other.definition.pipeline == parsed.pipeline
            if taken and other.path != path:
                problem = errors.Problem(
                    path=str(path),
                    line=1,
                    column=1,
                    field="pipeline",
                    what=f"{parsed.pipeline!r} is the name of {other.path} already",
                )
                raise errors.DefinitionError([problem])
