"""Where a module that an adapter names is among the tensors of its base.

Adapters name modules as the model had them in memory. A name is looked for among the names in the
files and among those that the model's class gives them (`renaming`), then without and with its
first part: files may leave the model's own prefix out (`h.0...` of the first GPT-2 files). What is
in neither may be the same model in another wrapping (a text model trained alone, out of one that
sees); there, one exchange of the beginning must hold for all modules of a kind (`wrappings`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.pipeline.adapter import renaming
from ckptd.pipeline.adapter.renaming import Names, Piece

_FUSED = re.compile(r"(?P<module>.+)\.(?P<kind>gate_up_proj|down_proj)")
_EXPERT_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""What separate experts call their parts, in models whose class is not known."""
_NUMBERED = re.compile(r"\.\d+(\.|$)")


@dataclass(slots=True)
class Places:
    """The tensors of a base by the names that an adapter may have for them.

    `tensors` are those of the files, with those that are tied to one of them. `exchanged` are
    names that were found through a wrapping.
    """

    tensors: Collection[str]
    names: Names
    exchanged: dict[str, str] = field(default_factory=dict)
    _firsts: tuple[str, ...] = ()
    _by_end: dict[tuple[str, ...], list[list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note what many names are looked up by."""
        names = (*self.tensors, *self.names.whole, *self.names.pieces, *self.names.experts)
        self._firsts = tuple(dict.fromkeys(name.partition(".")[0] for name in names))
        for tensor in self.tensors:
            parts = tensor.split(".")
            self._by_end.setdefault(tuple(parts[-2:]), []).append(parts)

    def find(self, name: str) -> str | None:
        """Return the tensor that `name` is; None where there is none, or where two may be meant."""
        if name in self.exchanged:
            return self.exchanged[name]
        for candidates in self._candidates(name):
            found = {one for one in candidates if one in self.tensors}
            found |= {self.names.whole[one] for one in candidates if one in self.names.whole}
            if found:
                return found.pop() if len(found) == 1 else None
        return None

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return the rows of other tensors that `name` is, one below the other; () where not."""
        for candidates in self._candidates(name):
            found = [self.names.pieces[one] for one in candidates if one in self.names.pieces]
            if found:
                return found[0] if len(found) == 1 else ()
        return ()

    def experts(self, name: str) -> list[list[str]]:
        """Return the tensors of separate experts that the fused parameter `name` is in memory.

        For each expert, those that stand one below the other in its part of the parameter. Empty
        where the base has no such experts.
        """
        for candidates in self._candidates(name):
            known = [self.names.experts[one] for one in candidates if one in self.names.experts]
            if known:
                return known[0] if len(known) == 1 else []
        match = _FUSED.fullmatch(name)
        if match is None:
            return []
        for parts in _EXPERT_NAMES[match["kind"]]:
            first = self.find(f"{match['module']}.0.{parts[0]}.weight")
            if first is None:
                continue
            stem = first.removesuffix(f"0.{parts[0]}.weight")
            found: list[list[str]] = []
            while all(f"{stem}{len(found)}.{part}.weight" in self.tensors for part in parts):
                found.append([f"{stem}{len(found)}.{part}.weight" for part in parts])
            return found
        return []

    def exchange(self, wanted: Iterable[str], fits: Callable[[str, str], bool]) -> None:
        """Find places for names that have none, if one exchange of their beginnings gives them all.

        `fits` says whether a name's tensor may be put into one of the base's. Names with the same
        beginning before the number of their layer go together; where no exchange or several hold
        for all of them, they stay without a place.
        """
        kinds: dict[str, list[str]] = defaultdict(list)
        for name in wanted:
            if self.find(name) is None and not self.pieces(name):
                kinds[_NUMBERED.split(name, maxsplit=1)[0]].append(name)
        for names in kinds.values():
            ways = set.intersection(*(self._ways(name, fits) for name in names))
            if len(ways) != 1:
                continue
            old, new = ways.pop()
            for name in names:
                self.exchanged[name] = new + name.removeprefix(old)

    def _ways(self, name: str, fits: Callable[[str, str], bool]) -> set[tuple[str, str]]:
        """Return the beginnings of `name` and of tensors that end alike and fit, as far as they differ."""
        parts, ways = name.split("."), set()
        for others in self._by_end.get(tuple(parts[-2:]), ()):
            alike = 2
            while alike < min(len(parts), len(others)) and parts[~alike] == others[~alike]:
                alike += 1
            if not fits(name, ".".join(others)):
                continue
            old, new = parts[: len(parts) - alike], others[: len(others) - alike]
            ways.add((".".join([*old, ""]), ".".join([*new, ""])))
        longest = min((old for old, _ in ways), key=len, default="")
        return {(old, new) for old, new in ways if old == longest}

    def _candidates(self, name: str) -> Iterator[tuple[str, ...]]:
        """Yield the ways to spell a name, the likeliest first; of those together, one must be."""
        yield (name,)
        if "." in name:
            yield (name.partition(".")[2],)
        yield tuple(f"{first}.{name}" for first in self._firsts)


def of(config: Mapping[str, Any], tensors: Collection[str], twins: Collection[str]) -> Places:
    """Return the places in a base with `tensors` in its files, and `twins` that are tied to some."""
    return Places(tensors={*tensors, *twins}, names=renaming.of(config, tensors))
