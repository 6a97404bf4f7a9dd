"""quanto: `X.weight._data` with `_scale`, and with `_shift` where codes are packed.

qint8 and qfloat8 keep the shape of the weight. qint4 and qint2 are packed in slabs over groups, and
nothing tells the shape of the weight: `quanto_shapes` derives it or the weight is refused. The
types of modules stand in quanto_qmap.json, which transformers does not write.

Source: the state dicts of optimum-quanto 0.2.7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import quanto_shapes
from ckptd.quant.formula import Formula, ceil_div
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.formulas.slabs import Rule, Slabs
from ckptd.quant.group import Found, Group, Stored

QMAP_NAME = "quanto_qmap.json"
_BYTES = ".weight._data"
_PACKED = ".weight._data._data"
_CALIBRATION = (".input_scale", ".output_scale")
_TYPES = {
    "qint8": Dtype.I8,
    "qfloat8": Dtype.F8_E4M3,
    "qfloat8_e4m3fn": Dtype.F8_E4M3,
    "qfloat8_e4m3fnuz": Dtype.F8_E4M3FNUZ,
    "qfloat8_e5m2": Dtype.F8_E5M2,
}
_PACKED_BITS = {"qint4": 4, "qint2": 2}
_CONFIG_TYPES = {"int8": "qint8", "int4": "qint4", "int2": "qint2"}
"""What transformers calls them in config.json; of its float8 no more is known than the dtype."""


@dataclass(frozen=True, slots=True)
class Quanto:
    """optimum-quanto's integer and float8 weights."""

    name: str = "quanto"
    methods: tuple[str, ...] = ("quanto",)
    side_files: tuple[str, ...] = (QMAP_NAME,)
    skip_key: str | None = None

    def recognise(self, stored: Stored) -> str | None:
        """Return the map of types, or the first weight in quanto's parts."""
        if stored.document(QMAP_NAME) is not None:
            return QMAP_NAME
        for name in stored.tensors:
            if name.endswith(_BYTES) and f"{name.removesuffix('_data')}_scale" in stored.tensors:
                return name
            if name.endswith(_PACKED):
                return name
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight in parts; see `Format`.

        Raises:
            CheckpointIncomplete: the map of types names a module that is not there.
        """
        types = _types(stored)
        groups = [_group(stored, module, types.get(module)) for module in _modules(stored)]
        _check_complete(stored, types)
        return Found(groups=tuple(groups), dropped=tuple(_calibration(stored, types)))


FORMAT = Quanto()


def _modules(stored: Stored) -> Iterator[str]:
    for name in stored.tensors:
        for suffix in (_PACKED, _BYTES):
            if name.endswith(suffix):
                yield name.removesuffix(suffix)
                break


def _types(stored: Stored) -> dict[str, str]:
    """Return the type of each module's weight that quanto_qmap.json names."""
    entries = stored.document(QMAP_NAME) or {}
    types = {}
    for module, entry in entries.items():
        weights = entry.get("weights") if isinstance(entry, Mapping) else None
        if not isinstance(weights, str):
            raise CheckpointCorrupt(
                "does not tell the type of a module's weight",
                path=stored.path / QMAP_NAME,
                expected=f'"{module}": {{"weights": ...}}',
                found=repr(entry)[:80],
            )
        types[module] = weights
    return types


def _check_complete(stored: Stored, types: Mapping[str, str]) -> None:
    for module, kind in types.items():
        names = (f"{module}.weight", module + _BYTES, module + _PACKED)
        if kind != "none" and not any(name in stored.tensors for name in names):
            raise CheckpointIncomplete(
                f"{QMAP_NAME} names it, and no file holds it",
                path=stored.path,
                tensor=names[0],
                hint="copy all shards and their index",
            )


def _calibration(stored: Stored, types: Mapping[str, str]) -> Iterator[str]:
    """Yield the scales of activations: of modules of quanto, or two scalars side by side."""
    modules = set(_modules(stored)) | types.keys()
    for name in stored.tensors:
        for suffix, other in zip(_CALIBRATION, reversed(_CALIBRATION), strict=True):
            module = name.removesuffix(suffix)
            if name.endswith(suffix) and (module in modules or module + other in stored.tensors):
                yield name


def _group(stored: Stored, module: str, kind: str | None) -> Group:
    packed = stored.tensors.get(module + _PACKED)
    if packed is not None:
        return _packed(stored, module, packed, kind)
    return _bytes(stored, module, stored.tensors[module + _BYTES], kind)


def _bytes(stored: Stored, module: str, codes: StoredTensor, kind: str | None) -> Group:
    spec = codes.spec
    if spec.dtype not in _TYPES.values():
        _corrupt(codes, "has the wrong dtype", "I8 or F8", f"{spec.dtype}")
    if kind is not None and _TYPES.get(kind) is not spec.dtype:
        _corrupt(codes, f"disagrees with {QMAP_NAME}", kind, f"{spec.dtype}")
    if not spec.shape:
        _corrupt(codes, "is not a weight", "one axis or more", "a scalar")
    scale = _scale(stored, module, codes)
    rows, columns = spec.shape[0], math.prod(spec.shape[1:])
    by_row = (rows, *(1 for _ in spec.shape[1:]))
    if scale.spec.shape != by_row and scale.spec.numel != 1:
        _corrupt(scale, "does not fit the weight", f"{list(by_row)}", f"{list(scale.spec.shape)}")
    whole = scale.spec.numel == 1
    formula = Scaled(
        codes=parts.part(codes, rows=rows, columns=columns),
        scale=parts.part(scale, columns=1, is_scale=True),
        block=(max(1, rows), max(1, columns)) if whole else (1, max(1, columns)),
        dtype=scale.spec.dtype,
    )
    kind = kind or next(name for name, dtype in _TYPES.items() if dtype is spec.dtype)
    return _made(module, spec.shape, formula, (codes, scale), f"quanto {kind}, a scale a row")


