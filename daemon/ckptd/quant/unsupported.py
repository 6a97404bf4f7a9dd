"""Quantization that is known and not decoded, and how its files look.

Such a checkpoint is refused before a byte is read, by what config.json calls it or, where that says
nothing, by tensors that no other method writes: better than codes published as if they were
weights. Why each is not decoded: trellises, rotations and kernels' own layouts need the library and
mostly its GPU; the rest is rare.

Source: the state dicts of transformers 5.24's integrations and of the libraries named here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointUnsupported
from ckptd.quant.group import Stored

_INTEGERS = frozenset({Dtype.I8, Dtype.U8, Dtype.I16, Dtype.U16, Dtype.I32, Dtype.U32, Dtype.I64})
_ELSEWHERE = "dequantize it with the library that wrote it, save that, and use the result here"
_ORIGINAL = "start from the weights that it was quantized from"


@dataclass(frozen=True, slots=True)
class Sign:
    """Tensors of one module that give a method away: `X.anchor`, of integers, and all others.

    An anchor of `dtypes` None may have any dtype.
    """

    anchor: str
    others: tuple[str, ...] = ()
    dtypes: frozenset[Dtype] | None = _INTEGERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method that is not decoded: its name, its values of `quant_method`, its tensors."""

    name: str
    methods: tuple[str, ...]
    signs: tuple[Sign, ...] = ()
    hint: str = _ELSEWHERE


METHODS: tuple[Method, ...] = (
    Method(
        name="AQLM (additive codebooks)",
        methods=("aqlm",),
        signs=(Sign("codes", ("codebooks", "scales")),),
    ),
    Method(
        name="VPTQ (vector codebooks)",
        methods=("vptq",),
        signs=(Sign("indices", ("centroids.weight",)),),
    ),
    Method(
        name="SpQR (sparse outliers)",
        methods=("spqr",),
        signs=(Sign("dense_weights", ("row_offsets", "col_vals")),),
    ),
    Method(
        name="HIGGS (rotated, in a kernel's layout)",
        methods=("higgs",),
        signs=(Sign("weight", ("scales", "tables", "tables2")),),
        hint="on a GPU, load it in transformers, call model.dequantize() and save that",
    ),
    Method(
        name="FP-Quant (rotated FP4)",
        methods=("fp_quant",),
        signs=(
            Sign("qweight", ("forward_hadamard_matrix",)),
            Sign("dqweight", ("forward_hadamard_matrix",), None),
        ),
    ),
    Method(name="FourOverSix (FP4)", methods=("fouroversix",)),
    Method(
        name="EETQ (int8 in a kernel's layout)",
        methods=("eetq",),
        signs=(Sign("weight", ("weight_scales",)),),
        hint=_ORIGINAL,
    ),
    Method(
        name="SINQ (two scales)",
        methods=("sinq", "asinq"),
        signs=(
            Sign("W_q", ("meta.scale",), None),
            Sign("W_q", ("meta.scale_q",), None),
            Sign("W_q", ("meta.scale2",), None),
        ),
    ),
    Method(
        name="EXL2",
        methods=("exl2",),
        signs=(Sign("q_weight", ("q_scale", "q_groups")),),
        hint=_ORIGINAL,
    ),
    Method(
        name="EXL3 (trellis, rotated)",
        methods=("exl3",),
        signs=(Sign("trellis", ("suh", "svh")), Sign("trellis", ("su", "sv"))),
        hint=_ORIGINAL,
    ),
    Method(
        name="QuIP# or QTIP (codebooks or trellis, rotated)",
        methods=("quip", "quip#", "quip_sharp", "qtip"),
        signs=(Sign("Qidxs", ("SU", "SV")), Sign("trellis", ("SU", "SV"))),
        hint=_ORIGINAL,
    ),
    Method(
        name="Marlin or QQQ (in a kernel's layout)",
        methods=("marlin", "gptq_marlin_24", "qqq"),
        signs=(
            Sign("B", ("s",)),
            Sign("B_24", ("B_meta", "s")),
            Sign("B", ("s_channel", "s_group")),
        ),
    ),
    Method(
        name="SqueezeLLM (look-up tables)",
        methods=("squeezellm",),
        signs=(Sign("qweight", ("lookup_table",)),),
    ),
    Method(name="BitBLAS (in a kernel's layout)", methods=("bitblas",)),
)


def refusal(stored: Stored, method: object, supported: Iterable[str]) -> CheckpointUnsupported:
    """Return the error for a config.json that names a method which no format answers to.

    It names the method and, where its tensors are known, some of them.
    """
    known = next((one for one in METHODS if method in one.methods), None)
    example = None if known is None else _example(known, stored, _anchors(stored))
    hint = _ELSEWHERE if known is None else known.hint
    if all(tensor.spec.dtype.is_plain_float for tensor in stored.tensors.values()):
        hint = "its tensors are plain: if they are the weights, take that out of config.json"
    return CheckpointUnsupported(
        f"is quantized with {known.name if known else repr(method)[:80]}, which is not decoded",
        path=stored.path,
        tensor=None if example is None else example[0],
        expected=_listed(supported),
        found=f"quant_method {repr(method)[:80]}" + ("" if example is None else _among(example)),
        hint=hint,
    )


def refuse_signs(stored: Stored, supported: Iterable[str]) -> None:
    """Return if no tensors give a method away that is not decoded, where config.json is silent.

    Raises:
        CheckpointUnsupported: they do; names the method and the tensors.
    """
    anchors = _anchors(stored)
    for method in METHODS:
        example = _example(method, stored, anchors)
        if example is not None:
            raise CheckpointUnsupported(
                f"is quantized with {method.name}, which is not decoded",
                path=stored.path,
                tensor=example[0],
                expected=_listed(supported),
                found="no quant_method in config.json" + _among(example),
                hint=method.hint,
            )


def _anchors(stored: Stored) -> dict[str, list[str]]:
    """Return the names of all tensors that may be a sign, by their last part."""
    wanted = {sign.anchor for method in METHODS for sign in method.signs}
    anchors: dict[str, list[str]] = {}
    for name in stored.tensors:
        module, _, leaf = name.rpartition(".")
        if module and leaf in wanted:
            anchors.setdefault(leaf, []).append(name)
    return anchors


def _example(
    method: Method, stored: Stored, anchors: dict[str, list[str]]
) -> tuple[str, ...] | None:
    """Return the names of the first tensors that are a sign of `method`."""
    for sign in method.signs:
        for name in anchors.get(sign.anchor, ()):
            if sign.dtypes and stored.tensors[name].spec.dtype not in sign.dtypes:
                continue
            others = [name.removesuffix(sign.anchor) + other for other in sign.others]
            if all(other in stored.tensors for other in others):
                return (name, *others)
    return None


def _among(example: tuple[str, ...]) -> str:
    return f" and {', '.join(example)}"


def _listed(supported: Iterable[str]) -> str:
    return f"one of {', '.join(sorted(supported))}"
