"""AWQ: codes of 4 bits packed across the outputs (GEMM), along the inputs (GEMV), or four rows
woven into one (GEMV-fast, llm-awq); of other widths too where GPTQModel or AutoRound wrote them.

The config's `version` and the shapes must agree on the layout. Old models whose activation divides
by a scale (`act.scales`) get that division in the weight that follows, found by its shape.

Source: AutoAWQ 0.2.9, GPTQModel 7.7 and AutoRound 0.16, and their files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import conv1d, expert_names, linears
from ckptd.quant.formats.linears import Linear, Settings
from ckptd.quant.formula import ceil_div
from ckptd.quant.formulas.awq import QUAD, Across, Along, Quads
from ckptd.quant.group import Found, Group, Stored

_SIDE_FILES = ("quant_config.json", "quantize_config.json", "quantization_config.json")
"""Of AutoAWQ, GPTQModel and AutoRound."""
_LAYOUTS = {
    "gemm": "gemm",
    "exllama": "gemm",
    "exllamav2": "gemm",
    "ipex": "gemm",
    "gemv": "gemv",
    "gemv_fast": "quads",
    "llm-awq": "quads",
}
"""The layout of each version; those of a kernel for the same files are the same."""
_WORDS = frozenset({Dtype.I32})
_QUAD_INPUTS = 64
_ACT = ".scales"


@dataclass(frozen=True, slots=True)
class Awq:
    """Checkpoints whose `quant_method` is awq."""

    name: str = "AWQ"
    methods: tuple[str, ...] = ("awq",)
    side_files: tuple[str, ...] = _SIDE_FILES
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return the first module with nibbles packed across the outputs."""
        for name, tensor in stored.tensors.items():
            scales = stored.tensors.get(name.removesuffix(linears.CODES) + ".scales")
            if name.endswith(linears.CODES) and scales is not None:
                shapes = tensor.spec.shape, scales.spec.shape
                if len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] * 8 == shapes[1][1]:
                    return f"{name} is packed across the outputs"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every quantized module.

        Raises:
            CheckpointCorrupt: a partner is missing or does not fit; names it.
            CheckpointUnsupported: marlin, or scales of an activation that no weight takes up.
        """
        side = [stored.document(name) or {} for name in _SIDE_FILES]
        configs = (stored.quantization, *side)
        return find(stored, configs, layout=_layout(stored, configs))


FORMAT = Awq()


def find(
    stored: Stored, configs: tuple[Mapping[str, Any], ...], *, layout: str | None = "gemm"
) -> Found:
    """Return every module in `layout` (None: whichever the shapes are).

    Raises:
        CheckpointCorrupt: a partner is missing or does not fit; names it.
        CheckpointUnsupported: scales of an activation that no weight takes up.
    """
    said = linears.settings(*configs)
    rounded = any(linears.by_autoround(config) for config in configs)
    modules = linears.linears(stored)
    layouts = {one.name: layout or _shaped(one) for one in modules}
    inputs = {one.name: _inputs(one, layouts[one.name]) for one in modules}
    acts = dict(_acts(stored, inputs))
    groups = tuple(
        _group(one, layouts[one.name], said, acts.get(one.name), rounded=rounded) for one in modules
    )
    return expert_names.published(Found(groups=groups), stored)


def _inputs(linear: Linear, layout: str) -> int:
    """Return the inputs of a module in `layout`."""
    rows, columns = linear.matrix(linear.codes, frozenset({Dtype.I16, *_WORDS}))
    return {"gemm": rows, "gemv": columns * 8}.get(layout, columns)


def _group(
    linear: Linear, layout: str, said: Settings, act: StoredTensor | None, *, rounded: bool
) -> Group:
    if conv1d.is_conv1d(linear.stored.config, linear.name):
        raise linear.unsupported("is AWQ of a Conv1D module")
    if linear.g_idx is not None:
        raise linear.corrupt(linear.g_idx, "belongs to GPTQ, not to AWQ", "no g_idx")
    formula: Across | Along | Quads
    if layout == "gemm":
        formula = _across(linear, said, act, rounded=rounded)
    elif layout == "gemv":
        formula = _along(linear, said, act)
    else:
        formula = _quads(linear, said, act)
    bits = formula.bits if isinstance(formula, Across) else 4
    return Group(
        name=f"{linear.name}.weight",
        shape=(formula.rows, formula.columns),
        formulas=(formula,),
        consumed=linear.consumed + (() if act is None else (act.spec.name,)),
        scheme=f"{bits}-bit awq, groups of {formula.group}",
    )


def _across(linear: Linear, said: Settings, act: StoredTensor | None, *, rounded: bool) -> Across:
    inputs, words = linear.matrix(linear.codes, _WORDS)
    groups, outputs = linear.matrix(linear.scales, linears.FLOATS)
    linear.require(linear.zeros, _WORDS, (groups, words))
    fitting = [bits for bits in linears.WIDTHS if ceil_div(outputs * bits, 32) == words]
    bits = linears.width(linear, fitting, said)
    return Across(
        codes=parts.part(linear.codes),
        zeros=parts.part(linear.zeros),
        scale=parts.part(linear.scales, is_scale=True),
        act=_act(act),
        bits=bits,
        group=said.group_of(linear, inputs, groups),
        interleaved=bits == 4 or rounded,
        dtype=linear.scales.spec.dtype,
    )


def _along(linear: Linear, said: Settings, act: StoredTensor | None) -> Along:
    outputs, words = linear.matrix(linear.codes, _WORDS)
    inputs = words * 8
    _, zero_words = linear.matrix(linear.zeros, _WORDS)
    linear.require(linear.zeros, _WORDS, (outputs, zero_words))
    linear.require(linear.scales, linears.FLOATS, (outputs, zero_words * 8))
    group = _padded_group(linear, said, inputs, zero_words * 8)
    return Along(
        codes=parts.part(linear.codes, rows=outputs, columns=words * 4, dtype=Dtype.U8),
        zeros=parts.part(linear.zeros, rows=outputs, columns=zero_words * 4, dtype=Dtype.U8),
        scale=parts.part(linear.scales, is_scale=True),
        act=_act(act),
        group=group,
        dtype=linear.scales.spec.dtype,
    )


def _quads(linear: Linear, said: Settings, act: StoredTensor | None) -> Quads:
    quads, inputs = linear.matrix(linear.codes, frozenset({Dtype.I16}))
    if inputs % _QUAD_INPUTS:
        raise linear.corrupt(
            linear.codes, "is not whole blocks", f"a multiple of {_QUAD_INPUTS} columns"
        )
    groups, _ = linear.matrix(linear.scales, linears.FLOATS)
    linear.require(linear.scales, linears.FLOATS, (groups, quads * QUAD))
    linear.require(linear.zeros, linears.FLOATS, (groups, quads * QUAD))
    return Quads(
        codes=parts.part(linear.codes, rows=quads, columns=inputs * 2, dtype=Dtype.U8),
        zeros=parts.part(linear.zeros, is_scale=True),
        scale=parts.part(linear.scales, is_scale=True),
        act=_act(act),
        group=_padded_group(linear, said, inputs, groups),
        dtype=linear.scales.spec.dtype,
    )


def _padded_group(linear: Linear, said: Settings, inputs: int, padded: int) -> int:
    """Return the group size that the config gives; `padded` is how many groups there is room for.

    The room is a whole number of words of zeros, of which kernels want 2 for groups of 64 and 4
    for groups of 32.
    """
    group = said.of_modules.get(linear.name, said.group)
    if group == -1:
        group = max(1, inputs)
    if group is None or group < 1:
        raise linear.corrupt(
            linear.scales, "has groups that the config does not tell", "a group_size"
        )
    words = ceil_div(ceil_div(inputs, group), 8)
    step = 1 if group >= 128 else ceil_div(128, group)
    if padded not in (words * 8, ceil_div(words, step) * step * 8):
        raise linear.corrupt(
            linear.scales, "has no room for its groups", f"groups of {group} of {inputs} inputs"
        )
    return min(group, max(1, inputs))


def _layout(stored: Stored, configs: tuple[Mapping[str, Any], ...]) -> str | None:
    """Return the layout that the first config names, or None where none does.

    Raises:
        CheckpointUnsupported: it names one that is not decoded.
    """
    for config in configs:
        for key in ("version", "checkpoint_format", "format"):
            version = linears.text(config.get(key))
            if version in _LAYOUTS:
                return _LAYOUTS[version]
            if version:
                raise CheckpointUnsupported(
                    "is AWQ in a layout that is not decoded",
                    path=stored.path,
                    expected=f"a version of {', '.join(_LAYOUTS)}",
                    found=version,
                    hint="save it in the version gemm with AutoAWQ",
                )
    return None


def _shaped(linear: Linear) -> str:
    """Return the layout that the tensors have."""
    if linear.codes.spec.dtype is Dtype.I16:
        return "quads"
    shapes = linear.codes.spec.shape, linear.scales.spec.shape
    along = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] == shapes[1][0]
    return "gemv" if along and shapes[0][1] * 8 != shapes[1][1] else "gemm"


def _act(tensor: StoredTensor | None) -> parts.Part | None:
    return None if tensor is None else parts.part(tensor, rows=1, is_scale=True)


def _acts(stored: Stored, inputs: Mapping[str, int]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the scale of each activation, with the module that follows it: the only one beside it
    with as many `inputs`.

    Raises:
        CheckpointUnsupported: there is none such, or several.
    """
    for name, tensor in stored.tensors.items():
        if not name.endswith(_ACT) or name.removesuffix(_ACT) in inputs:
            continue
        if len(tensor.spec.shape) != 1:
            continue
        beside = name.removesuffix(_ACT).rpartition(".")[0]
        following = [
            module
            for module, count in inputs.items()
            if module.rpartition(".")[0] == beside and (count,) == tensor.spec.shape
        ]
        if len(following) != 1 or tensor.spec.dtype not in linears.FLOATS:
            raise CheckpointUnsupported(
                "scales an activation, and no weight can take that up",
                path=tensor.extent.path,
                tensor=name,
                expected=f"one quantized module beside it with {tensor.spec.shape[0]} inputs",
                found=", ".join(following) or "none",
                hint="quantize the model again without scaling activations",
            )
        yield following[0], tensor