def _packed(stored: Stored, module: str, codes: StoredTensor, kind: str | None) -> Group:
    scale = _scale(stored, module, codes)
    shift = _partner(stored, module, "_shift", codes)
    spec = codes.spec
    if spec.dtype is not Dtype.U8 or len(spec.shape) < 2 or 0 in spec.shape:
        _corrupt(codes, "is not packed codes", "U8, two axes", f"{spec.dtype} {list(spec.shape)}")
    height = scale.spec.numel
    by_row = {(height, *(1 for _ in spec.shape[1:]))} | ({(), (1,)} if height == 1 else set())
    if scale.spec.shape not in by_row:
        _corrupt(scale, "is not one a row of codes", f"[{height}, 1]", f"{list(scale.spec.shape)}")
    if shift.spec.shape != scale.spec.shape:
        _corrupt(shift, "does not fit the scales", f"{list(scale.spec.shape)}")
    is_integer = shift.spec.dtype in (Dtype.U8, Dtype.I8)
    if not is_integer and shift.spec.dtype is not scale.spec.dtype:
        _corrupt(shift, "has the wrong dtype", f"{scale.spec.dtype}, U8 or I8")
    bits = _bits(stored, codes, height, kind)
    shape = _shape(stored, module, codes, height)
    formula = Slabs(
        codes=parts.part(codes, rows=spec.shape[0]),
        scale=parts.part(scale, columns=1, is_scale=True),
        zero=parts.part(shift, columns=1, is_scale=not is_integer),
        bits=bits,
        high_first=False,
        height=height,
        columns=math.prod(shape[1:]),
        rule=Rule.ZERO_FIRST if is_integer else Rule.ZERO_LAST,
        dtype=scale.spec.dtype,
    )
    width = math.prod(spec.shape[1:])
    return _made(
        module, shape, formula, (codes, scale, shift), f"quanto qint{bits}, groups of {width}"
    )


def _made(
    module: str,
    shape: tuple[int, ...],
    formula: Formula,
    consumed: tuple[StoredTensor, ...],
    scheme: str,
) -> Group:
    return Group(
        name=f"{module}.weight",
        shape=shape,
        formulas=(formula,),
        consumed=tuple(tensor.spec.name for tensor in consumed),
        scheme=scheme,
    )


def _bits(stored: Stored, codes: StoredTensor, height: int, kind: str | None) -> int:
    """Return the bits that the packed rows say, which must be those of the map or config."""
    rows = codes.spec.shape[0]
    fitting = [bits for bits in (4, 2) if ceil_div(height * bits, 8) == rows]
    if kind is None:
        declared: Any = stored.quantization.get("weights")
        kind = _CONFIG_TYPES.get(declared) if isinstance(declared, str) else None
    if kind is not None:
        if _PACKED_BITS.get(kind) not in fitting:
            _corrupt(codes, "disagrees with its type", f"{kind}, {height} rows", f"{rows} packed")
        return _PACKED_BITS[kind]
    if len(fitting) != 1:
        expected = f"{height} rows of 4 or 2 bits, and only one that fits"
        _corrupt(codes, "does not tell its bits", expected, f"{rows} packed rows")
    return fitting[0]


def _shape(stored: Stored, module: str, codes: StoredTensor, height: int) -> tuple[int, ...]:
    """Return the shape of the weight, which is that of the codes where they are not grouped."""
    width = codes.spec.shape[1:]
    found: tuple[int, ...] | None
    bias = stored.tensors.get(f"{module}.bias")
    bias_rows = bias.spec.numel if bias is not None else None
    if len(width) > 1 or width[0] not in quanto_shapes.GROUP_SIZES:
        found = (height, *width) if bias_rows in (None, height) else None
    else:
        found = quanto_shapes.linear_shape(
            module,
            numel=height * width[0],
            group=width[0],
            bias_rows=bias_rows,
            config=stored.config,
        )
    if found is None:
        raise CheckpointUnsupported(
            "has a shape that quanto did not store, and config.json does not tell",
            path=codes.extent.path,
            tensor=codes.spec.name,
            found=f"{height * width[0]} elements in groups of {width[0]}",
            hint="load it with optimum-quanto, dequantize, and save that; or use qint8 or qfloat8",
        )
    return found


def _scale(stored: Stored, module: str, codes: StoredTensor) -> StoredTensor:
    scale = _partner(stored, module, "_scale", codes)
    if not scale.spec.dtype.is_plain_float or scale.spec.dtype is Dtype.F64:
        _corrupt(scale, "has the wrong dtype", "F32, F16 or BF16", f"{scale.spec.dtype}")
    return scale


def _partner(stored: Stored, module: str, field: str, codes: StoredTensor) -> StoredTensor:
    name = f"{module}.weight.{field}"
    if name not in stored.tensors:
        raise CheckpointCorrupt(
            "is quantized, but a partner is missing",
            path=stored.path,
            tensor=codes.spec.name,
            expected=name,
            hint="save the model again with optimum-quanto",
        )
    return stored.tensors[name]


def _corrupt(tensor: StoredTensor, what: str, expected: str, found: str | None = None) -> NoReturn:
    if found is None:
        found = f"{tensor.spec.dtype} {list(tensor.spec.shape)}"
    raise CheckpointCorrupt(
        what, path=tensor.extent.path, tensor=tensor.spec.name, expected=expected, found=found
    )
