"""FBGEMM FP8: a scale for each output, also of Llama 4's experts, whose matrices lie transposed.

`X.weight` (N, K) has `X.weight_scale` (N, 1). Experts `gate_up_proj` (E, H, 2I) and `down_proj`
(E, I, H) end in their outputs: their scales, written as (E, 1, 2I) and (E, H, 1), go along the last
axis. Source: `FbgemmFp8Quantize` and `FbgemmFp8Llama4TextExperts` of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.quant import parts
from ckptd.quant.formats import grids, narrow
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Found, Group, Stored

_SCALE = "_scale"
_DROPPED = (".input_scale_ub", ".input_scale")


@dataclass(frozen=True, slots=True)
class Fbgemm:
    """Checkpoints of FBGEMM's row-wise FP8."""

    name: str = "fbgemm_fp8"
    methods: tuple[str, ...] = ("fbgemm_fp8",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return None: without config.json it is no different from other FP8 with row scales."""
        del stored
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight that has scales.

        Raises:
            CheckpointCorrupt: codes without scales, scales without codes, or not one an output.
        """
        dtype = narrow.compute_dtype(stored)
        groups = [
            _experts(weight, dtype) if len(weight.codes.spec.shape) == 3 else _linear(weight, dtype)
            for weight in _weights(stored)
        ]
        used = {name for group in groups for name in group.consumed}
        for name, tensor in stored.tensors.items():
            if name.endswith((".weight_scale", "_proj_scale")) and name not in used:
                raise narrow.missing(tensor, name.removesuffix(_SCALE))
        dropped = tuple(name for name in stored.tensors if name.endswith(_DROPPED))
        return Found(groups=tuple(groups), dropped=dropped)


FORMAT = Fbgemm()


def _weights(stored: Stored) -> Iterator[narrow.Weight]:
    for name, tensor in stored.tensors.items():
        if tensor.spec.dtype in narrow.FLOAT8:
            scale = stored.tensors.get(name + _SCALE)
            if scale is None:
                raise narrow.missing(tensor, name + _SCALE)
            yield narrow.Weight(name=name, codes=tensor, scale=scale)


def _linear(weight: narrow.Weight, dtype: Dtype) -> Group:
    _, rows, _ = grids.matrices(weight.codes.spec.shape)
    if weight.scale.spec.numel not in (1, rows):
        raise narrow.wrong(weight.scale, f"[{rows}, 1], one a row")
    return narrow.eight_bit(weight, dtype=dtype)


def _experts(weight: narrow.Weight, dtype: Dtype) -> Group:
    """Return experts with a scale for each of their last axis, however it was written."""
    count, rows, columns = weight.codes.spec.shape
    shape = weight.scale.spec.shape
    floats = weight.scale.spec.dtype in narrow.FLOATS
    if (
        not count
        or not floats
        or shape not in ((count, 1, columns), (count, columns, 1), (count, columns))
    ):
        raise narrow.wrong(weight.scale, f"{[count, 1, columns]}, one a column of each expert")
    codes = parts.part(weight.codes, rows=count * rows, columns=columns)
    scale = parts.part(weight.scale, rows=count, columns=columns, is_scale=True)
    formulas = tuple(
        Scaled(codes=code, scale=part, block=(max(1, rows), 1), dtype=dtype)
        for code, part in zip(parts.stacked(codes, count), parts.stacked(scale, count), strict=True)
    )
    return narrow.group(weight, formulas, "float8 e4m3, a scale a column")
