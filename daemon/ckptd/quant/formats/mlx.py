"""MLX: packed words beside scales and biases, and the same as transformers' method "metal" has it.

`X.weight` are words (`U32`) along the last axis, `X.scales` one for each group. In mode affine
`X.biases` (metal: `X.qbiases`) are added; the modes mxfp4, nvfp4 and mxfp8 have 8-bit scales and no
biases. Modules that config.json does not describe are told by their shapes, as mlx-lm tells them,
where these allow one answer alone.

Stacked experts are taken apart where that is how the architecture is published (`mlx_experts`), and
what mlx-lm changes otherwise is refused (`mlx_changed`); all other tensors stay as MLX has them. Linear layers and embeddings are as everywhere;
convolutions are channels last, which their names do not tell for sure, so they are refused.

Source: mlx 0.32 (`quantize`, `dequantize`), mlx-lm 0.32, transformers 5.24 (metal).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import mlx_changed, mlx_experts
from ckptd.quant.formula import Formula
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.formulas.packed import Packed
from ckptd.quant.formulas.scaled import Scaled
from ckptd.quant.group import Found, Group, Stored
from ckptd.quant.parts import Part

_FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16)
_AFFINE = "affine"
_BITS = (1, 2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_MICROSCALED = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_DEFAULTS = {_AFFINE: (4, 64), **_MICROSCALED}
"""Bits and columns of a group of each mode; for affine what MLX takes where nothing is said."""
_GLOBAL_MAX = 448.0 * 6.0
"""MLX stores the largest magnitude of an nvfp4 tensor: the largest scale times the largest code."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    mode: str
    bits: int
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """A quantized module: its words and their partners, raising what is wrong by name."""

    stored: Stored
    name: str
    words: StoredTensor

    def partner(self, field: str) -> StoredTensor | None:
        return self.stored.tensors.get(f"{self.name}.{field}")

    def scales(self) -> StoredTensor:
        scales = self.partner("scales")
        if scales is None:
            raise CheckpointCorrupt(
                "is packed, but its scales are missing",
                path=self.words.extent.path,
                tensor=self.words.spec.name,
                expected=f"{self.name}.scales",
                hint="save or copy the model again",
            )
        lead = scales.spec.shape[:-1] == self.words.spec.shape[:-1]
        if len(self.words.spec.shape) < 2 or not lead:
            self.mismatch(scales, f"as many rows as {list(self.words.spec.shape)}")
        if scales.spec.dtype not in (*_FLOATS, Dtype.U8):
            self.mismatch(scales, "a float, or U8 for the 8-bit scales of mxfp4, nvfp4 or mxfp8")
        return scales

    def biases(self) -> StoredTensor:
        scales = self.scales()
        biases = self.partner("biases") or self.partner("qbiases")
        if biases is None:
            raise CheckpointCorrupt(
                "is packed with scales, but its biases are missing",
                path=self.words.extent.path,
                tensor=self.words.spec.name,
                expected=f"{self.name}.biases or {self.name}.qbiases",
                hint="save or copy the model again",
            )
        if (biases.spec.dtype, biases.spec.shape) != (scales.spec.dtype, scales.spec.shape):
            self.mismatch(biases, f"{scales.spec.dtype} {list(scales.spec.shape)} as the scales")
        return biases

    def mismatch(self, tensor: StoredTensor, expected: str) -> NoReturn:
        raise CheckpointCorrupt(
            "does not fit the packed weight",
            path=tensor.extent.path,
            tensor=tensor.spec.name,
            expected=expected,
            found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
            hint="save or copy the model again",
        )


@dataclass(frozen=True, slots=True)
class Mlx:
    """MLX's quantized linear layers, embeddings and stacked experts."""

    name: str = "mlx"
    methods: tuple[str, ...] = ("metal", "mlx")
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return the first module of packed words with scales and biases, or 8-bit scales."""
        for module in _modules(stored):
            scales = module.partner("scales")
            if scales is None:
                continue
            biases = module.partner("biases") or module.partner("qbiases")
            if biases is not None or scales.spec.dtype is Dtype.U8:
                return f"{module.name} has packed words with scales beside them"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every packed module; see `ckptd.quant.group.Format.find`."""
        declared = _declared(stored)
        _require_words(stored)
        groups = tuple(
            weight
            for module in _modules(stored)
            for weight in mlx_experts.apart(
                _group(module, declared), stored.config.get("model_type")
            )
        )
        if declared.get("quant_method") != "metal":
            _refuse_convolutions(stored)
            mlx_changed.refuse(stored, groups)
        return Found(groups=groups)


