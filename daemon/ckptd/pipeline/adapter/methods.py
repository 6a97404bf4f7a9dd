"""PEFT's methods besides LoRA that change weights: AdaLoRA, (IA)3, LoHa, LoKr, VeRA, OFT.

Each is said in the expressions of a plan; what a method can do that is not here (tensors of
convolutions in more than two dimensions, matrices that were not saved) is refused by name.
Source: PEFT 0.21, the `layer` module of each method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptd.checkpoint.dtypes import Dtype
from ckptd.pipeline.adapter.expressions import reshaped
from ckptd.pipeline.adapter.keys import Factors, Keys
from ckptd.plan import expression
from ckptd.plan.nodes import Change, Changed, Columns, Expression

if TYPE_CHECKING:
    from ckptd.pipeline.adapter.merging import Merge

_KINDS = {"ADALORA": "lora_E", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "VERA": "vera_"} | {
    "OFT": "oft_"
}
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
        elif kind == "oft_R":
            _rotate(merge, module, parts["oft_R"])
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
        merge.settings.refuse("LoHa of a convolution's kernel is not merged", tensor=module)
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


def _add_kronecker(merge: Merge, module: str, parts: Mapping[str, str]) -> None:
    """Add LoKr's Kronecker product, of matrices that are whole or products themselves."""
    outer, outer_shape = _whole_or_product(merge, module, parts, "lokr_w1")
    inner, inner_shape = _whole_or_product(merge, module, parts, "lokr_w2")
    name = next(iter(parts.values()))
    if "lokr_t2" in parts or len(inner_shape) != 2:
        merge.settings.refuse("LoKr of a convolution's kernel is not merged", tensor=module)
    width = outer_shape[1] * inner_shape[1]
    place, value = _matrix(merge, module, name, outer_shape[0] * inner_shape[0], width)
    change = {
        (1, 1): Change.KRONECKER,
        (2, 1): Change.KRONECKER_LEFT,
        (1, 2): Change.KRONECKER_RIGHT,
        (2, 2): Change.KRONECKER_BOTH,
    }[len(outer), len(inner)]
    scale = merge.settings.scale(module, None)
    merge.made[place] = Changed(
        value, width, change, (), (*outer, *inner), scale, merge.dtype(place)
    )


def _rotate(merge: Merge, module: str, name: str) -> None:
    """Rotate a module's inputs, stretch by stretch (OFT)."""
    above = merge.adapter[name]
    place = merge.place(f"{module}.weight", name)
    merge.claim(place, name)
    value = merge.now(place, exact=True)
    if len(value.shape) != 2 or merge.settings.turned or value.shape[0] == 1:
        merge.settings.refuse("OFT is merged into linear weights alone", tensor=name)
    width = value.shape[1]
    size = (1 + math.isqrt(1 + 8 * above.shape[-1])) // 2
    fits = len(above.shape) == 2 and size * (size - 1) // 2 == above.shape[1] and size
    if not fits or width % size or above.shape[0] not in (1, width // size):
        merge.misfit(name, value.shape, above.shape)
    terms = float(merge.settings.terms)
    dtype = merge.dtype(place)
    merge.made[place] = Changed(value, width, Change.ROTATION, (), (above,), terms, dtype)
    merge.trained.add(place)


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
