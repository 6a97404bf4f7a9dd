"""HQQ: `X.W_q` with float scales and zeros, and its settings as tensors beside it.

Every module says itself how it was quantized, in scalars, shapes and ASCII text of a few bytes;
what config.json says is not needed. Scales and zeros that are quantized in turn are refused: the
library does not save them so.

Source: the state dict of HQQLinear (hqq 0.2.8), which transformers saves module by module.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import expert_names
from ckptd.quant.formula import ceil_div
from ckptd.quant.formulas.slabs import Rule, Slabs
from ckptd.quant.group import Found, Group, Stored
from ckptd.quant.parts import Part

_CODES = ".W_q"
_PARTNERS = ("scale", "zero", "zero_scale")
_SETTINGS = (
    "axis",
    "channel_wise",
    "compute_dtype",
    "encoded_state_dict",
    "group_size",
    "nbits",
    "offload_meta",
    "optimize",
    "packing",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "shape",
    "stores_quant_config",
    "unpack_view_dtype",
    "view_as_float",
)
_NESTED = ("scale_q", "zero_q", "meta_scale", "meta_zero")
_PACKINGS: dict[str, tuple[Dtype, int, tuple[int, ...]]] = {
    "8bit_u8": (Dtype.U8, 8, (8, 6, 5)),
    "4bit_u8": (Dtype.U8, 4, (4,)),
    "3bit_32": (Dtype.I32, 3, (3,)),
    "2bit_u8": (Dtype.U8, 2, (2, 1)),  # 1.58 bits, read as a whole number
    "1bit_u8": (Dtype.U8, 1, (1,)),
}
"""What is packed into what, the width of a field, and the settings of nbits that use it."""
_NUMBERS = {Dtype.U8: "B", Dtype.BOOL: "B", Dtype.I32: "i", Dtype.I64: "q", Dtype.F32: "f"}


@dataclass(frozen=True, slots=True)
class _Module:
    """One quantized module as it lies in the files; raises what is wrong with it by name."""

    stored: Stored
    name: str

    def tensor(self, field: str) -> StoredTensor | None:
        return self.stored.tensors.get(f"{self.name}.{field}")

    def required(self, field: str) -> StoredTensor:
        tensor = self.tensor(field)
        if tensor is None:
            raise CheckpointCorrupt(
                "is quantized, but a partner is missing",
                path=self.stored.path,
                tensor=self.name + _CODES,
                expected=f"{self.name}.{field}",
                hint="save the model again with hqq or transformers",
            )
        return tensor

    def numbers(self, field: str) -> tuple[int, ...]:
        """Return the whole numbers in a setting; fractions are cut off."""
        tensor = self.required(field)
        letter = _NUMBERS.get(tensor.spec.dtype)
        if letter is None or tensor.spec.numel > 8:
            self.corrupt(tensor, "is not a setting of a few numbers", "whole numbers")
        values = struct.unpack(f"<{tensor.spec.numel}{letter}", self.stored.peek(tensor))
        try:
            return tuple(int(value) for value in values)
        except (ValueError, OverflowError):
            self.corrupt(tensor, "is not a number", "whole numbers", repr(values))

    def number(self, field: str, default: int | None = None) -> int:
        if default is not None and self.tensor(field) is None:
            return default
        values = self.numbers(field)
        if len(values) != 1:
            self.corrupt(self.required(field), "is not one number", "one", f"{len(values)}")
        return values[0]

    def text(self, field: str, default: str | None = None) -> str:
        if default is not None and self.tensor(field) is None:
            return default
        tensor = self.required(field)
        if tensor.spec.dtype is not Dtype.U8 or tensor.spec.numel > 64:
            self.corrupt(tensor, "is not a short text", "bytes of ASCII")
        return self.stored.peek(tensor).decode("ascii", "replace")

    def corrupt(
        self, tensor: StoredTensor, what: str, expected: str, found: str | None = None
    ) -> NoReturn:
        if found is None:
            found = f"{tensor.spec.dtype} {list(tensor.spec.shape)}"
        raise CheckpointCorrupt(
            what, path=tensor.extent.path, tensor=tensor.spec.name, expected=expected, found=found
        )

    def owned(self) -> Iterator[str]:
        for field in ("W_q", *_PARTNERS, *_SETTINGS):
            if self.tensor(field) is not None:
                yield f"{self.name}.{field}"


@dataclass(frozen=True, slots=True)
class Hqq:
    """Half-quadratic quantization, all packings and both axes."""

    name: str = "hqq"
    methods: tuple[str, ...] = ("hqq",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "skip_modules"

    def recognise(self, stored: Stored) -> str | None:
        """Return the first module that has codes and says how they are packed."""
        for module in _modules(stored):
            if module.tensor("packing") is not None and module.tensor("shape") is not None:
                return f"{module.name}.W_q with its packing and shape beside it"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every module with codes; see `Format`."""
        found = Found(groups=tuple(_group(module) for module in _modules(stored)))
        return expert_names.published(found, stored)


FORMAT = Hqq()


def _modules(stored: Stored) -> Iterator[_Module]:
    for name in stored.tensors:
        if name.endswith(_CODES):
            yield _Module(stored, name.removesuffix(_CODES))


