"""What a model calls the tensors of its files while it is in memory.

`renamings.json` is generated from transformers by `tests/tools/generate_renamings.py`: for each
class the renamings in their order, and what is divided or put together. Applying them to the names
in the base's files gives the names that an adapter, which was saved from memory, has for them.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.models import architectures

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor in a file: stretch number `part` of `parts` equal ones."""

    tensor: str
    part: int = 0
    parts: int = 1


@dataclass(slots=True)
class Names:
    """Tensors by their names in memory.

    `whole` are the same tensor, `pieces` rows of one or of several, one below the other. Of
    `experts`, in their order, each has tensors that stand one below the other in its part.
    """

    whole: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    experts: dict[str, list[list[str]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One renaming. Source: transformers, `core_model_loading.WeightTransform`."""

    kind: str
    scope: str | None
    base_prefix: str | None
    pattern: re.Pattern[str]
    targets: tuple[str, ...]

    def match(self, name: str) -> tuple[str, re.Match[str]] | None:
        """Return what stands before the part of `name` that is looked at, and the match there."""
        prefix = ""
        if self.scope is not None:
            scope = f"{self.scope}." if self.scope else ""
            base = f"{self.base_prefix}." if self.base_prefix else ""
            if name.startswith(base + scope):
                prefix = base + scope
            elif name.startswith(scope):
                prefix = scope
            else:
                return None
        found = self.pattern.search(name.removeprefix(prefix))
        return None if found is None else (prefix, found)

    def renamed(self, prefix: str, match: re.Match[str], target: str) -> str:
        """Return the new name."""
        branch = _branch(match)
        if r"\1" in target:
            inner = match.group(match.re.groupindex[branch] + 1)
            target = target.replace(r"\1", inner)
        return prefix + match.string.replace(match.group(0), target, 1)


def of(config: Mapping[str, Any], tensors: Collection[str]) -> Names:
    """Return the names in memory of the files' `tensors`; those of unknown classes are as they are."""
    found = architectures.find(config)
    rules = _rules(found.name) if found is not None else ()
    names = Names()
    joined: dict[str, dict[int, str]] = defaultdict(dict)
    stacked: dict[str, dict[int, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in tensors if rules else ():
        name = tensor
        for rule in rules:
            if rule.kind == "rename" and (hit := rule.match(name)) is not None:
                name = rule.renamed(*hit, rule.targets[0])
        chosen = _converter(rules, name)
        if chosen is None:
            names.whole[name] = tensor
            continue
        rule, hit = chosen
        if rule.kind == "chunk":
            for part, target in enumerate(rule.targets):
                piece = Piece(tensor, part, len(rule.targets))
                names.pieces[rule.renamed(*hit, target)] = (piece,)
        elif rule.kind == "concatenate":
            joined[rule.renamed(*hit, rule.targets[0])][int(_branch(hit[1])[1:])] = tensor
        elif (number := _NUMBER.search(hit[1].group(0))) is not None:
            mine = stacked[rule.renamed(*hit, rule.targets[0])][int(number[1])]
            mine[int(_branch(hit[1])[1:])] = tensor
    for name, parts in joined.items():
        names.pieces[name] = tuple(Piece(parts[at]) for at in sorted(parts))
    for name, every in stacked.items():
        names.experts[name] = [[p for _, p in sorted(every[e].items())] for e in sorted(every)]
    return names


def _converter(
    rules: tuple[_Rule, ...], name: str
) -> tuple[_Rule, tuple[str, re.Match[str]]] | None:
    """Return the one rule that divides a tensor or puts it together with others, and its match."""
    for rule in rules:
        if rule.kind != "rename" and (hit := rule.match(name)) is not None:
            return rule, hit
    return None


def _branch(match: re.Match[str]) -> str:
    """Return the name of the branch of a rule's pattern that matched: `g0`, `g1`..."""
    return next(name for name, value in match.groupdict().items() if value is not None)


@functools.cache
def _rules(name: str) -> tuple[_Rule, ...]:
    table = _table()
    return tuple(
        _Rule(kind, scope, base, re.compile(pattern), tuple(targets))
        for kind, scope, base, pattern, targets in (
            table["rules"][number] for number in table["classes"].get(name, ())
        )
    )


@functools.cache
def _table() -> Mapping[str, Any]:
    path = importlib.resources.files("ckptd.pipeline.adapter").joinpath("renamings.json")
    parsed: dict[str, Any] = json.loads(path.read_bytes())
    return parsed
