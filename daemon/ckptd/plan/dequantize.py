"""From a group of quantized tensors to the expression that is its weight.

One way for the pipeline's stage and for models that are loaded. Arithmetic in float32 rounds once,
to the dtype that is asked for; the library's arithmetic gives the library's own dtype, and a cast
follows where another one is asked for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.plan import expression
from ckptd.plan.nodes import Decode, Expression
from ckptd.quant import configuration
from ckptd.quant.formula import Arith, Formula
from ckptd.quant.group import Found, Group

_ONE_ROUNDING = frozenset({Dtype.BF16, Dtype.F16, Dtype.F32})
"""What float32 arithmetic is rounded to at once; float64 is a cast of float32."""


def weight(group: Group, *, dtype: Dtype, arith: Arith) -> Expression:
    """Return the weight that `group` is, of its shape and in `dtype`."""
    made = dtype if arith is Arith.FLOAT32 and dtype in _ONE_ROUNDING else Dtype.F32
    made = group.dtype if arith is Arith.LIBRARY else made
    asked = [dataclasses.replace(one, dtype=made, arith=arith) for one in group.formulas]
    return expression.cast(_joined(asked, group.shape), dtype)


def default_dtype(config: Mapping[str, Any], found: Found) -> Dtype:
    """Return the dtype that config.json loads the model in, else the one most weights have."""
    try:
        dtype = dtypes.from_torch_name(configuration.compute_dtype(config) or "")
    except ValueError:
        return most_common_dtype(found)
    return dtype if dtype.is_plain_float else most_common_dtype(found)


def most_common_dtype(found: Found) -> Dtype:
    """Return the library's dtype of most weights; bfloat16 where there are none."""
    counted = Counter(group.dtype for group in found.groups)
    return counted.most_common(1)[0][0] if counted else Dtype.BF16


def arranged(
    names: Iterable[str], found: Found, *, taken: Sequence[Group], kept: Sequence[Group] = ()
) -> Iterator[tuple[str, str, Group | StoredTensor | None]]:
    """Yield what stands in the place of the stored tensors `names` once `taken` are decoded.

    Each is (stored name, plain name, the group that is decoded or the piece of the stored tensor, or
    None where it is the stored tensor), in the order of `names`; a weight stands where its first tensor stood, and a tensor of experts may be many weights. What
    only quantized inference needs goes, but for the modules of the groups that are `kept`. A plain
    name may come twice: refusing is the caller's.
    """
    makes: dict[str, list[Group]] = {}
    for group in taken:
        for name in group.consumed:
            makes.setdefault(name, []).append(group)
    still = {name for group in kept for name in group.consumed}
    modules = {_module(name) for name in still}
    gone = {n for n in found.dropped if n not in still and _module(n) not in modules}
    renamed, divided = dict(found.renamed), dict(found.divided)
    made: set[str] = set()
    for name in names:
        for piece in divided.get(name, ()):
            yield name, piece.spec.name, piece
        if name not in makes and name not in gone and name not in divided:
            yield name, renamed.get(name, name), None
        for group in makes.get(name, ()):
            if name not in gone and group.name not in made:
                made.add(group.name)
                yield name, group.name, group


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _joined(formulas: Sequence[Formula], shape: tuple[int, ...]) -> Expression:
    """Return the rows of `formulas`, one after the other, as a tensor of `shape`."""
    if sum(formula.rows for formula in formulas) == shape[0]:
        parts = [Decode(one, (one.rows, *shape[1:]), axis=0) for one in formulas]
        return expression.concat(parts)
    each = len(formulas) // shape[0]  # of each expert
    experts = [
        expression.concat(
            [Decode(one, (1, one.rows, *shape[2:]), axis=1) for one in formulas[at : at + each]],
            axis=1,
        )
        for at in range(0, len(formulas), each)
    ]
    return expression.concat(experts)
