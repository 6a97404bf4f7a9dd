"""PEFT's methods besides LoRA that change weights by products: AdaLoRA, (IA)3, LoHa, LoKr, VeRA.

Each is said in the expressions of a plan; what a method can do that is not here (matrices that were
not saved) is refused by name. Those that rotate or add waves are in `turning`.
Source: PEFT 0.21, the `layer` module of each method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptd.checkpoint.dtypes import Dtype
from ckptd.pipeline.adapter import turning
from ckptd.pipeline.adapter.expressions import reshaped
from ckptd.pipeline.adapter.keys import Factors, Keys
from ckptd.plan import expression
from ckptd.plan.nodes import Change, Changed, Columns, Expression

if TYPE_CHECKING:
    from ckptd.pipeline.adapter.merging import Merge

_KINDS = {
    "ADALORA": "lora_E", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "VERA": "vera_",
    "OFT": "oft_", "BOFT": "boft_", "FOURIERFT": "fourierft_", "C3A": "c3a_", "HRA": "hra_",
}  # fmt: skip
"""How the tensors of a method begin."""
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def apply(merge: Merge, others: Mapping[str, Mapping[str, str]]) -> None:
    """Put in what the adapter's method has for each module; AdaLoRA's is part of its factors.

    Raises:
        StageRefused: a part is missing, or of a kind that is not merged.
    """
    for module, parts in others.items():
        if not module or merge.settings.method == "ADALORA":
            continue
        kind = next(iter(parts))
        if kind == "ia3_l":
            _scale(merge, module, parts["ia3_l"])
        elif kind.startswith("hada_"):
            _add_hadamard(merge, module, parts)
        elif kind in turning.KINDS:
            turning.apply(merge, module, parts)
        elif kind.startswith("lokr_"):
            _add_kronecker(merge, module, parts)
        else:
            _add_vera(merge, module, parts, others.get("", {}))


def foreign(keys: Keys, method: str) -> str | None:
    """Return a tensor that no adapter of `method` has; None where there is none."""
    if method not in ("LORA", "ADALORA"):
        for factors in keys.factors.values():
            return factors.down or factors.up or factors.magnitude
    start = _KINDS.get(method)
    for parts in keys.others.values():
        for kind, name in parts.items():
            if start is None or not kind.startswith(start):
                return name
    return None


def singular_values(merge: Merge, module: str, down: Expression) -> Expression:
    """Return AdaLoRA's `(rank, inputs)` matrix with its rows times the module's singular values.

    Raises:
        StageRefused: they are not there.
    """
    parts = merge.others.get(module, {})
    if "lora_E" not in parts:
        merge.settings.refuse("has no lora_E, as AdaLoRA has", tensor=module)
    values = merge.adapter[parts["lora_E"]]
    if values.shape != (down.shape[0], 1):
        merge.misfit(parts["lora_E"], (down.shape[0], 1), values.shape)
    width = math.prod(down.shape[1:])
    down = reshaped(down, (down.shape[0], width))
    return Changed(down, width, Change.ROWS, (values,), (), 1.0, Dtype.F32)


def _scale(merge: Merge, module: str, name: str) -> None:
    """Multiply a module's outputs, or its inputs, by the numbers that were trained."""
    place = merge.place(f"{module}.weight", name)
    merge.claim(place, name)
    factor, value = merge.adapter[name], merge.now(place, exact=True)
    is_of_outputs = factor.shape[-1] == 1
    axis = 0 if is_of_outputs is not merge.settings.turned else 1
    length = expression.numel(factor)
    if len(value.shape) != 2 or length != value.shape[axis] or value.shape[0] == 1:
        merge.misfit(name, value.shape, factor.shape)
    numbers = reshaped(factor, (length,))
    if axis == 0:
        changed = Changed(
            value, value.shape[1], Change.ROWS, (numbers,), (), 1.0, merge.dtype(place)
        )
    else:
        changed = Changed(
            value, value.shape[1], Change.COLUMNS, (), (numbers,), 1.0, merge.dtype(place)
        )
    merge.made[place] = changed
    merge.trained.add(place)
    bias = merge.places.find(f"{module}.bias")
    if is_of_outputs and bias is not None:
        old = merge.now(bias, exact=True)
        merge.made[bias] = Changed(old, 1, Change.ROWS, (numbers,), (), 1.0, merge.dtype(bias))


