"""Which tensors of a checkpoint are one parameter, and what to publish of them.

Pure: `find` takes config.json and the specifications of the tensors, `decide` takes in addition
which pairs hold the same bytes; the bytes are compared by whoever can read them. The content
decides and config.json is made to agree with it, never the other way round:

- all equal: one is published under the canonical name, the flag is true;
- different: all are kept, the flag is false;
- only another than the canonical name present: it is published under the canonical one;
- the flag says apart, but only one is there: refused, for nobody knows what the other held.

A flag that governs several ties (embedding and head, head bias, an encoder's own copy of the
embedding) gets one value, and what that value requires on disk is there afterwards. Where a class
ignores its flag (T5), computes by it (Switch) or ties more than its vocabulary with it (Zamba), the
flag keeps its value and the tensors are arranged so that the class loads them rightly.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ckptd import errors
from ckptd.checkpoint.dtypes import Dtype
from ckptd.models import architectures, configuration, unfamiliar
from ckptd.models.architectures import Architecture, Flag, Role

STAGE = "tie"


class Shaped(Protocol):
    """What is asked of a tensor: no more than a header says."""

    @property
    def dtype(self) -> Dtype:
        """The element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""


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


class Outcome(enum.StrEnum):
    """What becomes of a group."""

    TIED = "tied"
    """Several equal tensors became one."""
    SWAPPED = "swapped"
    """The content was under another name and gets the canonical one."""
    ALREADY = "already tied"
    """One tensor, and the flag says so."""
    APART = "kept apart"
    """Several tensors, each published."""
    MATERIALISED = "materialised"
    """Names that were missing are written as copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was decided for one group."""

    source: str
    outcome: Outcome
    names: tuple[str, ...]
    """The names dropped, kept or written, by outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do with the tensors and config.json; apply in the order of the fields."""

    copies: tuple[tuple[str, str], ...] = ()
    """(from, to): the tensor `from` also gets the absent name `to`."""
    renames: tuple[tuple[str, str], ...] = ()
    """(from, to): the tensor takes the absent name `to`."""
    drops: tuple[str, ...] = ()
    """Names that are left out."""
    writes: tuple[configuration.Write, ...] = ()
    """Keys of config.json that get a value."""
    results: tuple[Result, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences for the report."""

    @property
    def changes(self) -> bool:
        """Whether anything differs from the source checkpoint."""
        return bool(self.copies or self.renames or self.drops or self.writes)


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


def decide(
    ties: Ties, *, same: Mapping[tuple[str, str], bool], force: bool = False, untie: bool = False
) -> Decision:
    """Return what to publish.

    `same` says of each of `ties.pairs` whether the two tensors hold the same bytes. `force` ties
    what differs too (the source's content wins), `untie` writes out what is missing.

    Raises:
        StageRefused: the checkpoint contradicts its flag; or the class cannot do what is asked.
        ValueError: `force` together with `untie`.
        KeyError: `same` lacks a pair.
    """
    if force and untie:
        raise ValueError("force and untie exclude each other")
    different = {
        group.source: {n for n in group.alike if not same[group.anchor, n]} | set(group.unlike)
        for group in ties.groups
    }
    values: dict[Flag, bool] = {}
    notes: list[str] = []
    for flag in ties.flags:
        values[flag] = _value(ties, flag, different, force=force, untie=untie, notes=notes)
    parts = [
        _arrange(ties, group, values, different[group.source], force=force, untie=untie)
        for group in ties.groups
    ]
    writes = [w for flag, value in values.items() for w in _writes(ties, flag, value)]
    return Decision(
        copies=tuple(copy for part in parts for copy in part.copies),
        renames=tuple(rename for part in parts for rename in part.renames),
        drops=tuple(drop for part in parts for drop in part.drops),
        writes=tuple(dict.fromkeys(writes)),
        results=tuple(result for part in parts for result in part.results),
        notes=(*notes, *(note for part in parts for note in part.notes)),
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


def _value(
    ties: Ties,
    flag: Flag,
    different: Mapping[str, set[str]],
    *,
    force: bool,
    untie: bool,
    notes: list[str],
) -> bool:
    """Return the value the flag gets, or refuse."""
    now = flag.value(ties.config)
    mine = [group for group in ties.groups if any(t.flag == flag for t in group.targets)]
    apart = sorted(
        t.name for g in mine for t in g.targets if t.flag == flag and t.name in different[g.source]
    )
    if untie:
        if now and (why := _pinned(ties, flag, now)):
            raise _refused(ties, f"cannot untie: {why}", mine[0].source)
        return False
    if force:
        if not now and (why := _pinned(ties, flag, now)):
            raise _refused(ties, f"cannot tie: {why}", mine[0].source)
        return True
    if not now:
        for group in mine:
            _check_whole(ties, group, flag)
    if why := _pinned(ties, flag, now):
        if apart and now:
            notes.append(f"{', '.join(apart)}: kept apart with {flag.keys[0]} true, because {why}")
        return now
    if apart:
        return False
    if not ties.architecture.known and not now:
        return False
    decided = any(len(_present(group)) > 1 or not group.source_present for group in mine)
    return decided or now


def _pinned(ties: Ties, flag: Flag, now: bool) -> str | None:
    """Return why a flag must keep its value, or None."""
    name = ties.architecture.name
    if flag.forced is not None:
        return f"{name} takes it as {str(flag.forced).lower()} whatever config.json says"
    if flag.computes:
        return f"{name} also computes by {flag.keys[0]}"
    if flag.binds is not None and now:
        return f"{name} ties more by {flag.keys[0]} ({flag.binds} among others)"
    return None


def _check_whole(ties: Ties, group: TieGroup, flag: Flag) -> None:
    """Refuse a group that the flag says is several tensors, but of which one kind is missing."""
    missing = [
        t.name
        for t in group.targets
        if t.flag == flag and not t.present and not t.alias and t.name not in group.unlike
    ]
    anchor = next((t for t in group.targets if t.name == group.anchor), None)
    if anchor is not None and not anchor.alias:
        missing = [group.source]
    if not missing:
        return
    said = "says" if flag.explicit(ties.config) else f"by default of {ties.architecture.name} says"
    raise errors.StageRefused(
        f"is absent, but {flag.keys[0]} {said} it is not tied",
        stage=STAGE,
        path=ties.path,
        tensor=missing[0],
        expected=f"{missing[0]} beside {group.anchor}",
        found=group.anchor,
        hint=f"`force: true` ties it to {group.anchor}",
    )


def _refused(ties: Ties, what: str, tensor: str) -> errors.StageRefused:
    return errors.StageRefused(what, stage=STAGE, path=ties.path, tensor=tensor)


def _present(group: TieGroup) -> list[str]:
    """Return the names of the group that are there in whatever form, the anchor first."""
    return [group.anchor, *group.alike, *group.unlike]


def _arrange(
    ties: Ties,
    group: TieGroup,
    values: Mapping[Flag, bool],
    different: set[str],
    *,
    force: bool,
    untie: bool,
) -> Decision:
    """Return what one group needs on disk under the flags' values."""
    tied = {t.name for t in group.targets if values[t.flag]}
    apart = [t for t in group.targets if not values[t.flag]]
    if force:
        _check_forced(ties, group)
    drops = [
        name for name in _present(group)[1:] if name in tied and (force or name not in different)
    ]
    copies = [(group.anchor, t.name) for t in apart if not t.present and t.name not in different]
    renames = []
    if not group.source_present:
        if group.anchor in tied:
            renames.append((group.anchor, group.source))
        else:
            copies.append((group.anchor, group.source))
    notes = []
    if copies and not untie:
        names = ", ".join(name for _, name in copies)
        notes.append(f"{names}: written as copies of {group.anchor}, as the flag is false")
    kept = tuple(name for name in _present(group)[1:] if name not in drops)
    return Decision(
        copies=tuple(copies),
        renames=tuple(renames),
        drops=tuple(drops),
        results=(_result(group, drops, kept, copies, renames),),
        notes=tuple(notes),
    )


def _check_forced(ties: Ties, group: TieGroup) -> None:
    """Refuse to tie what cannot be one tensor."""
    if group.unlike:
        raise _refused(
            ties,
            f"cannot be tied to {group.anchor}: it has another dtype or shape, or is quantized",
            group.unlike[0],
        )


def _result(
    group: TieGroup,
    drops: list[str],
    kept: tuple[str, ...],
    copies: list[tuple[str, str]],
    renames: list[tuple[str, str]],
) -> Result:
    if copies:
        outcome, names = Outcome.MATERIALISED, tuple(name for _, name in copies)
    elif renames:
        outcome, names = Outcome.SWAPPED, (renames[0][0], *drops)
    elif drops:
        outcome, names = Outcome.TIED, tuple(drops)
    elif kept:
        outcome, names = Outcome.APART, kept
    else:
        outcome, names = Outcome.ALREADY, ()
    return Result(source=group.source, outcome=outcome, names=names)


def _writes(ties: Ties, flag: Flag, value: bool) -> tuple[configuration.Write, ...]:
    """Return what config.json needs: nothing where the content decided nothing new."""
    mine = [group for group in ties.groups if any(t.flag == flag for t in group.targets)]
    decided = any(len(_present(group)) > 1 or not group.source_present for group in mine)
    if value == flag.value(ties.config) and not decided:
        return ()
    if flag.computes or (not ties.architecture.known and value == flag.value(ties.config)):
        return ()
    return flag.writes(ties.config, value)
