"""GPTQ: codes packed down the inputs, of GPTQModel, AutoGPTQ and whoever writes like them.

Widths of 2 to 8 bits, module by module from shapes; zeros stored one less (`gptq`) or as they are
(`gptq_v2`, `gptq_p`); groups in order or by `g_idx`, which is all that act-order leaves on disk.
GPTQModel packs 5, 6 and 7 bits, and in `gptq_p` 3, in planes; AutoRound in a stream. Embeddings
and Conv1D weights are packed the same way and not transposed afterwards.

Source: GPTQModel 7.7, AutoGPTQ 0.7 and AutoRound 0.16, and their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import conv1d, expert_names, linears
from ckptd.quant.formats.linears import Linear, Settings
from ckptd.quant.formula import ceil_div
from ckptd.quant.formulas.columns import BLOCK, Columns, Packing, Zeros
from ckptd.quant.group import Found, Group, Stored

_SIDE_FILES = ("quantize_config.json", "quantization_config.json")
"""The second beside the first is of AutoRound, writing in this format."""
_STORED_ZEROS = {"gptq": False, "gptq_v2": True, "gptq_p": True}
"""Whether zeros are stored as they are, by checkpoint_format; without one it is the first."""
_PLANES = frozenset({5, 6, 7})
_EMBEDDINGS = frozenset({"wte", "word_embeddings", "embed_in", "tok_embeddings"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How all modules of a checkpoint are packed, where shapes cannot tell.

    `planes` are the widths that lie in planes, `stored_zeros` says that zeros are not one less.
    """

    planes: frozenset[int]
    stored_zeros: bool

    def zero_rule(self, bits: int) -> Zeros:
        """Return what a stored zero of `bits` means: writers subtract from whole words where fields
        do not straddle them.
        """
        if self.stored_zeros:
            return Zeros.STORED
        return Zeros.WORDS if bits in (2, 4, 8) else Zeros.FIELDS