def _group(module: _Module) -> Group:
    _refuse_nested(module)
    shape = module.numbers("shape")
    axis = module.number("axis")
    if len(shape) != 2 or min(shape) < 1:
        module.corrupt(module.required("shape"), "is no shape", "two sizes", f"{list(shape)}")
    if axis not in (0, 1):
        module.corrupt(module.required("axis"), "is no axis", "0 or 1", f"{axis}")
    codes, bits = _codes(module)
    numel = shape[0] * shape[1]
    height = _height(module, codes, bits, numel)
    scale, zero = _grids(module)
    per_channel = bool(module.number("channel_wise", default=1))
    grid = {(1, 1)} if not per_channel else {(height, 1) if axis == 1 else (1, codes.columns)}
    for part in (scale, zero):
        _check_grid(module, part, grid)
    group_size = codes.columns if axis == 1 else height
    if per_channel:
        _check_group_size(module, group_size)
    formula = Slabs(
        codes=codes,
        scale=scale,
        zero=zero,
        bits=bits,
        high_first=True,
        height=height,
        columns=shape[1],
        rule=Rule.ZERO_FIRST,
        dtype=_compute_dtype(module),
    )
    grouping = f"groups of {group_size} along axis {axis}" if per_channel else "one scale"
    return Group(
        name=f"{module.name}.weight",
        shape=shape,
        formulas=(formula,),
        consumed=tuple(module.owned()),
        scheme=f"{bits}-bit HQQ, {grouping}",
    )


def _refuse_nested(module: _Module) -> None:
    flags = [flag for flag in ("quant_scale", "quant_zero") if module.number(flag, default=0)]
    nested = [field for field in _NESTED if module.tensor(field) is not None]
    if flags or nested:
        raise CheckpointUnsupported(
            "has scales or zeros that are quantized in turn",
            path=module.stored.path,
            tensor=module.name + _CODES,
            expected="float scale and zero",
            found=", ".join((*flags, *nested)),
            hint="quantize it again with quant_scale=False and quant_zero=False",
        )


def _codes(module: _Module) -> tuple[Part, int]:
    """Return the packed matrix and the width of its fields."""
    tensor = module.required("W_q")
    packing = module.text("packing")
    if packing not in _PACKINGS:
        raise CheckpointUnsupported(
            "is packed in a way that is not decoded",
            path=tensor.extent.path,
            tensor=tensor.spec.name,
            expected=f"one of {', '.join(_PACKINGS)}",
            found=repr(packing),
        )
    dtype, bits, settings = _PACKINGS[packing]
    nbits = module.number("nbits")
    if nbits not in settings:
        expected = f"{' or '.join(map(str, settings))} bits in {packing}"
        module.corrupt(module.required("nbits"), "disagrees with packing", expected, f"{nbits}")
    spec = tensor.spec
    as_float = bool(module.number("view_as_float", default=0)) and spec.dtype.is_plain_float
    if not as_float and spec.dtype is not dtype:
        module.corrupt(tensor, "has the wrong dtype", f"{dtype} for {packing}")
    if (
        len(spec.shape) != 2
        or 0 in spec.shape
        or tensor.extent.nbytes * 8 // spec.shape[0] % dtype.bits
    ):
        module.corrupt(tensor, "is not a matrix of packed codes", f"two axes of {dtype}")
    return parts.part(tensor, rows=spec.shape[0], dtype=dtype), bits


def _height(module: _Module, codes: Part, bits: int, numel: int) -> int:
    """Return the rows of the matrix of codes, which must hold exactly `numel`."""
    height, rest = divmod(numel, codes.columns)
    per_row = codes.dtype.bits // bits
    wanted = ceil_div(height, per_row)
    exact = bits == 3 or height % per_row == 0  # only ten codes in a word may be padded
    if rest or not exact or wanted != codes.rows:
        module.corrupt(
            module.required("W_q"),
            "does not hold the codes of its shape",
            f"{numel} codes of {bits} bits in rows of {codes.columns}",
            f"{codes.rows} packed rows",
        )
    return height


def _grids(module: _Module) -> tuple[Part, Part]:
    """Return scale and zero; with offloaded settings they lie in one tensor, zero first."""
    both = module.tensor("zero_scale")
    if both is None:
        scale, zero = module.required("scale"), module.required("zero")
        for tensor in (scale, zero):
            _check_float(module, tensor)
        return parts.part(scale, is_scale=True), parts.part(zero, is_scale=True)
    _check_float(module, both)
    if both.spec.shape[:1] != (2,):
        module.corrupt(both, "is not zeros and scales", "2 along the first axis")
    zero_part, scale_part = parts.stacked(parts.part(both, is_scale=True), 2)
    return scale_part, zero_part


def _check_float(module: _Module, tensor: StoredTensor) -> None:
    if not tensor.spec.dtype.is_plain_float:
        module.corrupt(tensor, "has the wrong dtype", "a float of 16 bits or more")


def _check_grid(module: _Module, part: Part, grid: set[tuple[int, int]]) -> None:
    if (part.rows, part.columns) not in grid:
        raise CheckpointCorrupt(
            "does not fit the codes",
            path=part.extent.path,
            tensor=part.name,
            expected=" or ".join(f"{rows} x {columns}" for rows, columns in grid),
            found=f"{part.rows} x {part.columns}",
        )


def _check_group_size(module: _Module, found: int) -> None:
    tensor = module.tensor("group_size")
    if tensor is not None and module.number("group_size") != found:
        given = f"{module.number('group_size')}"
        module.corrupt(tensor, "disagrees with the codes", f"groups of {found}", given)


def _compute_dtype(module: _Module) -> Dtype:
    text = module.text("compute_dtype", default="torch.float16")
    try:
        dtype = dtypes.from_torch_name(text)
    except ValueError:
        dtype = None
    if dtype is None or not dtype.is_plain_float or dtype is Dtype.F64:
        module.corrupt(module.required("compute_dtype"), "is no dtype", "a float", repr(text))
    return dtype
