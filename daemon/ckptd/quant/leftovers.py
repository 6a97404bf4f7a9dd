"""Proof that nothing quantized remains: every tensor is a plain value, and no scale is orphaned.

A pure function of names, dtypes and shapes, asked of a plan before a byte is read. Codes are told
by their dtype. Scales, zero points and tables are floats like any weight and are told by name:
names that only quantization gives, and names that a plain model may give, too (`X.scale`), where a
weight `X.weight` stands beside them and the shape is a grid over it. Both are checked against the
tensors of all architectures that transformers has: none of theirs is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointUnsupported

Spec = tuple[Dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""

_PLAIN = frozenset({Dtype.F64, Dtype.F32, Dtype.F16, Dtype.BF16, Dtype.C64, Dtype.BOOL})
_INDICES = frozenset({Dtype.I64, Dtype.I32})
"""Integers that models use for positions, tables of places and counters."""
_MAX_LIST = 4096
"""A list of whole numbers up to this length is taken for places or sizes, not for codes."""

_BUFFERS = frozenset(
    [
        "position_ids",
        "token_type_ids",
        "relative_position_index",
        "num_batches_tracked",
        "tid2eid",
        "summary_idxs",
        "latent_stats_num_updates",
        "attention_mask",
        "attn_mask",
        "causal_mask",
        "bias",
    ]
)
"""Integer tensors of any size that plain models save; `bias` is a causal mask."""
_WEIGHT_PARTS = frozenset({
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_scales", "weight_global_scale",
    "weight_zero_point", "weight_g_idx", "weight_shape", "weight_packed", "weight_format",
    "qscale_weight", "pre_quant_scale", "qzeros", "g_idx", "qbiases", "absmax", "quant_map",
    "nested_absmax", "nested_quant_map", "SCB", "zero_scale", "embedding_quantized",
    "embedding_scale",
})  # fmt: skip
_ACTIVATION_PARTS = frozenset({
    "input_scale", "output_scale", "input_zero_point", "output_zero_point", "input_global_scale",
    "activation_scale", "activation_scale_inv", "input_activation_scale",
    "output_activation_scale", "act_global_scale", "qscale_act", "q_scale", "k_scale", "v_scale",
    "kv_scale", "k_cache_scale", "v_cache_scale",
})  # fmt: skip
_UNDECODED_PARTS = frozenset({
    "qweight", "W_q", "q_weight", "q_scale_max", "q_groups", "lookup_table", "tables2", "Qidxs",
    "Wscale", "SU", "SV", "suh", "svh", "trellis", "forward_hadamard_matrix",
    "backward_hadamard_matrix",
})  # fmt: skip
_COMPANIONS = _WEIGHT_PARTS | _ACTIVATION_PARTS | _UNDECODED_PARTS
"""Last parts of names that no plain model has."""
_COMPANION_NAME = re.compile(
    r"""(_scale_inv | _weight_scale | _weight_scale_2 | _input_scale | _proj_scales? | _proj_blocks
    | _qdata | \.weight\._(data|scale|shift)(\._data)? | \.quant_state\.[^.]+ )$""",
    re.VERBOSE,
)
"""Experts without `.weight` in their names, and parts of parts."""
_GRIDS = frozenset(
    ["scale", "scales", "zero", "zeros", "zero_point", "biases", "codes", "codebooks"]
)
"""Last parts that a plain model may have, too, but not as a matrix beside a weight."""


def check(tensors: Mapping[str, Spec], *, path: Path) -> None:
    """Return if all `tensors` (name to dtype and shape) are plain.

    Raises:
        CheckpointUnsupported: some are not; names the first, counts the others.
    """
    found = [(name, why) for name, spec in tensors.items() if (why := _why(name, spec, tensors))]
    if not found:
        return
    name, why = found[0]
    dtype, shape = tensors[name]
    more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    raise CheckpointUnsupported(
        f"{why}: something quantized would remain",
        path=path,
        tensor=name,
        expected="plain weights and buffers",
        found=f"{dtype} {list(shape)}{more}",
        hint="it is of a format that is not decoded, or left over from an earlier save: see the "
        "tensors with `ckptd inspect --tensors`",
    )


def _why(name: str, spec: Spec, tensors: Mapping[str, Spec]) -> str | None:
    """Return what is wrong with a tensor, or None where it is plain."""
    dtype, shape = spec
    module, _, leaf = name.rpartition(".")
    if leaf in _COMPANIONS or _COMPANION_NAME.search(name):
        return "is a part of a quantized weight that nothing consumed"
    if leaf in _GRIDS and len(shape) > 1:
        weight = tensors.get(f"{module}.weight")
        if weight is not None and len(weight[1]) > 1:
            return "is a grid beside a weight, which nothing consumed"
    if dtype in _PLAIN or _is_mask(leaf, spec):
        return None
    if dtype in _INDICES:
        is_list = len(shape) < 2 and sum(shape) <= _MAX_LIST
        return None if leaf in _BUFFERS or is_list else "is of integers that no model is known for"
    return f"is of {dtype}, which is no dtype of plain weights"


def _is_mask(leaf: str, spec: Spec) -> bool:
    """Whether it is the triangle that GPT-NeoX, GPT-J and GPT-Neo saved as bytes."""
    dtype, shape = spec
    return leaf == "bias" and dtype is Dtype.U8 and len(shape) == 4 and shape[2] == shape[3]
