"""The mathematics of adapters that are no product of two matrices (`nodes.Change`), on some rows.

Source: PEFT's layers `ia3`, `loha`, `lokr` (the methods of LyCORIS) and `oft`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ckptd.plan.nodes import Change


def apply(
    rows: torch.Tensor,
    change: Change,
    by_row: Sequence[torch.Tensor],
    whole: Sequence[torch.Tensor],
    *,
    scale: float,
    first: int,
) -> None:
    """Change `rows`, which are float32 and number `first` and after of a matrix, in place."""
    match change:
        case Change.ROWS:
            rows.mul_(by_row[0].reshape(-1, 1))
        case Change.COLUMNS:
            rows.mul_(whole[0].reshape(1, -1))
        case Change.HADAMARD:
            (left, other_left), (right, other_right) = by_row, whole
            product = (left @ right).mul_(other_left @ other_right)
            rows.add_(product.view(rows.shape), alpha=scale)
        case Change.ROTATION:
            rotations = _rotations(whole[0], terms=int(scale))
            size = rotations.shape[-1]
            stretches = rows.view(len(rows), -1, size)
            rows.copy_(
                torch.einsum(
                    "nkb,kcb->nkc", stretches, rotations.expand(stretches.shape[1], size, size)
                ).reshape(rows.shape)
            )
        case _:
            outer, inner = _matrices(change, whole)
            block = inner.shape[0]
            numbers = torch.arange(first, first + len(rows), device=rows.device)
            left, right = outer[numbers // block], inner[numbers % block]
            rows.add_((left.unsqueeze(2) * right.unsqueeze(1)).view(rows.shape), alpha=scale)


def _rotations(above: torch.Tensor, *, terms: int) -> torch.Tensor:
    """Return a rotation `(size, size)` for each row of `above`, as PEFT's OFT makes it."""
    size = (1 + math.isqrt(1 + 8 * above.shape[1])) // 2
    skew = above.new_zeros(len(above), size, size)
    at = torch.triu_indices(size, size, 1, device=above.device)
    skew[:, at[0], at[1]] = above
    skew = skew - skew.transpose(1, 2)
    one = torch.eye(size, device=above.device).expand_as(skew)
    if not terms:
        exact: torch.Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
        return exact
    total, power = one.clone(), one
    for term in range(1, terms):
        power = power @ skew
        total.add_(power, alpha=1.0 if term == terms - 1 and terms > 2 else 2.0)
    return total


def _matrices(change: Change, whole: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two matrices of a Kronecker product."""
    match change, list(whole):
        case Change.KRONECKER, [outer, inner]:
            return outer, inner
        case Change.KRONECKER_LEFT, [left, right, inner]:
            return left @ right, inner
        case Change.KRONECKER_RIGHT, [outer, left, right]:
            return outer, left @ right
    left, right, other_left, other_right = whole
    return left @ right, other_left @ other_right