@dataclass(frozen=True, slots=True)
class Gptq:
    """Checkpoints whose `quant_method` is gptq, or that have only quantize_config.json."""

    name: str = "GPTQ"
    methods: tuple[str, ...] = ("gptq",)
    side_files: tuple[str, ...] = _SIDE_FILES
    skip_key: str | None = None

    def recognise(self, stored: Stored) -> str | None:
        """Return the first module with codes packed down the inputs."""
        for name, tensor in stored.tensors.items():
            scales = stored.tensors.get(name.removesuffix(linears.CODES) + ".scales")
            if name.endswith(linears.CODES) and scales is not None:
                shapes = tensor.spec.shape, scales.spec.shape
                if len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][1]:
                    return f"{name} is packed down the inputs"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every quantized module.

        Raises:
            CheckpointCorrupt: a partner is missing or does not fit; names it.
            CheckpointUnsupported: marlin and other layouts of a kernel, rotated weights.
        """
        side = [stored.document(name) or {} for name in _SIDE_FILES]
        configs = (stored.quantization, *side)
        layout = _layout(stored, configs)
        said = linears.settings(*configs)
        modules = linears.linears(stored)
        found = Found(groups=tuple(group_of(one, layout, said) for one in modules))
        return expert_names.published(found, stored)


FORMAT = Gptq()


def group_of(linear: Linear, layout: Layout, said: Settings) -> Group:
    """Return the weight of one module.

    Raises:
        CheckpointCorrupt: its tensors do not fit each other.
    """
    bits, inputs = _shape(linear, said)
    groups, outputs = linear.scales.spec.shape
    packing = Packing.PLANES if bits in layout.planes else Packing.STREAM
    if packing is Packing.PLANES and (inputs % BLOCK or outputs % BLOCK):
        raise linear.corrupt(
            linear.codes, f"is {bits}-bit in planes", f"multiples of {BLOCK} codes"
        )
    g_idx = linear.g_idx
    if g_idx is None:
        size = said.group_of(linear, inputs, groups)
    else:  # the kernel looks whether g_idx is in order in groups of this size
        size = said.fitting_group(inputs, groups) or ceil_div(inputs, max(1, groups))
    formula = Columns(
        codes=parts.part(linear.codes),
        zeros=parts.part(linear.zeros),
        scale=parts.part(linear.scales, is_scale=True),
        g_idx=None if g_idx is None else parts.part(g_idx, rows=1, columns=inputs),
        bits=bits,
        inputs=inputs,
        group=max(1, min(size, inputs)),
        packing=packing,
        zero_rule=layout.zero_rule(bits),
        transposed=not _is_upright(linear, inputs, outputs),
        dtype=linear.scales.spec.dtype,
    )
    return Group(
        name=f"{linear.name}.weight",
        shape=(formula.rows, formula.columns),
        formulas=(formula,),
        consumed=linear.consumed,
        scheme=f"{bits}-bit gptq, groups of {formula.group}",
    )


def _layout(stored: Stored, configs: tuple[Mapping[str, Any], ...]) -> Layout:
    """Return what the first config that says something says of the layout."""
    config = next((one for one in configs if one), {})
    names = {linears.text(config.get(key)) for key in ("checkpoint_format", "format")} - {""}
    if config.get("is_marlin_format") is True:
        names.add("marlin")
    known = names & _STORED_ZEROS.keys()
    if names - known or len(known) > 1:
        raise CheckpointUnsupported(
            "is GPTQ in a layout that is not decoded",
            path=stored.path,
            expected=f"a checkpoint_format of {', '.join(_STORED_ZEROS)}",
            found=", ".join(sorted(names)),
            hint="save it in the format gptq with GPTQModel",
        )
    if config.get("rotation"):
        raise CheckpointUnsupported(
            "has rotated weights, which need a rotation at run time",
            path=stored.path,
            expected="no rotation",
            found=repr(config["rotation"]),
        )
    name = next(iter(known), "gptq")
    planes = _PLANES | {3} if name == "gptq_p" else _PLANES
    if linears.by_autoround(config):
        planes = frozenset()
    return Layout(planes=planes, stored_zeros=_STORED_ZEROS[name])


def _shape(linear: Linear, said: Settings) -> tuple[int, int]:
    """Return bits and inputs, with all tensors checked against them."""
    rows, outputs = linear.matrix(linear.codes, linears.WORDS)
    groups, _ = linear.matrix(linear.scales, linears.FLOATS)
    linear.require(linear.scales, linears.FLOATS, (groups, outputs))
    kind = linear.codes.spec.dtype
    _, zero_words = linear.matrix(linear.zeros, frozenset({kind}))
    linear.require(linear.zeros, frozenset({kind}), (groups, zero_words))
    inputs = None
    if linear.g_idx is not None:
        inputs = linear.g_idx.spec.numel
        linear.require(linear.g_idx, frozenset({Dtype.I32, Dtype.I64}), (inputs,))
    fitting = [
        bits
        for bits in (linears.WIDTHS if kind.bits == 32 else (2, 4, 8))
        if ceil_div(outputs * bits, kind.bits) == zero_words
        and (inputs is None or ceil_div(inputs * bits, kind.bits) == rows)
    ]
    bits = linears.width(linear, fitting, said)
    return bits, rows * kind.bits // bits if inputs is None else inputs


def _is_upright(linear: Linear, inputs: int, outputs: int) -> bool:
    """Return whether the plain weight is `(inputs, outputs)`: of Conv1D, or an input embedding.

    An embedding has an input for each word of the vocabulary and is called one.
    """
    config = linear.stored.config
    if conv1d.is_conv1d(config, linear.name):
        return True
    leaf = linear.name.rpartition(".")[2]
    called = leaf in _EMBEDDINGS or ("emb" in leaf and leaf != "embed_out")
    return called and inputs in _vocabularies(config) and inputs != outputs


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    sizes = {linears.whole(config.get("vocab_size"))} - {None}
    nested = [_vocabularies(value) for value in config.values() if isinstance(value, Mapping)]
    return {size for size in sizes if size is not None}.union(*nested)
