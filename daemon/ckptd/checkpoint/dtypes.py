"""Element types as safetensors names them, with their widths and torch names.

Source: the safetensors format description (dtype strings of its header) and torch's dtype names.
"""

from __future__ import annotations

import enum
from typing import Self


class Dtype(enum.StrEnum):
    """An element type; the value is the spelling in a safetensors header."""

    F64 = "F64", 64
    F32 = "F32", 32
    F16 = "F16", 16
    BF16 = "BF16", 16
    F8_E4M3 = "F8_E4M3", 8
    F8_E5M2 = "F8_E5M2", 8
    F8_E8M0 = "F8_E8M0", 8
    F8_E4M3FNUZ = "F8_E4M3FNUZ", 8
    F8_E5M2FNUZ = "F8_E5M2FNUZ", 8
    F6_E3M2 = "F6_E3M2", 6
    F6_E2M3 = "F6_E2M3", 6
    F4 = "F4", 4
    C64 = "C64", 64
    I64 = "I64", 64
    I32 = "I32", 32
    I16 = "I16", 16
    I8 = "I8", 8
    U64 = "U64", 64
    U32 = "U32", 32
    U16 = "U16", 16
    U8 = "U8", 8
    BOOL = "BOOL", 8

    bits: int
    """The width of one element in bits."""

    def __new__(cls, name: str, bits: int = 0) -> Self:
        """A member is its spelling and carries its width (an attribute: it is asked for often)."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.bits = bits
        return member

    @property
    def alignment(self) -> int:
        """The offset multiple in bytes that lets a reader view the tensor in place."""
        return max(1, self.bits // 8)

    @property
    def is_plain_float(self) -> bool:
        """Whether values of this type are ordinary weights: 16 bits or wider, real."""
        return self in _PLAIN_FLOATS

    @property
    def torch_name(self) -> str | None:
        """The attribute of torch that is this type, or None where torch has none."""
        return _TORCH_NAMES.get(self)


_PLAIN_FLOATS = frozenset({Dtype.F64, Dtype.F32, Dtype.F16, Dtype.BF16})

_TORCH_NAMES = {
    Dtype.F64: "float64",
    Dtype.F32: "float32",
    Dtype.F16: "float16",
    Dtype.BF16: "bfloat16",
    Dtype.F8_E4M3: "float8_e4m3fn",
    Dtype.F8_E5M2: "float8_e5m2",
    Dtype.F8_E8M0: "float8_e8m0fnu",
    Dtype.F8_E4M3FNUZ: "float8_e4m3fnuz",
    Dtype.F8_E5M2FNUZ: "float8_e5m2fnuz",
    Dtype.C64: "complex64",
    Dtype.I64: "int64",
    Dtype.I32: "int32",
    Dtype.I16: "int16",
    Dtype.I8: "int8",
    Dtype.U64: "uint64",
    Dtype.U32: "uint32",
    Dtype.U16: "uint16",
    Dtype.U8: "uint8",
    Dtype.BOOL: "bool",
}

_FROM_TORCH = {name: dtype for dtype, name in _TORCH_NAMES.items()}
_FROM_TORCH |= {"half": Dtype.F16, "float": Dtype.F32, "double": Dtype.F64}


def from_torch_name(name: str) -> Dtype:
    """Return the type that torch (and config.json) calls `name`; `torch.` may stand before it.

    Raises:
        ValueError: torch has no such type, or a checkpoint cannot hold it.
    """
    dtype = _FROM_TORCH.get(name.removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"unknown dtype {name!r} (write bfloat16, float16, float32...)")
    return dtype
