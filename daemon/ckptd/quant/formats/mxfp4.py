"""gpt-oss: experts in MXFP4 as `X_blocks` and `X_scales`, everything else plain.

`X_blocks` is `U8` of (experts, N, K / 32, 16), two codes a byte, and `X_scales` the exponents
(experts, N, K / 32); the weight is `X` of (experts, K, N), as the model multiplies from the left.
OpenAI's own layout says `X.blocks` and `X.scales` and keeps (experts, N, K).

Two accidents are told apart by dtype and shape, and read for what they hold. By its source,
transformers 5.24 writes what it quantized on the fly with groups along N: then the blocks are
(experts, K, N / 32, 16), which the bias of N gives away. And versions before it wrote dequantized
weights under the name `X_blocks`: they get their name back.

Source: the model cards' files, `convert_moe_packed_tensors`, `Mxfp4Quantize` and
`Mxfp4ReverseDeserialize` of transformers 5.24; OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt
from ckptd.quant import parts
from ckptd.quant.formulas.fp4 import Fp4
from ckptd.quant.group import Found, Group, Stored

_GROUP = 32
_BLOCK_BYTES = _GROUP // 2
_SUFFIXES = {"_blocks": "_scales", ".blocks": ".scales"}
"""How codes and scales are told apart from the weight's name: as in transformers, as at OpenAI."""
_BIAS = "_bias"
_MISNAMED = ("experts.gate_up_proj_blocks", "experts.down_proj_blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """Codes and scales of one weight of experts; `rows` and `columns` are those of the codes."""

    name: str
    codes: StoredTensor
    scales: StoredTensor
    count: int
    rows: int
    columns: int
    outputs: int | None
    """The length of the bias, where there is one: the axis that the weight ends in."""

    @property
    def is_transposed(self) -> bool | None:
        """Whether the weight's rows are the codes' columns; None where both would fit."""
        if self.outputs is None or self.rows == self.columns:
            return None
        return self.outputs == self.rows


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Checkpoints of gpt-oss and what is derived from it."""

    name: str = "mxfp4"
    methods: tuple[str, ...] = ("mxfp4",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = "modules_to_not_convert"

    def recognise(self, stored: Stored) -> str | None:
        """Return the first pair of blocks and scales, or weights under the name of blocks."""
        for tensor, suffix in _blocks(stored):
            name = tensor.spec.name
            partner = name.removesuffix(suffix) + _SUFFIXES[suffix]
            if partner in stored.tensors:
                return f"{name} and {partner} are there"
            if _is_plain(tensor):
                return f"{name} is there"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight in MXFP4, and the names of those that have only lost theirs.

        Raises:
            CheckpointCorrupt: blocks without scales or scales without blocks; shapes or dtypes
                that do not fit each other or the bias.
        """
        found, renamed = [], []
        for tensor, suffix in _blocks(stored):
            name = tensor.spec.name.removesuffix(suffix)
            if _is_plain(tensor):
                renamed.append((tensor.spec.name, name))
                _require_plain(stored, tensor, name)
            else:
                found.append(_experts(stored, tensor, name, suffix))
        _require_blocks(stored, found)
        groups = tuple(_group(one, transposed=_orientation(one, found)) for one in found)
        return Found(groups=groups, renamed=tuple(renamed))


FORMAT = Mxfp4()


def _blocks(stored: Stored) -> Iterator[tuple[StoredTensor, str]]:
    for name, tensor in stored.tensors.items():
        for suffix in _SUFFIXES:
            if name.endswith(suffix):
                yield tensor, suffix


def _is_plain(tensor: StoredTensor) -> bool:
    named = tensor.spec.name.endswith(_MISNAMED)
    return named and tensor.spec.dtype.is_plain_float and len(tensor.spec.shape) == 3


def _require_plain(stored: Stored, tensor: StoredTensor, name: str) -> None:
    """Refuse a plain weight called blocks whose name is taken, or that its bias does not fit."""
    for taken in (name, name + "_scales"):
        if taken in stored.tensors:
            raise _wrong(tensor, "U8 codes", f"{tensor.spec.dtype}, and {taken} beside it")
    bias = stored.tensors.get(name + _BIAS)
    count, _, outputs = tensor.spec.shape
    if bias is not None and bias.spec.shape != (count, outputs):
        expected = f"(experts, inputs, outputs) for a bias of {list(bias.spec.shape)}"
        raise _wrong(tensor, expected, f"{list(tensor.spec.shape)}")


def _experts(stored: Stored, codes: StoredTensor, name: str, suffix: str) -> _Experts:
    scales = stored.tensors.get(name + _SUFFIXES[suffix])
    if scales is None:
        raise CheckpointCorrupt(
            "has blocks, but no scales",
            path=codes.extent.path,
            tensor=codes.spec.name,
            expected=name + _SUFFIXES[suffix],
            hint="copy all shards again",
        )
    spec = scales.spec
    if spec.dtype not in (Dtype.U8, Dtype.F8_E8M0) or len(spec.shape) != 3 or 0 in spec.shape:
        raise _wrong(
            scales, "U8 exponents of (experts, rows, groups)", f"{spec.dtype} {list(spec.shape)}"
        )
    whole = (*spec.shape, _BLOCK_BYTES)
    flat = (*spec.shape[:2], spec.shape[2] * _BLOCK_BYTES)
    if codes.spec.dtype is not Dtype.U8 or codes.spec.shape not in (whole, flat):
        found = f"{codes.spec.dtype} {list(codes.spec.shape)}"
        raise _wrong(codes, f"U8 {list(whole)} for scales of {list(spec.shape)}", found)
    bias = stored.tensors.get(name + _BIAS) if suffix == "_blocks" else None
    experts = _Experts(
        name=name,
        codes=codes,
        scales=scales,
        count=spec.shape[0],
        rows=spec.shape[1],
        columns=spec.shape[2] * _GROUP,
        outputs=None if bias is None else bias.spec.shape[-1] if bias.spec.shape else 0,
    )
    if bias is not None and experts.outputs not in (experts.rows, experts.columns):
        raise _wrong(codes, f"blocks for a bias of {list(bias.spec.shape)}", f"{list(whole)}")
    return experts


def _orientation(experts: _Experts, found: list[_Experts]) -> bool:
    """Return whether the weight is the codes transposed.

    A square matrix (gpt-oss has them) lies as the other one of its experts does, which the same
    code wrote; without any hint it lies as OpenAI and transformers publish theirs.
    """
    if not experts.codes.spec.name.endswith("_blocks"):
        return False
    if experts.is_transposed is not None:
        return experts.is_transposed
    module = experts.name.rpartition(".")[0]
    siblings = [one for one in found if one.name.rpartition(".")[0] == module]
    hints = {one.is_transposed for one in siblings} - {None}
    return hints != {False}


def _group(experts: _Experts, *, transposed: bool) -> Group:
    codes = parts.part(experts.codes, rows=experts.count * experts.rows)
    scales = parts.part(
        experts.scales,
        rows=experts.count * experts.rows,
        dtype=Dtype.F8_E8M0,
        is_scale=True,
    )
    codes = dataclasses.replace(codes, columns=experts.columns // 2)
    scales = dataclasses.replace(scales, columns=experts.columns // _GROUP)
    matrix = (experts.rows, experts.columns)
    return Group(
        name=experts.name,
        shape=(experts.count, *(matrix[::-1] if transposed else matrix)),
        formulas=tuple(
            Fp4(codes=code, scale=scale, group=_GROUP, transposed=transposed, dtype=Dtype.BF16)
            for code, scale in zip(
                parts.stacked(codes, experts.count),
                parts.stacked(scales, experts.count),
                strict=True,
            )
        ),
        consumed=(experts.codes.spec.name, experts.scales.spec.name),
        scheme=f"4-bit mxfp4, groups of {_GROUP}",
    )


def _require_blocks(stored: Stored, found: list[_Experts]) -> None:
    consumed = {experts.scales.spec.name for experts in found}
    for name, tensor in stored.tensors.items():
        if name in consumed or tensor.spec.dtype not in (Dtype.U8, Dtype.F8_E8M0):
            continue
        for codes, scales in _SUFFIXES.items():
            if name.endswith(scales):
                partner = name.removesuffix(scales) + codes
                raise _wrong(tensor, f"{partner} beside it", "none")


def _wrong(tensor: StoredTensor, expected: str, found: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        "does not fit its quantization",
        path=tensor.extent.path,
        tensor=tensor.spec.name,
        expected=expected,
        found=found,
        hint="copy all shards again, or save the model again",
    )
