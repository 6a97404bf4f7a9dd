"""What mlx-lm stores otherwise than it is published, and nobody here turns back: refused by name.

Its `sanitize` methods rename, divide, transpose or shift weights of some architectures when they
are converted. Copied as they are, they would make a folder that other libraries load with weights
missing or wrong. Source: the `sanitize` methods of mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ckptd.errors import CheckpointUnsupported
from ckptd.quant.group import Group, Stored

_DIVIDED = frozenset({"embed_q", "unembed_out"})
"""Modules that were one, `kv_b_proj` (DeepSeek-V3, GLM-4.7-Flash, Kimi): a matrix a head each."""
_SHIFTED = frozenset(
    {
        "minimax_m3_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "step3p5",
    }
)
"""Architectures whose norms are stored with one added."""
_TRANSPOSED = frozenset({"gpt2"})
"""Architectures whose matrices lie the other way, and whose names begin with `model.`."""
_EXPERTS = frozenset({"moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts"})
"""Keys of a config that tell how many experts there are."""


def refuse(stored: Stored, groups: Iterable[Group]) -> None:
    """Return if all that is stored is as published, as far as it is known.

    Raises:
        CheckpointUnsupported: it is not; names the tensor or the architecture, and what differs.
    """
    for name in stored.tensors:
        if not _DIVIDED.isdisjoint(name.split(".")):
            _refuse(stored, name, "is one half of kv_b_proj, which mlx-lm divides")
    model_types = {str(config.get("model_type")) for config in _configs(stored)}
    norm = next((name for name in stored.tensors if "norm" in name), None)
    if norm is not None and not _SHIFTED.isdisjoint(model_types):
        _refuse(stored, norm, "is stored with one added, as mlx-lm does for this architecture")
    if not _TRANSPOSED.isdisjoint(model_types):
        _refuse(stored, None, "has matrices that mlx-lm transposes for this architecture")
    if not any(config.get(key) for config in _configs(stored) for key in _EXPERTS):
        return
    for group in groups:
        if len(group.shape) == 3:
            _refuse(stored, group.name, "is a stack of experts, whose published names are unknown")


def _configs(stored: Stored) -> list[Mapping[str, Any]]:
    nested = stored.config.get("text_config")
    return [stored.config, *([nested] if isinstance(nested, Mapping) else [])]


def _refuse(stored: Stored, name: str | None, what: str) -> NoReturn:
    raise CheckpointUnsupported(
        what,
        path=stored.path if name is None else stored.tensors[name].extent.path,
        tensor=name,
        expected="weights as the architecture is published",
        found=f"model_type {stored.config.get('model_type')!r:.80}",
        hint="start from the checkpoint that MLX converted",
    )
