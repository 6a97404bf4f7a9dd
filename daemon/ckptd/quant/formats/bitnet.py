"""BitNet: ternary weights, four rows in the bits of one byte, and one scale a weight.

`bitlinear` divides by the scale, `autobitlinear` multiplies by it; only config.json tells which.
The weights are decoded exactly, but the model that was trained rounds its activations to 8 bits
as well, which a plain linear layer does not do: results differ a little from those of the source.

Source: BitLinear and AutoBitLinear of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.formulas.slabs import Rule, Slabs
from ckptd.quant.group import Found, Group, Stored

VALUES_PER_BYTE = 4
_SCALE = ".weight_scale"
_NORM = ".rms_norm.weight"
_RULES = {"bitlinear": Rule.DIVIDE, "autobitlinear": Rule.MULTIPLY}
_ACTIVATIONS = "activations no longer rounded to 8 bits, so results differ a little"


@dataclass(frozen=True, slots=True)
class BitNet:
    """Packed ternary weights of BitNet models; never recognised without config.json's word."""

    name: str = "bitnet"
    methods: tuple[str, ...] = ("bitnet",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return None: nothing in the tensors tells whether the scale divides."""
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight with one scale; see `Format`.

        Raises:
            CheckpointUnsupported: weights that are made ternary as the model runs, or normalized
                activations, for which a plain model has no place.
        """
        rule = _rule(stored)
        _refuse_normalized(stored)
        return Found(groups=tuple(_group(stored, module, rule) for module in _modules(stored)))


FORMAT = BitNet()


def _rule(stored: Stored) -> Rule:
    kind = stored.quantization.get("linear_class", "bitlinear")
    mode = stored.quantization.get("quantization_mode", "offline")
    if not isinstance(kind, str) or kind not in _RULES:
        raise CheckpointUnsupported(
            "has linear layers of a kind that is not decoded",
            path=stored.path,
            expected=f"linear_class {' or '.join(_RULES)}",
            found=repr(kind)[:80],
        )
    if kind == "autobitlinear" and mode != "offline":
        raise CheckpointUnsupported(
            "holds master weights that become ternary only while the model runs",
            path=stored.path,
            expected="quantization_mode offline",
            found=repr(mode)[:80],
            hint="publish it as it is, or train on with it and export packed weights first",
        )
    return _RULES[kind]


def _refuse_normalized(stored: Stored) -> None:
    norm = next((name for name in stored.tensors if name.endswith(_NORM)), None)
    if norm is not None or stored.quantization.get("use_rms_norm"):
        raise CheckpointUnsupported(
            "normalizes activations in each linear layer, for which a plain model has no place",
            path=stored.path,
            tensor=norm,
            expected="use_rms_norm false",
            hint="run it with transformers as it is",
        )


def _modules(stored: Stored) -> Iterator[str]:
    for name in stored.tensors:
        if name.endswith(_SCALE):
            yield name.removesuffix(_SCALE)
        elif name.endswith(".weight") and stored.tensors[name].spec.dtype is Dtype.U8:
            module = name.removesuffix(".weight")
            if module + _SCALE not in stored.tensors:
                _corrupt(
                    stored.tensors[name], "is packed, but its scale is missing", module + _SCALE
                )


def _group(stored: Stored, module: str, rule: Rule) -> Group:
    scale = stored.tensors[module + _SCALE]
    if not scale.spec.dtype.is_plain_float or scale.spec.dtype is Dtype.F64:
        _corrupt(scale, "has the wrong dtype", "F32, F16 or BF16")
    if scale.spec.numel != 1:
        _corrupt(scale, "does not fit the weight", "one value")
    codes = stored.tensors.get(f"{module}.weight")
    if codes is None:
        _corrupt(scale, "belongs to a weight that is missing", f"{module}.weight")
    if len(codes.spec.shape) != 2 or codes.spec.shape[1] == 0:
        _corrupt(codes, "is not the weight of a linear layer", "two axes")
    formula: Slabs | Scaled
    if codes.spec.dtype is Dtype.U8:
        formula = _packed(codes, scale, rule)
    elif codes.spec.dtype.is_plain_float and rule is Rule.MULTIPLY:
        formula = _unpacked(codes, scale)
    else:
        _corrupt(codes, "is not packed ternary codes", "U8")
    bias = stored.tensors.get(f"{module}.bias")
    if bias is not None and bias.spec.shape != (formula.rows,):
        _corrupt(codes, "does not fit its bias", f"{bias.spec.numel} rows, 4 in a byte")
    return Group(
        name=codes.spec.name,
        shape=(formula.rows, formula.columns),
        formulas=(formula,),
        consumed=(codes.spec.name, scale.spec.name),
        scheme=f"1.58-bit BitNet, {rule}, {_ACTIVATIONS}",
    )


def _packed(codes: StoredTensor, scale: StoredTensor, rule: Rule) -> Slabs:
    return Slabs(
        codes=parts.part(codes),
        scale=parts.part(scale, columns=1, is_scale=True),
        bits=8 // VALUES_PER_BYTE,
        high_first=False,
        height=codes.spec.shape[0] * VALUES_PER_BYTE,
        columns=codes.spec.shape[1],
        rule=rule,
        dtype=scale.spec.dtype,
    )


def _unpacked(codes: StoredTensor, scale: StoredTensor) -> Scaled:
    """Return what transformers saves once it has loaded a packed weight: -1, 0 and 1 as floats."""
    rows, columns = codes.spec.shape
    return Scaled(
        codes=parts.part(codes),
        scale=parts.part(scale, columns=1, is_scale=True),
        block=(max(1, rows), columns),
        dtype=scale.spec.dtype,
    )


def _corrupt(tensor: StoredTensor, what: str, expected: str) -> NoReturn:
    raise CheckpointCorrupt(
        what,
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
    )
