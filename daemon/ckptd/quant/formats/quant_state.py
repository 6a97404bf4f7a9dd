"""The settings that bitsandbytes keeps beside each 4-bit weight: a JSON document in a U8 tensor.

Read with suspicion: every value is checked, and only what the library itself dequantizes is taken.
Source: QuantState.as_dict(packed=True) of bitsandbytes 0.50, unchanged since 0.39.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant.group import Stored

KINDS = ("nf4", "fp4")
"""The tables that the library knows."""
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that the library dequantizes."""
_DTYPES = (Dtype.BF16, Dtype.F16, Dtype.F32)
_MAX_FLOAT32 = 3.4028234663852886e38
_MAX_AXES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """How the scales are quantized in turn."""

    block: int
    offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantState:
    """The settings of one weight; `shape` is as it was quantized."""

    kind: str
    block: int
    dtype: Dtype
    shape: tuple[int, ...]
    nested: Nested | None

    @property
    def numel(self) -> int:
        """The elements of the weight."""
        return math.prod(self.shape)


def read(stored: Stored, tensor: StoredTensor, kind: str) -> QuantState:
    """Return the settings in `tensor`, whose name says that the table is `kind`.

    Raises:
        CheckpointCorrupt: it is not such a document; names the setting.
        CheckpointUnsupported: a setting that the library does not dequantize either.
    """
    return _Document(tensor, _loaded(stored, tensor)).state(kind)


def _loaded(stored: Stored, tensor: StoredTensor) -> Mapping[str, Any]:
    spec = tensor.spec
    if spec.dtype is not Dtype.U8:
        _corrupt(tensor, "is not text", "U8", f"{spec.dtype}")
    try:
        value = json.loads(stored.peek(tensor))
    except (ValueError, RecursionError) as error:
        _corrupt(tensor, f"is not JSON: {error}", "the settings of a 4-bit weight", None)
    if not isinstance(value, dict):
        _corrupt(tensor, "is not a JSON object", "the settings of a 4-bit weight", _short(value))
    return value


@dataclass(frozen=True, slots=True)
class _Document:
    tensor: StoredTensor
    values: Mapping[str, Any]

    def state(self, kind: str) -> QuantState:
        if self.values.get("quant_type") != kind:
            self._corrupt("quant_type", kind)
        return QuantState(
            kind=kind,
            block=self._block(),
            dtype=self._dtype(),
            shape=self._shape(),
            nested=self._nested(),
        )

    def _block(self) -> int:
        value = self.values.get("blocksize")
        if type(value) is not int or value not in _BLOCKS:
            self._unsupported("blocksize", f"one of {', '.join(map(str, _BLOCKS))}")
        return value

    def _dtype(self) -> Dtype:
        value = self.values.get("dtype")
        try:
            found = dtypes.from_torch_name(value) if isinstance(value, str) else None
        except ValueError:
            found = None
        if found not in _DTYPES:
            self._unsupported("dtype", "bfloat16, float16 or float32")
        return found

    def _shape(self) -> tuple[int, ...]:
        value = self.values.get("shape")
        if not isinstance(value, list) or not 1 <= len(value) <= _MAX_AXES:
            self._corrupt("shape", "a list of lengths")
        if not all(type(length) is int and 0 <= length < 1 << 63 for length in value):
            self._corrupt("shape", "a list of lengths")
        return tuple(value)

    def _nested(self) -> Nested | None:
        if not any(key.startswith("nested_") for key in self.values):
            return None
        block = self.values.get("nested_blocksize")
        if type(block) is not int or not 0 < block < 1 << 31:
            self._corrupt("nested_blocksize", "a positive number")
        offset = self.values.get("nested_offset")
        if not isinstance(offset, int | float) or not abs(offset) <= _MAX_FLOAT32:
            self._corrupt("nested_offset", "a finite number")
        if self.values.get("nested_dtype") != "float32":
            self._unsupported("nested_dtype", "float32")
        return Nested(block=block, offset=float(offset))

    def _corrupt(self, key: str, expected: str) -> NoReturn:
        _corrupt(self.tensor, f"{key} is wrong", expected, _short(self.values.get(key)))

    def _unsupported(self, key: str, expected: str) -> NoReturn:
        raise CheckpointUnsupported(
            f"{key} is none that bitsandbytes dequantizes",
            path=self.tensor.extent.path,
            tensor=self.tensor.spec.name,
            expected=expected,
            found=_short(self.values.get(key)),
        )


def _corrupt(tensor: StoredTensor, what: str, expected: str, found: str | None) -> NoReturn:
    raise CheckpointCorrupt(
        what,
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=found,
        hint="save the model again with bitsandbytes or transformers",
    )


def _short(value: object) -> str:
    return repr(value)[:80]
