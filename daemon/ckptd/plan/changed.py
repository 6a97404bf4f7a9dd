"""The mathematics of adapters that are no product of two matrices (`nodes.Change`), on some rows.

Source: PEFT's layers `ia3`, `loha`, `lokr` (the methods of LyCORIS), `oft`, `boft`, `fourierft`, `c3a`
and `hra`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ckptd.plan import fourier
from ckptd.plan.nodes import Change

_NUM_WAVES = 64
"""Numbers of a spectrum that are added at a time: what bounds the memory."""


def apply(
    rows: torch.Tensor,
    change: Change,
    by_row: Sequence[torch.Tensor],
    whole: Sequence[torch.Tensor],
    *,
    scale: float,
    first: int,
    numbers: Sequence[float] = (),
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
            rotations = _rotations(_bounded(whole[0], *numbers), terms=int(scale))
            size = rotations.shape[-1]
            stretches = rows.view(len(rows), -1, size)
            rows.copy_(
                torch.einsum(
                    "nkb,kcb->nkc", stretches, rotations.expand(stretches.shape[1], size, size)
                ).reshape(rows.shape)
            )
        case Change.HADAMARD_KERNEL:
            (left, other_left), (core, right, other_core, other_right) = by_row, whole
            product = _kernel(core, left.T, right).mul_(
                _kernel(other_core, other_left.T, other_right)
            )
            rows.add_(product, alpha=scale)
        case Change.BUTTERFLY:
            for turn in range(len(whole[0])):
                _turn(rows, whole[0], turn)
            rows.mul_(by_row[0].reshape(-1, 1))
        case Change.FOURIER:
            _add_waves(rows, whole[0], scale=scale, first=first, numbers=numbers)
        case Change.CIRCULANT:
            across, size = whole[0].shape[1:]
            of_row = torch.arange(first, first + len(rows), device=rows.device)
            moved = torch.arange(size, device=rows.device) - (of_row % size).unsqueeze(1)
            at = (moved % size).unsqueeze(1).expand(len(rows), across, size)
            rows.add_(whole[0][of_row // size].gather(2, at).reshape(rows.shape), alpha=scale)
        case Change.REFLECTION:
            _reflect(rows, whole[0], together=bool(scale))
        case _:
            outer, inner = _matrices(change, whole)
            block = inner.shape[0]
            of_row = torch.arange(first, first + len(rows), device=rows.device)
            left, right = outer[of_row // block], inner[of_row % block]
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
        case Change.KRONECKER_KERNEL, [outer, core, left, right]:
            return outer, _kernel(core, left, right)
        case Change.KRONECKER_KERNEL, [first, second, core, left, right]:
            return first @ second, _kernel(core, left, right)
        case Change.KRONECKER_LEFT, [left, right, inner]:
            return left @ right, inner
        case Change.KRONECKER_RIGHT, [outer, left, right]:
            return outer, left @ right
    left, right, other_left, other_right = whole
    return left @ right, other_left @ other_right


def _kernel(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `(rows, columns * kernel)` of `(rank, rank, kernel)`, `(rank, rows)`, `(rank, columns)`."""
    return torch.einsum("ijk,ip,jr->prk", core, left, right).flatten(1)


def _bounded(above: torch.Tensor, bound: float | None = None) -> torch.Tensor:
    """Return the skew matrices of OFT, each made as short as `bound` says, where it does (COFT)."""
    if bound is None:
        return above
    most = bound / math.sqrt(len(above))
    lengths = math.sqrt(2) * above.norm(dim=1, keepdim=True)  # each number stands there twice
    return torch.where(lengths <= most, above, above * (most / lengths))


def _turn(rows: torch.Tensor, turns: torch.Tensor, turn: int) -> None:
    """Rotate `rows` in place by one of BOFT's turns `(blocks, size, size)`, among mixed columns."""
    num_turns, blocks, size, _ = turns.shape
    order = torch.arange(blocks * size, device=rows.device)
    if num_turns > 1:  # halves of blocks change places within wider ones: even ones first
        halves = order.view(blocks >> turn, -1, size // 2)
        order = torch.cat((halves[:, ::2], halves[:, 1::2]), dim=1).flatten()
    skew = 0.5 * (turns[turn] - turns[turn].mT)
    one = torch.eye(size, device=rows.device).expand_as(skew)
    rotations = torch.linalg.solve(one + skew, one - skew, left=False)
    mixed = torch.empty_like(rows)
    mixed[:, order] = rows
    stretches = mixed.view(len(rows), blocks, size)
    turned = torch.einsum("nkb,kcb->nkc", stretches, rotations).reshape(rows.shape)
    rows.copy_(turned[:, order])


def _add_waves(
    rows: torch.Tensor,
    spectrum: torch.Tensor,
    *,
    scale: float,
    first: int,
    numbers: Sequence[float],
) -> None:
    """Add the rows of FourierFT's inverse transform: a sum of waves, one for each number."""
    seed, height, width, is_turned = (int(number) for number in numbers)
    places = fourier.places(seed, height * width, len(spectrum))
    at = torch.tensor(places, device=rows.device)
    down, across, sides = at // width, at % width, (height, width)
    if is_turned:
        down, across, sides = across, down, (width, height)
    of_row = torch.arange(first, first + len(rows), device=rows.device)
    of_column = torch.arange(rows.shape[1], device=rows.device)
    for begin in range(0, len(spectrum), _NUM_WAVES):
        some = slice(begin, begin + _NUM_WAVES)
        turn = 2 * math.pi
        a = (of_row.unsqueeze(1) * down[some] % sides[0]).float() * (turn / sides[0])
        b = (across[some].unsqueeze(1) * of_column % sides[1]).float() * (turn / sides[1])
        values = spectrum[some] / (height * width)
        rows.addmm_(a.cos() * values, b.cos(), alpha=scale)
        rows.addmm_(a.sin() * values, b.sin(), alpha=-scale)


def _reflect(rows: torch.Tensor, across: torch.Tensor, *, together: bool) -> None:
    """Reflect `rows` in place at the planes across the columns of `(columns, planes)` (HRA)."""
    if together:
        directions: list[torch.Tensor] = []
        for number in range(across.shape[1]):
            direction = across[:, number]
            for before in directions:
                direction = direction - (before @ direction) * before
            directions.append(direction / direction.norm())
        all_of_them = torch.stack(directions, dim=1)
        rows.addmm_(rows @ all_of_them, all_of_them.T, alpha=-2.0)
        return
    units = across / across.norm(dim=0)
    for number in range(across.shape[1]):
        direction = units[:, number]
        rows.addr_(rows @ direction, direction, alpha=-2.0)
