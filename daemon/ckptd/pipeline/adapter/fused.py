"""Modules that are one in memory and several in the files, or parts of one there.

A weight in memory stands then for stretches of rows: `q_proj` for the first third of the file's
`qkv`, `gate_up_proj` for the file's `gate_proj` above its `up_proj`. Each stretch gets its rows of
the product; what belongs to one file's tensor is joined when all modules were seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.pipeline.adapter.keys import Factors
from ckptd.pipeline.adapter.renaming import Piece
from ckptd.plan import expression
from ckptd.plan.nodes import Expression, LowRank

if TYPE_CHECKING:
    from ckptd.pipeline.adapter.merging import Merge


def add(
    merge: Merge,
    module: str,
    pieces: tuple[Piece, ...],
    factors: Factors,
    down: Expression,
    up: Expression,
) -> None:
    """Add the product of two matrices to the rows that `module` is in the files.

    Raises:
        StageRefused: they do not fit, or the adapter changes the bias, too.
    """
    merge.claim(f"{module} (lora)", factors.down or "")
    spans = [_span(merge, piece, factors.down or "") for piece in pieces]
    outputs = _require_fit(merge, spans, factors, down, up)
    scale = merge.settings.scale(module, down.shape[0])
    magnitude = merge.magnitude(module, factors)
    if magnitude is not None and magnitude.shape != (outputs,):
        merge.misfit(factors.magnitude or "", (outputs,), magnitude.shape)
    at = 0
    for tensor, start, stop in spans:
        end = at + stop - start
        value = expression.rows(merge.exact[tensor], start, stop)
        rows, lengths = expression.rows(up, at, end), magnitude
        if lengths is not None:
            lengths = expression.rows(lengths, at, end)
        made = LowRank(value, down, rows, scale, merge.dtype(tensor), lengths)
        merge.cut.setdefault(tensor, []).append((start, stop, made))
        merge.trained.add(tensor)
        at = end


def _require_fit(
    merge: Merge,
    spans: list[tuple[str, int, int]],
    factors: Factors,
    down: Expression,
    up: Expression,
) -> int:
    """Return the rows of all stretches together, which the two matrices fit."""
    outputs = sum(stop - start for _, start, stop in spans)
    widths = {merge.base[tensor].shape[1:] for tensor, _, _ in spans}
    if len(down.shape) != 2 or up.shape != (outputs, down.shape[0]) or widths != {down.shape[1:]}:
        expected = (outputs, *next(iter(widths)))
        merge.misfit(factors.down or "", expected, (up.shape[0], *down.shape[1:]))
    if factors.bias is not None:
        merge.settings.refuse(
            "changes the bias of a module that the base's files have in another division",
            tensor=factors.bias,
        )
    return outputs


def join(merge: Merge) -> None:
    """Put the stretches of each tensor together, with the base's rows between them.

    Raises:
        StageRefused: a tensor was changed as a whole, too.
    """
    for tensor, stretches in merge.cut.items():
        merge.claim(f"{tensor} (lora)", tensor)
        if tensor in merge.made:
            merge.settings.refuse("is changed as a whole and in parts", tensor=tensor)
        parts: list[Expression] = []
        at = 0
        for start, stop, made in sorted(stretches, key=lambda stretch: stretch[0]):
            if at < start:
                parts.append(expression.rows(merge.base[tensor], at, start))
            parts.append(made)
            at = stop
        if at < merge.base[tensor].shape[0]:
            parts.append(expression.rows(merge.base[tensor], at, merge.base[tensor].shape[0]))
        merge.made[tensor] = expression.concat(parts)


def _span(merge: Merge, piece: Piece, name: str) -> tuple[str, int, int]:
    rows = merge.base[piece.tensor].shape[0]
    if rows % piece.parts:
        merge.misfit(name, (rows - rows % piece.parts,), (rows,))
    each = rows // piece.parts
    return piece.tensor, piece.part * each, (piece.part + 1) * each
