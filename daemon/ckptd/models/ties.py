"""Which tensors of a checkpoint are one parameter, as far as names and headers tell.

Pure: config.json and the specifications of the tensors in, tie groups out, spelled as they are on
disk. What becomes of them is decided in `tying`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd import errors
from ckptd.models import architectures, unfamiliar
from ckptd.models.architectures import Architecture, Flag, Role
from ckptd.models.unfamiliar import Shaped

STAGE = "tie"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A name that is the same parameter as its group's source while the flag holds."""

    name: str
    """As it is spelled on disk, or would be."""
    present: bool
    alias: bool
    """A module's own copy of the source (an encoder's embedding), not another kind of tensor."""
    flag: Flag


@dataclass(frozen=True, slots=True, kw_only=True)
class TieGroup:
    """A source and everything tied to it."""

    source: str
    """The canonical name as it is spelled on disk, or would be."""
    anchor: str
    """The present tensor that holds the group's content: the source where it is there."""
    targets: tuple[Target, ...]
    alike: tuple[str, ...]
    """Present names, other than the anchor, of its dtype and shape: their bytes must be compared."""
    unlike: tuple[str, ...]
    """Present names of another dtype or shape, or quantized: different without looking."""

    @property
    def source_present(self) -> bool:
        """Whether the canonical name is in the checkpoint."""
        return self.anchor == self.source

    @property
    def present(self) -> tuple[str, ...]:
        """The names that are there in whatever form, the anchor first."""
        return (self.anchor, *self.alike, *self.unlike)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties:
    """The tie groups of one checkpoint."""

    architecture: Architecture
    config: Mapping[str, Any]
    path: Path | str
    groups: tuple[TieGroup, ...]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The (anchor, other) pairs whose bytes `decide` must know about."""
        return tuple((group.anchor, name) for group in self.groups for name in group.alike)

    @property
    def flags(self) -> tuple[Flag, ...]:
        """The flags that govern the groups, each once."""
        return tuple(dict.fromkeys(t.flag for group in self.groups for t in group.targets))

    def governed(self, flag: Flag) -> list[TieGroup]:
        """Return the groups that have a target under this flag."""
        return [group for group in self.groups if any(t.flag == flag for t in group.targets)]

    def decided(self, flag: Flag) -> bool:
        """Return whether the content says anything about this flag."""
        return any(len(g.present) > 1 or not g.source_present for g in self.governed(flag))


def find(config: Mapping[str, Any], tensors: Mapping[str, Shaped], *, path: Path | str) -> Ties:
    """Return the tie groups of a checkpoint, by the table or, for unknown classes, by the rule.

    `path` is the checkpoint's, for messages.

    Raises:
        StageRefused: no tensor of a group is there under any known name; the class of a part is
            unknown; or, for an unknown class, names and shapes allow several readings.
    """
    known = architectures.find(config)
    found = known if known is not None else unfamiliar.infer(config, tensors, STAGE, path)
    if found.unplaced is not None:
        raise errors.StageRefused(found.unplaced, stage=STAGE, path=path)
    grouped: dict[str, list[architectures.Tie]] = {}
    sources = {tie.target: tie.source for tie in found.ties}
    for tie in found.ties:
        grouped.setdefault(_root(tie.source, sources), []).append(tie)
    groups = [_group(found, source, ties, tensors, path) for source, ties in grouped.items()]
    return Ties(
        architecture=found,
        config=config,
        path=path,
        groups=tuple(group for group in groups if group is not None),
    )


def _root(name: str, sources: Mapping[str, str]) -> str:
    """Return the source at the end of a chain of ties."""
    seen = {name}
    while name in sources and sources[name] not in seen:
        name = sources[name]
        seen.add(name)
    return name


def _group(
    known: Architecture,
    source: str,
    ties: list[architectures.Tie],
    tensors: Mapping[str, Shaped],
    path: Path | str,
) -> TieGroup | None:
    """Return the group as it is on disk; None for parts this checkpoint's model does not have."""
    role = known.role_of.get(source)
    here = known.locate(source, tensors)
    targets = []
    quantized = []
    for tie in ties:
        name = known.locate(tie.target, tensors)
        spelled = name or known.spell(tie.target, tensors)
        alias = known.role_of.get(tie.target) is role
        if name is None and _packed(spelled, tensors):
            quantized.append(spelled)
        elif name is None and not alias and _headless(known, source, here):
            continue
        targets.append(Target(name=spelled, present=name is not None, alias=alias, flag=tie.flag))
    present = [target.name for target in targets if target.present and target.alias]
    present += [target.name for target in targets if target.present and not target.alias]
    anchor = here or next(iter(present), None)
    if anchor is None:
        if role not in (Role.INPUT, Role.HEAD) or any(c.isdigit() for c in source):
            return None
        raise errors.StageRefused(
            f"neither the embedding nor what {known.name} ties to it is there under a known name",
            stage=STAGE,
            path=path,
            tensor=source,
            expected=", ".join((*known.candidates(source), *(t.name for t in targets))),
        )
    others = [name for name in present if name != anchor]
    form = (tensors[anchor].dtype, tuple(tensors[anchor].shape))
    alike = [n for n in others if (tensors[n].dtype, tuple(tensors[n].shape)) == form]
    return TieGroup(
        source=here or known.spell(source, tensors),
        anchor=anchor,
        targets=tuple(targets),
        alike=tuple(alike),
        unlike=tuple([name for name in others if name not in alike] + quantized),
    )


def _packed(name: str, tensors: Iterable[str]) -> bool:
    """Return whether the module of a `.weight` is there in a quantized form."""
    module = name.removesuffix("weight")
    return any(other.startswith(module) and other != f"{module}bias" for other in tensors)


def _headless(known: Architecture, source: str, here: str | None) -> bool:
    """Return whether a base model was saved alone, and nothing says that a head belongs to it."""
    if known.exact or here is None or known.base_prefix is None:
        return False
    return source.startswith(f"{known.base_prefix}.") and not here.startswith(
        f"{known.base_prefix}."
    )
