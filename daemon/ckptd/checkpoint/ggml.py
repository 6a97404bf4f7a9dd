"""The element types of GGUF files: their numbers, names, and how many bytes a block takes.

A plain type is one of ours. A block type packs `elements` neighbours of a row into `block_bytes`,
scales and codes together; its tensors are seen as `U8`, rows of whole blocks.
Source: `enum ggml_type` and the block structures of ggml (ggml.h, ggml-common.h).
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One element type; `dtype` is set for plain ones, whose blocks are single elements."""

    name: str
    elements: int
    block_bytes: int
    dtype: Dtype | None = None


def _plain(name: str, dtype: Dtype) -> GgmlType:
    return GgmlType(name, 1, dtype.bits // 8, dtype)


TYPES: dict[int, GgmlType] = {
    0: _plain("F32", Dtype.F32),
    1: _plain("F16", Dtype.F16),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    9: GgmlType("Q8_1", 32, 36),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: _plain("I8", Dtype.I8),
    25: _plain("I16", Dtype.I16),
    26: _plain("I32", Dtype.I32),
    27: _plain("I64", Dtype.I64),
    28: _plain("F64", Dtype.F64),
    29: GgmlType("IQ1_M", 256, 56),
    30: _plain("BF16", Dtype.BF16),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
    42: GgmlType("Q2_0", 64, 18),
}
"""By their number in a file."""

BLOCK_TYPES: dict[str, GgmlType] = {
    kind.name: kind for kind in TYPES.values() if kind.dtype is None
}
"""Those that pack several elements, by name."""

REMOVED: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Numbers that files once used and that llama.cpp no longer reads either."""