def _modules(stored: Stored) -> Iterator[_Module]:
    for name, tensor in stored.tensors.items():
        if tensor.spec.dtype is Dtype.U32 and name.endswith(".weight"):
            yield _Module(stored=stored, name=name.removesuffix(".weight"), words=tensor)


def _require_words(stored: Stored) -> None:
    """Refuse scales that are beside biases and beside no weight."""
    for name, scales in stored.tensors.items():
        module = name.removesuffix(".scales")
        has_biases = not {f"{module}.biases", f"{module}.qbiases"}.isdisjoint(stored.tensors)
        if module != name and has_biases and f"{module}.weight" not in stored.tensors:
            raise CheckpointCorrupt(
                "are scales with biases, but what they are for is missing",
                path=scales.extent.path,
                tensor=name,
                expected=f"{module}.weight",
                hint="save or copy the model again",
            )


def _declared(stored: Stored) -> Mapping[str, Any]:
    """Return MLX's own key wherever a config has it: what came before may have left another."""
    for config in (stored.config, stored.config.get("text_config")):
        own = config.get("quantization") if isinstance(config, Mapping) else None
        if isinstance(own, Mapping):
            return own
    return stored.quantization


def _group(module: _Module, declared: Mapping[str, Any]) -> Group:
    scheme = _scheme(module, declared)
    *lead, width = module.words.spec.shape
    if scheme.mode == _AFFINE:
        partners = [module.scales(), module.biases()]
        formulas = _affine(module, scheme, partners)
    else:
        partners = [module.scales(), *_global_scale(module, scheme, math.prod(lead[:-1]))]
        formulas = _microscaled(module, scheme, partners)
    return Group(
        name=module.words.spec.name,
        shape=(*lead, width * 32 // scheme.bits),
        formulas=formulas,
        consumed=(module.words.spec.name, *(partner.spec.name for partner in partners)),
        scheme=f"{scheme.bits}-bit {scheme.mode}, groups of {scheme.group}",
    )


def _scheme(module: _Module, declared: Mapping[str, Any]) -> _Scheme:
    """Return how a module is packed: as config.json says, or as its shapes alone allow.

    Raises:
        CheckpointCorrupt: config.json contradicts the shapes of a module that it names, or they
            allow several answers.
    """
    scales, words = module.scales(), module.words
    bits, groups = words.spec.shape[-1] * 32, scales.spec.shape[-1]
    is_affine = scales.spec.dtype is not Dtype.U8
    own = declared.get(module.name)
    told = _told(module, own if isinstance(own, Mapping) else declared)

    def fits(scheme: _Scheme) -> bool:
        packed = groups * scheme.group * scheme.bits
        return (scheme.mode == _AFFINE) is is_affine and packed == bits

    if told is not None and fits(told):
        return told
    possible = [_Scheme(_AFFINE, bits_each, group) for bits_each in _BITS for group in _GROUPS] + [
        _Scheme(mode, *sizes) for mode, sizes in _MICROSCALED.items()
    ]
    fitting = [scheme for scheme in possible if fits(scheme)]
    if told is not None and told.mode != _AFFINE and not is_affine:
        fitting = []  # half as many scales would pass for another mode's
    if len(fitting) == 1 and bits and not isinstance(own, Mapping):
        return fitting[0]
    raise CheckpointCorrupt(
        "is not packed as config.json says",
        path=words.extent.path,
        tensor=words.spec.name,
        expected=_text(told) if told is not None else "quantization: {bits, group_size, mode}",
        found=f"{bits} bits in {groups} groups a row: "
        + (" or ".join(_text(scheme) for scheme in fitting) or "nothing that MLX writes"),
        hint="correct the quantization of this module in config.json",
    )


def _told(module: _Module, said: Mapping[str, Any]) -> _Scheme | None:
    """Return what a config says, with MLX's defaults for what it leaves out; None if nothing."""
    mode, bits, group = said.get("mode"), said.get("bits"), said.get("group_size")
    if mode is None and bits is None and group is None:
        return None
    mode = _AFFINE if mode is None else mode
    if not isinstance(mode, str) or mode not in _DEFAULTS:
        raise CheckpointUnsupported(
            "is quantized in a mode that is not decoded",
            path=module.stored.path,
            tensor=module.words.spec.name,
            expected=" or ".join(_DEFAULTS),
            found=repr(mode)[:80],
        )
    default_bits, default_group = _DEFAULTS[mode]
    bits = default_bits if bits is None else bits
    group = default_group if group is None else group
    whole = type(bits) is int and type(group) is int
    if not whole or bits not in _BITS or not 0 < group < 1 << 31:
        raise CheckpointCorrupt(
            "has settings in config.json that are none of MLX's",
            path=module.stored.path,
            tensor=module.words.spec.name,
            expected=f"bits of {list(_BITS)} and a group_size above 0",
            found=f"bits {bits!r:.40}, group_size {group!r:.40}",
        )
    return _Scheme(mode, bits, group)


def _text(scheme: _Scheme) -> str:
    return f"{scheme.bits}-bit {scheme.mode} in groups of {scheme.group}"


def _affine(module: _Module, scheme: _Scheme, partners: list[StoredTensor]) -> tuple[Formula, ...]:
    """Return a formula for each matrix: transformers computes metal in float32, MLX rounds twice."""
    *lead, width = module.words.spec.shape
    count, rows = math.prod(lead[:-1]) or 1, math.prod(lead)
    codes = parts.part(module.words, rows=rows, columns=width * 4, dtype=Dtype.U8)
    scale, bias = (parts.stacked(parts.part(partner, is_scale=True), count) for partner in partners)
    return tuple(
        Packed(
            codes=matrix,
            scale=scale[place],
            bias=bias[place],
            bits=scheme.bits,
            columns=width * 32 // scheme.bits,
            group=scheme.group,
            rounds_product=module.partner("qbiases") is None,
            dtype=partners[0].spec.dtype,
        )
        for place, matrix in enumerate(parts.stacked(codes, count))
    )


def _microscaled(
    module: _Module, scheme: _Scheme, partners: list[StoredTensor]
) -> tuple[Formula, ...]:
    """Return a formula for each matrix; MLX dequantizes to bfloat16, with a global scale to float32.

    Values are exact in bfloat16 or round once.
    """
    *lead, width = module.words.spec.shape
    count, rows = math.prod(lead[:-1]) or 1, math.prod(lead)
    is_fp8 = scheme.bits == 8
    element = Dtype.F8_E4M3 if is_fp8 else Dtype.U8
    kind = Dtype.F8_E4M3 if scheme.mode == "nvfp4" else Dtype.F8_E8M0
    codes = parts.part(module.words, rows=rows, columns=width * 4, dtype=element)
    scales = parts.stacked(parts.part(partners[0], dtype=kind, is_scale=True), count)
    globals_: list[Part | None] = [None] * count
    if len(partners) > 1:
        whole = parts.part(partners[1], rows=partners[1].spec.numel, columns=1, is_scale=True)
        globals_ = [*parts.stacked(whole, count)] if whole.rows == count else [whole] * count
    dtype = Dtype.BF16 if len(partners) == 1 else Dtype.F32
    made: list[Formula] = []
    for matrix, scale, one in zip(parts.stacked(codes, count), scales, globals_, strict=True):
        if is_fp8:
            block = (1, scheme.group)
            made.append(Scaled(codes=matrix, scale=scale, block=block, dtype=dtype))
        else:
            made.append(
                Fp4(
                    codes=matrix,
                    scale=scale,
                    global_scale=one,
                    global_divisor=_GLOBAL_MAX if one is not None else 1.0,
                    group=scheme.group,
                    dtype=dtype,
                )
            )
    return tuple(made)


def _global_scale(module: _Module, scheme: _Scheme, count: int) -> list[StoredTensor]:
    """Return the magnitude of an nvfp4 tensor or of each expert, where there is one."""
    found = module.partner("global_scale")
    if found is None:
        return []
    fits = scheme.mode == "nvfp4" and found.spec.numel in (1, count)
    if found.spec.dtype is not Dtype.F32 or not fits:
        module.mismatch(found, f"F32, one or {count}, for nvfp4 alone")
    return [found]


def _refuse_convolutions(stored: Stored) -> None:
    for name, tensor in stored.tensors.items():
        axes = len(tensor.spec.shape)
        convolution = axes >= 4 or (axes == 3 and "conv" in name)
        if convolution and tensor.spec.dtype.is_plain_float:
            raise CheckpointUnsupported(
                "looks like a convolution, which MLX may store with its axes in another order",
                path=tensor.extent.path,
                tensor=name,
                expected="linear layers, embeddings and norms",
                found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
                hint="start from the checkpoint that MLX converted, or convert it with mlx-lm",
            )


FORMAT = Mlx()
