"""The other end of `sitecustomize`: choosing the step at which something happens."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Steps:
    """The steps of one node's processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / "steps"
        self._folder.mkdir()

    @property
    def environment(self) -> dict[str, str]:
        """What the daemon must be started with."""
        python_path = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
        return {
            "PYTHONPATH": os.pathsep.join(python_path),
            "STEPS_ROOT": str(self._root),
            "STEPS_FOLDER": str(self._folder),
            "PYTHONWARNINGS": "ignore",
        }

    @property
    def fired(self) -> Path:
        """The file that is there once the armed step has come."""
        return self._folder / "fired"

    def arm(self, label: str | re.Pattern[str], deed: str, **details: Any) -> None:
        """Do `deed` at the next step that is called `label`, or whose whole name it matches."""
        self.disarm()
        pattern = label.pattern if isinstance(label, re.Pattern) else re.escape(label)
        temporary = self._folder / "arm.new"
        temporary.write_text(json.dumps({"label": pattern, "deed": deed, **details}))
        temporary.rename(self._folder / "arm")

    def disarm(self) -> None:
        """Nothing happens any more."""
        for name in ("arm", "fired", "go"):
            (self._folder / name).unlink(missing_ok=True)

    def go(self) -> None:
        """Let go on what waits."""
        (self._folder / "go").touch()

    def lines(self) -> list[str]:
        """Return every step so far."""
        return [label for _, label in self._trace()]

    def seen(self) -> list[str]:
        """Return the steps so far, each once, in their order."""
        return list(dict.fromkeys(self.lines()))

    def reached(self, start: str, moments: Sequence[float]) -> list[float]:
        """Return for each moment how long it took to a step that begins with `start`.

        Moments are of `time.monotonic`, in their order; one with no such step before the next
        moment has no place in the answer.
        """
        times = [at for at, label in self._trace() if label.startswith(start)]
        found = []
        for began, next_began in itertools.pairwise([*moments, math.inf]):
            first = min((at for at in times if began <= at < next_began), default=None)
            if first is not None:
                found.append(first - began)
        return found

    def _trace(self) -> list[tuple[float, str]]:
        path = self._folder / "trace"
        lines = path.read_text().splitlines() if path.exists() else ()
        pairs = (line.split(" ", 1) for line in lines if line)
        return [(float(at), label) for at, label in pairs]
