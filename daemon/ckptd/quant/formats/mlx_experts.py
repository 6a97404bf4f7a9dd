"""Stacked experts of MLX under the names that their checkpoints have everywhere else.

mlx-lm stacks the experts of a layer into one tensor when it converts (`switch_mlp.gate_proj`); on
disk, other libraries want one weight an expert. Only architectures whose names are known are taken
apart; what others stack keeps its name. Source: the `sanitize` methods of mlx-lm 0.32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from ckptd.quant.group import Group

_PROJECTIONS = {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}
_NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"), _PROJECTIONS
    ),
    **dict.fromkeys(("mixtral", "phimoe"), _NUMBERED),
}
"""By model_type, what a projection of one expert is called on disk."""
_STACKED = re.compile(r"(.+)\.switch_mlp\.(gate_proj|down_proj|up_proj)\.weight")


def apart(group: Group, model_type: object) -> Iterator[Group]:
    """Yield a weight for each expert of a stack whose names are known, else the group as it is."""
    names = _NAMES.get(model_type) if isinstance(model_type, str) else None
    match = _STACKED.fullmatch(group.name)
    if names is None or match is None or len(group.shape) != 3:
        yield group
        return
    for number, formula in enumerate(group.formulas):
        yield dataclasses.replace(
            group,
            name=f"{match[1]}.experts.{number}.{names[match[2]]}.weight",
            shape=group.shape[1:],
            formulas=(formula,),
        )
