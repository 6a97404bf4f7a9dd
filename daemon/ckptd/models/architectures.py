"""What ckptd knows of every model class that a config.json may name, as data.

`architectures.json` is generated from transformers by `tests/tools/generate_architectures.py`.
Names in it are run-time names; a checkpoint may spell them otherwise (the original names that
`save_pretrained` writes, the base model's prefix left out or put in front), and `Architecture`
finds and forms those spellings. Nothing here reads a file of the checkpoint or imports torch.
A part of a composite model that the checkpoint's configuration fills with another class than the
default one (a LLaVA around Mistral) is replaced by that class's facts.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.resources
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.models import configuration

FLAG = "tie_word_embeddings"
_KINDS = ("causal", "seq2seq", "multimodal", "speech", "masked", "pretraining", "base")
"""Kinds of automatic classes, in the order in which a config.json without `architectures` means
them: the widest first, for its names include those of the narrower ones."""


class Role(enum.StrEnum):
    """What a tensor with vocabulary rows is for."""

    INPUT = "input"
    """The input embedding, or a module's own copy of it."""
    HEAD = "head"
    """The matrix that gives the logits."""
    BIAS = "bias"
    """The head's bias, or that of a layer in front of it; one number a row."""
    LOGITS_BIAS = "logits_bias"
    """A buffer `(1, rows)` added to the logits."""
    OTHER = "other"
    """Indexed by a vocabulary, but neither of these (per-layer embeddings, codebooks...)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A tensor with one row for each entry of a vocabulary."""

    name: str
    role: Role
    axis: int
    key: str
    """The dotted key of config.json that holds the size, such as `text_config.vocab_size`."""
    offset: int | None
    """Rows minus size; None where the rows are not size plus a constant (codebooks in one table)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """Where a model reads whether its weights are tied."""

    keys: tuple[str, ...]
    """Dotted keys; any of them true means tied (the library forwards nested ones)."""
    defaults: tuple[bool, ...]
    """What each means when config.json does not have it."""
    aliases: tuple[str, ...] = ()
    """Keys of old that overrule the others where they are present."""
    forced: bool | None = None
    """The value the class takes whatever config.json says; then the key means something else."""
    computes: bool = False
    """Whether the model also computes differently by it, so that it must stay what it is."""
    binds: str | None = None
    """A tensor outside the vocabulary that it ties too (one of them), so that it must stay true."""

    def value(self, config: Mapping[str, Any]) -> bool:
        """Return the value in effect for this config.json."""
        if self.forced is not None:
            return self.forced
        for alias in self.aliases:
            if configuration.get(config, alias) is not None:
                return bool(configuration.get(config, alias))
        return any(map(self._one, self.keys, self.defaults, (config,) * len(self.keys)))

    def explicit(self, config: Mapping[str, Any]) -> bool:
        """Return whether config.json itself has one of the keys."""
        return any(configuration.get(config, key) is not None for key in self.keys + self.aliases)

    def writes(self, config: Mapping[str, Any], value: bool) -> tuple[configuration.Write, ...]:
        """Return what to write so that the value in effect becomes `value`, and is explicit.

        False must stand wherever true could come from; true is written in the first place, and
        over any explicit false beside an alias. Nothing is written where nothing would change.
        """
        if self.forced is not None:
            return ()
        present = [alias for alias in self.aliases if configuration.get(config, alias) is not None]
        keys = [self.keys[0], *present]
        if not value:
            rest = zip(self.keys[1:], self.defaults[1:], strict=True)
            keys += [key for key, default in rest if self._one(key, default, config)]
        return tuple(
            configuration.Write(key=key, value=value)
            for key in keys
            if configuration.get(config, key) is not value
        )

    @staticmethod
    def _one(key: str, default: bool, config: Mapping[str, Any]) -> bool:
        value = configuration.get(config, key)
        if value is not None:
            return bool(value)
        kind = configuration.get(config, configuration.beside(key, "model_type"))
        return _tied_by_default(kind, default) if "." in key and kind is not None else default


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A target that is the same parameter as its source while the flag holds (run-time names)."""

    target: str
    source: str
    flag: Flag


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The facts of one model class, for one config.json."""

    name: str
    model_type: str
    exact: bool = True
    """False where config.json names no class and the widest one of its model_type is taken."""
    known: bool = True
    """False where the facts were read off a checkpoint's names and shapes."""
    base_prefix: str | None = None
    """The base model's attribute: a base model saved alone lacks this prefix."""
    outer_prefix: str | None = None
    """For a base model: the prefix its names have in a checkpoint of a model around it."""
    rows: tuple[Row, ...] = ()
    ties: tuple[Tie, ...] = ()
    spellings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Names on disk by run-time name, the published spelling first; absent: only itself."""
    resize_keys: tuple[str, ...] = ()
    """The size keys of the text vocabulary: every row under them belongs to it, and a resize
    writes them all."""
    not_resizable: str | None = None
    """Why its vocabulary cannot be resized coherently."""
    unplaced: str | None = None
    """Why the names of a part are unknown (it is filled with a class the table lacks)."""

    @property
    def role_of(self) -> Mapping[str, Role]:
        """The role of each run-time name."""
        return {row.name: row.role for row in self.rows}

    def candidates(self, name: str) -> tuple[str, ...]:
        """Return the spellings a checkpoint may use for a run-time name, the likeliest first."""
        found: list[str] = []
        for spelling in self.spellings.get(name, (name,)):
            found.append(spelling)
            if self.base_prefix and spelling.startswith(f"{self.base_prefix}."):
                found.append(spelling.removeprefix(f"{self.base_prefix}."))
            elif self.outer_prefix:
                found.append(f"{self.outer_prefix}.{spelling}")
        return tuple(dict.fromkeys(found))

    def locate(self, name: str, present: Collection[str]) -> str | None:
        """Return the spelling of a run-time name that is present, or None."""
        return next((one for one in self.candidates(name) if one in present), None)

    def spell(self, name: str, present: Iterable[str]) -> str:
        """Return the spelling of a run-time name that fits the checkpoint's other names.

        The one whose enclosing modules occur among the names that are present wins; among equals
        the one that `save_pretrained` would write.
        """
        names = tuple(present)

        def misfit(spelling: str) -> tuple[int, int]:
            parts = spelling.split(".")[:-2]
            known = len(parts)
            while known and not any(n.startswith(".".join(parts[:known]) + ".") for n in names):
                known -= 1
            return len(parts) - known, -known

        return min(self.candidates(name), key=misfit)


def find(config: Mapping[str, Any]) -> Architecture | None:
    """Return the facts for a config.json, or None where the table does not know its class.

    `architectures[0]` decides where it fits `model_type`; else the class of the same kind that
    `model_type` has; without `architectures`, the widest class of `model_type` (not exact).
    """
    names = config.get("architectures") or ()
    model_type = _text(config.get("model_type"))
    name = names[0] if isinstance(names, list | tuple) and names else None
    if name is None:
        name, exact = _widest(model_type), False
    else:
        name, exact = _fitting(str(name), model_type), True
    if name is None:
        return None
    return dataclasses.replace(_with_parts(name, config), exact=exact)


@functools.cache
def table() -> Mapping[str, Any]:
    """Return the parsed `architectures.json`."""
    text = importlib.resources.files("ckptd.models").joinpath("architectures.json").read_bytes()
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def _tied_by_default(model_type: object, otherwise: bool) -> bool:
    known: Mapping[str, bool] = table()["tied_by_default"]
    return known.get(model_type, otherwise) if isinstance(model_type, str) else otherwise


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _widest(model_type: object) -> str | None:
    classes = (table()["auto"][kind].get(model_type) for kind in _KINDS)
    return next((name for name in classes if name is not None), None)


def _fitting(name: str, model_type: object) -> str | None:
    """Return the class that loads a config.json with this class name and model_type."""
    entry = table()["architectures"].get(name)
    if model_type is None:
        return name if entry is not None else None
    if entry is not None and entry["type"] == model_type:
        return name
    auto = table()["auto"]
    if entry is None:
        return None
    kinds = [kind for kind in _KINDS if name in auto[kind].values()]
    if any(auto[kind].get(model_type) == name for kind in kinds):
        return name
    return next((auto[k][model_type] for k in kinds if model_type in auto[k]), None)


def _with_parts(name: str, config: Mapping[str, Any]) -> Architecture:
    """Return the class's facts with its free parts as this config.json fills them."""
    name, entry = _variant(name, config)
    found = _read(name, entry)
    for module, path, model_type, default, prefixes in entry.get("parts", ()):
        filled = _text(configuration.get(config, f"{path}.model_type"))
        if filled is None or filled == model_type:
            continue
        kinds = [k for k in _KINDS[::-1] if table()["auto"][k].get(model_type) == default]
        classes = (table()["auto"][kind].get(filled) for kind in kinds)
        other = next((one for one in classes if one is not None), None)
        if other == default:
            continue
        nested = configuration.get(config, path)
        part = _with_parts(other, nested) if other else None
        found = _replaced(found, module, path, prefixes, part, str(filled))
    return found


