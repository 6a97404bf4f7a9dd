"""bitsandbytes: 4-bit weights in blocks (nf4, fp4) and int8 with a scale for each row.

A weight `X` is 4-bit where `X.quant_state.bitsandbytes__nf4` or `__fp4` lies beside it, and int8
where its module has `SCB`; the config's list of modules left plain is not trusted. Shape and dtype
of a 4-bit weight stand in that state. Weights of Conv1D modules were transposed before they were
quantized: they are transposed back.

Source: Linear4bit, Linear8bitLt and QuantState of bitsandbytes 0.50; transformers 5.24 for Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import configuration, parts
from ckptd.quant.formats import quant_state
from ckptd.quant.formats.quant_state import QuantState
from ckptd.quant.formula import ceil_div
from ckptd.quant.formulas.blockwise import Blockwise
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Found, Group, Stored
from ckptd.quant.parts import Part

_STATE = ".quant_state.bitsandbytes__"
_SCALES = ".SCB"
_LAYOUT = ".weight_format"
_PARTNERS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_LAYOUTS = ("row", "col32", "col_turing", "col_ampere")
"""How int8 rows lie, by number; the library writes and reads only the first since 0.45."""
_STORAGE = frozenset({Dtype.U8, Dtype.I8, Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64})
"""What 4-bit codes are stored as (bnb_4bit_quant_storage): the bytes are the same."""
_FLOATS = frozenset({Dtype.F32, Dtype.BF16, Dtype.F16})
_PER_127 = 7.874015718698502e-3
"""1 / 127 as the library writes it."""
_CONV1D_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
_CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """Checkpoints of bitsandbytes, and of QLoRA runs that saved their base."""

    name: str = "bitsandbytes"
    methods: tuple[str, ...] = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "llm_int8_skip_modules"

    def recognise(self, stored: Stored) -> str | None:
        """Return the first tensor that only bitsandbytes writes."""
        marks = (name for name in stored.tensors if _STATE in name or name.endswith(_SCALES))
        return next((f"{name} is there" for name in marks), None)

    def find(self, stored: Stored) -> Found:
        """Return every 4-bit and int8 weight.

        Raises:
            CheckpointCorrupt: a partner is missing, or shapes, dtypes and settings disagree.
            CheckpointUnsupported: int8 in the order of a GPU's tiles, or unknown settings.
        """
        transposed = frozenset(_conv1d_weights(stored.config, stored.tensors))
        groups = []
        for name, tensor in stored.tensors.items():
            weight, mark, kind = name.rpartition(_STATE)
            if mark:
                groups.append(_four_bit(stored, weight, tensor, kind, weight in transposed))
            elif name.endswith(_SCALES):
                weight = name.removesuffix(_SCALES) + ".weight"
                groups.append(_eight_bit(stored, weight, tensor, weight in transposed))
        _require_complete(stored, groups)
        return Found(groups=tuple(groups))


FORMAT = BitsAndBytes()


def _conv1d_weights(config: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[str]:
    """Yield the weights of Conv1D modules: known names in models that have them, at any depth."""
    if not _has_conv1d(config):
        return
    for name in names:
        module, _, field = name.rpartition(".")
        if field == "weight" and module.rpartition(".")[2] in _CONV1D_MODULES:
            yield name


def _has_conv1d(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    nested = (value for value in config.values() if isinstance(value, Mapping))
    return (isinstance(kind, str) and kind in _CONV1D_MODELS) or any(map(_has_conv1d, nested))


def _four_bit(
    stored: Stored, name: str, state_tensor: StoredTensor, kind: str, transposed: bool
) -> Group:
    if kind not in quant_state.KINDS:
        raise CheckpointUnsupported(
            "is quantized with a table that bitsandbytes does not have",
            path=state_tensor.extent.path,
            tensor=state_tensor.spec.name,
            expected=", ".join(quant_state.KINDS),
            found=kind,
        )
    state = quant_state.read(stored, state_tensor, kind)
    source = _parts(stored, name, state)
    shape = state.shape
    if transposed:
        if len(shape) != 2:
            raise _wrong(state_tensor, "two axes, as a Conv1D weight has", f"shape {list(shape)}")
        shape = shape[::-1]
    nested = state.nested is not None
    used = ("", ".absmax", ".quant_map", *(_PARTNERS[2:] if nested else ()))
    return Group(
        name=name,
        shape=shape,
        formulas=tuple(_matrices(state, source, transposed)),
        consumed=(*(name + suffix for suffix in used), state_tensor.spec.name),
        scheme=f"4-bit {kind}, blocks of {state.block}" + (", nested" if nested else ""),
    )


def _parts(stored: Stored, name: str, state: QuantState) -> dict[str, Part]:
    """Return the parts of a 4-bit weight by their field in the formula, all checked."""
    codes = _required(stored, name, name)
    if codes.spec.dtype not in _STORAGE or codes.extent.nbytes != ceil_div(state.numel, 2):
        expected = f"{ceil_div(state.numel, 2)} bytes of {list(state.shape)} in 4 bits"
        raise _wrong(codes, expected, f"{codes.extent.nbytes} bytes of {codes.spec.dtype}")
    num_blocks = ceil_div(state.numel, state.block)
    scales = frozenset({Dtype.U8}) if state.nested is not None else _FLOATS
    found = {
        "codes": parts.part(codes, rows=1, dtype=Dtype.U8),
        "absmax": _flat(stored, name, ".absmax", num_blocks, scales),
        "quant_map": _flat(stored, name, ".quant_map", 16),
    }
    if state.nested is not None:
        count = ceil_div(num_blocks, state.nested.block)
        found["nested_absmax"] = _flat(stored, name, ".nested_absmax", count)
        found["nested_map"] = _flat(stored, name, ".nested_quant_map", 256)
    return found


def _matrices(state: QuantState, source: dict[str, Part], transposed: bool) -> Iterator[Blockwise]:
    """Yield the formulas of a weight: one, or one for each expert of three axes and more."""
    shape = state.shape
    experts = shape[0] if len(shape) > 2 and state.numel else 1
    one = shape[1:] if len(shape) > 2 and state.numel else shape
    matrix = (one[0], math.prod(one[1:]))
    nested = state.nested
    for expert in range(experts):
        yield Blockwise(
            codes=source["codes"],
            absmax=source["absmax"],
            quant_map=source["quant_map"],
            nested_absmax=source.get("nested_absmax"),
            nested_map=source.get("nested_map"),
            nested_offset=0.0 if nested is None else nested.offset,
            block=state.block,
            nested_block=256 if nested is None else nested.block,
            shape=matrix,
            first=expert * matrix[0] * matrix[1],
            transposed=transposed,
            dtype=state.dtype,
        )


def _flat(
    stored: Stored,
    name: str,
    suffix: str,
    count: int,
    allowed: frozenset[Dtype] = frozenset({Dtype.F32}),
) -> Part:
    tensor = _required(stored, name + suffix, name)
    spec = tensor.spec
    if spec.dtype not in allowed or spec.numel != count:
        kinds = " or ".join(sorted(allowed))
        raise _wrong(tensor, f"{count} of {kinds}", f"{spec.dtype} {list(spec.shape)}")
    return parts.part(tensor, rows=1, is_scale=spec.dtype is not Dtype.U8)


def _eight_bit(stored: Stored, name: str, scales: StoredTensor, transposed: bool) -> Group:
    codes = _required(stored, name, scales.spec.name)
    shape = codes.spec.shape
    if codes.spec.dtype is not Dtype.I8 or len(shape) != 2:
        raise _wrong(codes, "I8 of two axes", f"{codes.spec.dtype} {list(shape)}")
    if scales.spec.dtype is not Dtype.F32 or scales.spec.numel != shape[0]:
        found = f"{scales.spec.dtype} {list(scales.spec.shape)}"
        raise _wrong(scales, f"{shape[0]} of F32, one a row", found)
    consumed = [name, scales.spec.name]
    layout = stored.tensors.get(name.removesuffix(".weight") + _LAYOUT)
    if layout is not None:
        _require_rows(stored, layout)
        consumed.append(layout.spec.name)
    formula = Scaled(
        codes=parts.part(codes),
        scale=parts.part(scales, columns=1, is_scale=True),
        block=(1, max(1, shape[1])),
        factor=_PER_127,
        transposed=transposed,
        dtype=_compute_dtype(stored),
    )
    return Group(
        name=name,
        shape=shape[::-1] if transposed else shape,
        formulas=(formula,),
        consumed=tuple(consumed),
        scheme="8-bit int8, a scale a row",
    )


def _require_rows(stored: Stored, layout: StoredTensor) -> None:
    spec = layout.spec
    if spec.numel != 1 or spec.dtype not in (Dtype.U8, Dtype.I8):
        raise _wrong(layout, "one number in U8", f"{spec.dtype} {list(spec.shape)}")
    number = stored.peek(layout)[0]
    if number == 0:
        return
    raise CheckpointUnsupported(
        "the int8 weight lies in the order of a GPU's tiles",
        path=layout.extent.path,
        tensor=spec.name,
        expected=f"0 ({_LAYOUTS[0]})",
        found=f"{number} ({_LAYOUTS[number] if number < len(_LAYOUTS) else 'unknown'})",
        hint="load and save the model with bitsandbytes 0.37 to 0.44, which writes rows",
    )


def _compute_dtype(stored: Stored) -> Dtype:
    """Return the dtype the model computes in: what int8 is dequantized for. The library's own
    function gives float32, which stands where config.json says nothing usable.
    """
    try:
        dtype = dtypes.from_torch_name(configuration.compute_dtype(stored.config) or "")
    except ValueError:
        return Dtype.F32
    return dtype if dtype in _FLOATS else Dtype.F32


def _require_complete(stored: Stored, groups: list[Group]) -> None:
    """Refuse weights that lack their state or scales, and partners that lack a weight."""
    consumed: set[str] = set()
    for group in groups:
        twice = next((name for name in group.consumed if name in consumed), None)
        if twice is not None:
            raise _wrong(stored.tensors[twice], "one quantization of a weight", "two")
        consumed.update(group.consumed)
    for name, tensor in stored.tensors.items():
        if name in consumed:
            continue
        if name.endswith((*_PARTNERS, _LAYOUT)):
            raise _wrong(tensor, "a quantized weight beside it", "none")
        if name.endswith(".weight") and tensor.spec.dtype is Dtype.I8:
            raise _wrong(tensor, f"{name.removesuffix('.weight')}{_SCALES} beside it", "none")
        if name.endswith(".weight") and tensor.spec.dtype is Dtype.U8:
            raise _wrong(tensor, f"{name}{_STATE}nf4 or fp4 beside it", "none")


def _required(stored: Stored, name: str, of: str) -> StoredTensor:
    tensor = stored.tensors.get(name)
    if tensor is None:
        raise CheckpointCorrupt(
            "is quantized, but a partner is missing",
            path=stored.path,
            tensor=of,
            expected=name,
            hint="save the model again with bitsandbytes or transformers",
        )
    return tensor


def _wrong(tensor: StoredTensor, expected: str, found: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        "does not fit its quantization",
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=found,
        hint="save the model again with bitsandbytes or transformers",
    )
