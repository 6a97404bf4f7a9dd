"""What to publish of tensors that may be one parameter.

Pure: `find` (in `ties`) takes config.json and the specifications of the tensors; `decide` takes in
addition which pairs hold the same bytes, which whoever can read them has compared. The content
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
from collections.abc import Mapping
from dataclasses import dataclass

from ckptd import errors
from ckptd.models import configuration
from ckptd.models.architectures import Flag, Role
from ckptd.models.ties import STAGE, Target, TieGroup, Ties, find

__all__ = ["Decision", "Outcome", "Result", "Target", "TieGroup", "Ties", "decide", "find"]


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
    if (force or untie) and not ties.groups:
        _check_tieable(ties)
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
    mine = ties.governed(flag)
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
    return ties.decided(flag) or now


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


def _check_tieable(ties: Ties) -> None:
    """Refuse a wish about a class that has a head, or may have one, and ties nothing."""
    known = ties.architecture
    if known.known and Role.HEAD not in known.role_of.values():
        return
    why = "is not known to tie anything" if known.known else "is unknown, and so is its head's name"
    raise _refused(ties, f"neither ties nor unties here: {known.name} {why}", None)


def _refused(ties: Ties, what: str, tensor: str | None) -> errors.StageRefused:
    return errors.StageRefused(what, stage=STAGE, path=ties.path, tensor=tensor)


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
    if force and group.unlike:
        what = f"cannot be tied to {group.anchor}: it has another dtype or shape, or is quantized"
        raise _refused(ties, what, group.unlike[0])
    drops = [
        name for name in group.present[1:] if name in tied and (force or name not in different)
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
    kept = tuple(name for name in group.present[1:] if name not in drops)
    return Decision(
        copies=tuple(copies),
        renames=tuple(renames),
        drops=tuple(drops),
        results=(_result(group, drops, kept, copies, renames),),
        notes=tuple(notes),
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
    if value == flag.value(ties.config) and not ties.decided(flag):
        return ()
    if flag.computes or (not ties.architecture.known and value == flag.value(ties.config)):
        return ()
    return flag.writes(ties.config, value)