def _add_hadamard(merge: Merge, module: str, parts: Mapping[str, str]) -> None:
    """Add LoHa's product of two products of matrices."""
    left, right, other_left, other_right = (
        merge.adapter[_part(merge, module, parts, kind)] for kind in _LOHA
    )
    name = parts[_LOHA[0]]
    if any(kind.startswith("hada_t") for kind in parts):
        _add_hadamard_kernel(merge, module, parts)
        return
    place, value = _matrix(merge, module, name, left.shape[0], right.shape[1])
    scale = merge.settings.scale(module, right.shape[0])
    merge.made[place] = Changed(
        value,
        right.shape[1],
        Change.HADAMARD,
        (left, other_left),
        (right, other_right),
        scale,
        merge.dtype(place),
    )


def _add_hadamard_kernel(merge: Merge, module: str, parts: Mapping[str, str]) -> None:
    """Add LoHa's product of two products for a convolution, each with a core for its kernel."""
    left, right, other_left, other_right = (merge.adapter[parts[kind]] for kind in _LOHA)
    cores = [merge.adapter[_part(merge, module, parts, kind)] for kind in ("hada_t1", "hada_t2")]
    name = parts[_LOHA[0]]
    shapes = [_of_kernel(merge, name, core, left, right) for core in cores]
    if left.shape != other_left.shape or right.shape != other_right.shape or len({*shapes}) != 1:
        merge.misfit(name, left.shape, other_left.shape)
    rows, width, kernel = shapes[0]
    place, value = _matrix(merge, module, name, rows, width)
    by_row = tuple(Columns(one, count=rows, turned=True) for one in (left, other_left))
    core, other_core = (reshaped(one, (*one.shape[:2], kernel)) for one in cores)
    merge.made[place] = Changed(
        value,
        width,
        Change.HADAMARD_KERNEL,
        by_row,
        (core, right, other_core, other_right),
        merge.settings.scale(module, right.shape[0]),
        merge.dtype(place),
    )


def _of_kernel(
    merge: Merge, name: str, core: Expression, left: Expression, right: Expression
) -> tuple[int, int, int]:
    """Return rows, columns with the kernel, and kernel of a core `(rank, rank, ...)` times two matrices."""
    rank = core.shape[0]
    if len(core.shape) < 3 or {core.shape[1], left.shape[0], right.shape[0]} != {rank}:
        merge.misfit(name, (rank, rank), (left.shape[0], right.shape[0]))
    kernel = math.prod(core.shape[2:])
    return left.shape[1], right.shape[1] * kernel, kernel


def _add_kronecker(merge: Merge, module: str, parts: Mapping[str, str]) -> None:
    """Add LoKr's Kronecker product, of matrices that are whole or products themselves."""
    outer, outer_shape = _whole_or_product(merge, module, parts, "lokr_w1")
    name = next(iter(parts.values()))
    if "lokr_t2" in parts:
        core, left, right = (
            merge.adapter[_part(merge, module, parts, kind)]
            for kind in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")
        )
        rows, columns, kernel = _of_kernel(merge, name, core, left, right)
        inner = [reshaped(core, (*core.shape[:2], kernel)), left, right]
    else:
        inner, (rows, columns) = _inner(merge, module, parts)
    width = outer_shape[1] * columns
    place, value = _matrix(merge, module, name, outer_shape[0] * rows, width)
    change = {
        (1, 1): Change.KRONECKER,
        (2, 1): Change.KRONECKER_LEFT,
        (1, 2): Change.KRONECKER_RIGHT,
        (2, 2): Change.KRONECKER_BOTH,
    }.get((len(outer), len(inner)), Change.KRONECKER_KERNEL)
    scale = merge.settings.scale(module, None)
    merge.made[place] = Changed(
        value, width, change, (), (*outer, *inner), scale, merge.dtype(place)
    )


