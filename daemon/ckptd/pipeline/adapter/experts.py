"""Adapters of parameters (`target_parameters`): the experts of a layer as one tensor in memory.

`lora_A` is `(experts * rank, inputs)`, an expert's rows together; `lora_B` is `(outputs,
rank * experts)`, in which the rank runs slower than its experts. In files the experts may be one
tensor, either way round, or tensors of their own. A parameter of one module counts as one expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.pipeline.adapter.keys import Factors
from ckptd.plan import expression
from ckptd.plan.nodes import Columns, Concat, Expression, LowRank

if TYPE_CHECKING:
    from ckptd.pipeline.adapter.merging import Merge


def add(merge: Merge, module: str, factors: Factors, down: Expression, up: Expression) -> None:
    """Add the product of two matrices to the parameter of `module` that they fit.

    Raises:
        StageRefused: no parameter, or several.
    """
    if merge.settings.dora:
        merge.settings.refuse("DoRA of a parameter is not merged", tensor=factors.down)
    fits: list[tuple[str, tuple[int, bool]]] = []
    for listed in merge.settings.target_parameters:
        owner, _, parameter = listed.rpartition(".")
        if owner and not (module == owner or module.endswith(f".{owner}")):
            continue
        name = f"{module}.{parameter}"
        if any(name == one for one, _ in fits):
            continue
        way = _way(merge, name, down, up)
        if way is not None and f"{name} (lora)" not in merge.taken:
            fits.append((name, way))
    if len(fits) != 1:
        merge.settings.refuse(
            "may belong to several parameters" if fits else "finds no place in the base model",
            tensor=factors.down,
            expected=", ".join(name for name, _ in fits) or f"{module}.weight",
            hint="is it the right base? name another with `base:`",
        )
    name, (count, turned) = fits[0]
    merge.claim(f"{name} (lora)", factors.down or "")
    scale = merge.settings.scale(name, down.shape[0] // count)
    _sum(merge, name, down, up, count, scale, turned=turned)


def _way(merge: Merge, name: str, down: Expression, up: Expression) -> tuple[int, bool] | None:
    """Return number and orientation of the experts of a parameter, if the matrices fit it."""
    place = merge.places.find(name)
    outputs, inputs = up.shape[0], down.shape[1]
    if place is not None:
        shape = merge.base[place].shape
        if len(shape) == 2:
            shape = (1, *shape)
        ways = [
            turned
            for turned, wanted in ((False, (outputs, inputs)), (True, (inputs, outputs)))
            if shape[1:] == wanted
        ]
        if len(ways) != 1 or down.shape[0] % shape[0] or up.shape[1] != down.shape[0]:
            return None
        return shape[0], ways[0]
    listed = merge.places.experts(name)
    if not listed or down.shape[0] % len(listed) or up.shape[1] != down.shape[0]:
        return None
    rows = sum(merge.base[part].shape[0] for part in listed[0])
    if rows != outputs or any(merge.base[part].shape[1:] != (inputs,) for part in listed[0]):
        return None
    return len(listed), False


def _sum(
    merge: Merge,
    name: str,
    down: Expression,
    up: Expression,
    count: int,
    scale: float,
    *,
    turned: bool,
) -> None:
    """Add each expert's product."""
    rank = down.shape[0] // count
    place = merge.places.find(name)
    parts: list[Expression] = []
    for expert in range(count):
        mine = expression.rows(down, expert * rank, (expert + 1) * rank)
        if place is None:
            _sum_apart(merge, merge.places.experts(name)[expert], mine, up, expert, count, scale)
            continue
        value = merge.now(place, exact=True)
        if len(value.shape) == 3:
            value = expression.rows(value, expert, expert + 1)
        factors: tuple[Expression, Expression] = (mine, Columns(up, rank, expert, count))
        if turned:
            factors = (
                Columns(up, rank, expert, count, turned=True),
                Columns(mine, mine.shape[1], turned=True),
            )
        parts.append(LowRank(value, *factors, scale, merge.dtype(place)))
    if place is not None:
        merge.made[place] = parts[0] if count == 1 else Concat(tuple(parts), 0)
        merge.trained.add(place)


def _sum_apart(
    merge: Merge,
    tensors: list[str],
    down: Expression,
    up: Expression,
    expert: int,
    count: int,
    scale: float,
) -> None:
    """Add one expert's product to the tensors that it has in the files, one below the other."""
    rank, start = down.shape[0], 0
    for tensor in tensors:
        value = merge.now(tensor, exact=True)
        stop = start + value.shape[0]
        rows = Columns(expression.rows(up, start, stop), rank, expert, count)
        merge.made[tensor] = LowRank(value, down, rows, scale, merge.dtype(tensor))
        merge.trained.add(tensor)
        start = stop