def _variant(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the entry of a class whose layout hangs on a key of its configuration."""
    entries = table()["architectures"]
    entry: dict[str, Any] = entries[name]
    for key, value, variant in entry.get("variants", ()):
        if configuration.get(config, key) == value:
            return name, entries[variant]
    return name, entry


def _read(name: str, entry: Mapping[str, Any]) -> Architecture:
    flags = [
        Flag(
            keys=tuple(flag["keys"]),
            defaults=tuple(flag["defaults"]),
            aliases=tuple(flag.get("aliases", ())),
            forced=flag.get("forced"),
            computes=flag.get("computes", False),
            binds=flag.get("binds"),
        )
        for flag in entry.get("flags", ())
    ]
    return Architecture(
        name=name,
        model_type=entry["type"],
        base_prefix=entry.get("prefix"),
        outer_prefix=entry.get("below"),
        rows=tuple(
            Row(name=row[0], role=Role(row[1]), axis=row[2], key=row[3], offset=row[4])
            for row in entry.get("vocabulary", ())
        ),
        ties=tuple(
            Tie(target=target, source=source, flag=flags[index])
            for target, source, index in entry.get("ties", ())
        ),
        spellings={one: tuple(names) for one, names in entry.get("disk", {}).items()},
        resize_keys=tuple(entry.get("resize", ())),
        not_resizable=entry.get("fixed"),
    )


def _replaced(
    whole: Architecture,
    module: str,
    path: str,
    prefixes: list[str],
    part: Architecture | None,
    model_type: str,
) -> Architecture:
    """Return `whole` with what lies under `module` exchanged for `part`."""
    inside = f"{module}."
    gone = [row for row in whole.rows if row.name.startswith(inside)]
    if part is None:
        if not gone:
            return whole
        why = f"{path}.model_type is {model_type!r}, which the architecture table does not know"
        return dataclasses.replace(whole, unplaced=why, not_resizable=why)
    rows = [
        dataclasses.replace(row, name=inside + row.name, key=f"{path}.{row.key}")
        for row in part.rows
    ]
    moved = _moved_names(gone, rows)
    ties = [
        dataclasses.replace(
            tie, target=moved.get(tie.target, tie.target), source=moved.get(tie.source, tie.source)
        )
        for tie in whole.ties
        if not (tie.target.startswith(inside) and tie.source.startswith(inside))
    ]
    ties = [
        tie
        for tie in ties
        if {tie.target, tie.source}.isdisjoint(
            row.name for row in gone if row.name not in moved.values()
        )
    ]
    ties += [
        Tie(target=inside + tie.target, source=inside + tie.source, flag=_below(tie.flag, path))
        for tie in part.ties
    ]
    spellings = {
        name: names for name, names in whole.spellings.items() if not name.startswith(inside)
    }
    for row in part.rows:
        forms = part.spellings.get(row.name, (row.name,))
        spellings[inside + row.name] = tuple(
            dict.fromkeys(f"{prefix}.{form}" for prefix in prefixes for form in (row.name, *forms))
        )
    keys = dict.fromkeys(
        [key for key in whole.resize_keys if not key.startswith(f"{path}.")]
        + [f"{path}.{key}" for key in part.resize_keys]
    )
    if not any(key.startswith(f"{path}.") for key in whole.resize_keys):
        keys = dict.fromkeys(whole.resize_keys)
    return dataclasses.replace(
        whole,
        rows=tuple(row for row in whole.rows if row not in gone) + tuple(rows),
        ties=tuple(ties),
        spellings=spellings,
        resize_keys=tuple(keys),
        not_resizable=whole.not_resizable or (part.not_resizable if gone else None),
    )


def _moved_names(gone: list[Row], rows: list[Row]) -> dict[str, str]:
    """Return the new name of each row that has exactly one successor in the same role."""
    moved = {}
    for row in gone:
        heirs = [other.name for other in rows if other.role is row.role]
        if len(heirs) >= 1 and row.role is not Role.OTHER:
            moved[row.name] = heirs[0]
    return moved


def _below(flag: Flag, path: str) -> Flag:
    """Return the flag of a part as the whole's config.json holds it."""
    return dataclasses.replace(
        flag,
        keys=tuple(f"{path}.{key}" for key in flag.keys),
        aliases=tuple(f"{path}.{key}" for key in flag.aliases),
    )