def _inner(
    merge: Merge, module: str, parts: Mapping[str, str]
) -> tuple[list[Expression], tuple[int, int]]:
    """Return LoKr's second matrix, or the two it is the product of, and `(rows, columns)` with the kernel."""
    inner, shape = _whole_or_product(merge, module, parts, "lokr_w2")
    if len(shape) == 3:
        merge.settings.refuse(
            "LoKr whose second matrix is a whole kernel of one dimension is not merged: PEFT puts its "
            "elements in another order than the weight has",
            tensor=module,
        )
    width = math.prod(shape[1:])
    if len(inner) == 1:
        inner = [reshaped(inner[0], (shape[0], width))]
    return inner, (shape[0], width)


def _add_vera(
    merge: Merge, module: str, parts: Mapping[str, str], shared: Mapping[str, str]
) -> None:
    """Add VeRA's product: two matrices that all modules share, each scaled by the module's own."""
    if "vera_A" not in shared or "vera_B" not in shared:
        merge.settings.refuse(
            "VeRA's shared matrices were not saved with the adapter",
            tensor=module,
            hint="save it with save_projection=True",
        )
    lower = merge.adapter[_part(merge, module, parts, "vera_lambda_d")]
    upper = merge.adapter[_part(merge, module, parts, "vera_lambda_b")]
    down, up = merge.adapter[shared["vera_A"]], merge.adapter[shared["vera_B"]]
    name = parts["vera_lambda_b"]
    shape = merge.now(merge.place(f"{module}.weight", name)).shape
    inputs = shape[0] if merge.settings.turned else math.prod(shape[1:])
    if upper.shape[0] > up.shape[0] or inputs > down.shape[1] or lower.shape[0] != down.shape[0]:
        merge.misfit(name, (up.shape[0], down.shape[1]), (upper.shape[0], inputs))
    up = expression.rows(up, 0, upper.shape[0])
    merge.add_product(
        module,
        Factors(down=shared["vera_A"], up=name),
        Changed(Columns(down, count=inputs), inputs, Change.ROWS, (lower,), (), 1.0, Dtype.F32),
        Changed(up, up.shape[1], Change.ROWS, (upper,), (), 1.0, Dtype.F32),
        1.0,
    )


def _matrix(
    merge: Merge, module: str, name: str, rows: int, columns: int
) -> tuple[str, Expression]:
    """Return the place of a module's weight, and what stands there."""
    place = merge.place(f"{module}.weight", name)
    merge.claim(place, name)
    value = merge.now(place, exact=True)
    if value.shape[0] != rows or expression.numel(value) != rows * columns or rows == 1:
        merge.misfit(name, value.shape, (rows, columns))
    merge.trained.add(place)
    return place, value


def _whole_or_product(
    merge: Merge, module: str, parts: Mapping[str, str], kind: str
) -> tuple[list[Expression], tuple[int, ...]]:
    """Return a matrix as it is or as the two whose product it is, and its shape."""
    if kind in parts:
        whole = merge.adapter[parts[kind]]
        return [whole], whole.shape
    left = merge.adapter[_part(merge, module, parts, f"{kind}_a")]
    right = merge.adapter[_part(merge, module, parts, f"{kind}_b")]
    if len(left.shape) != 2 or left.shape[1] != right.shape[0]:
        merge.misfit(parts[f"{kind}_a"], (left.shape[0], right.shape[0]), left.shape)
    return [left, right], (left.shape[0], *right.shape[1:])


def _part(merge: Merge, module: str, parts: Mapping[str, str], kind: str) -> str:
    if kind not in parts:
        merge.settings.refuse(
            "has not all parts of an adapter",
            tensor=module,
            expected=kind,
            found=", ".join(parts),
            hint="the save was not whole: save the adapter again",
        )
    return parts[kind]
