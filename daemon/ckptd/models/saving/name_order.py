"""The order in which a save takes its tensors, which decides what lies in which shard.

It is that of transformers, so that both divide the same model alike: the model's own order for a
fresh model; names sorted by their parts for one that was loaded. Where transformers has other names
at run time than in files (fused experts, renamed layers), it sorts by those, for fresh models too;
the few rules for that stand here as data and are used for nothing but the order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Rules = Sequence[tuple[str, str]]

_EXPERTS: Rules = (
    (r"\.experts\.(\d+)\.(?:down_proj|w2)\.", r".experts.down_proj.\1."),
    (r"\.experts\.(\d+)\.(?:gate_proj|w1)\.", r".experts.gate_up_proj.1.\1."),
    (r"\.experts\.(\d+)\.(?:up_proj|w3)\.", r".experts.gate_up_proj.2.\1."),
)
SORTED_AS: dict[str, Rules] = {
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."), *_EXPERTS),
    "qwen3_moe": _EXPERTS,
    "vit": (
        (r"\bencoder\.layer\.", "layers."),
        (r"\.attention\.attention\.([kqv])\w+\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
}
"""model_type -> replacements that turn a name in a file into what transformers sorts by."""


def ordered(names: Iterable[str], *, model_type: str, is_loaded: bool) -> list[str]:
    """Return the names in the order of a save.

    Args:
        names: in the model's own order.
        model_type: of its configuration.
        is_loaded: whether the model came from a checkpoint.
    """
    rules = SORTED_AS.get(model_type)
    if rules is None and not is_loaded:
        return list(names)
    return sorted(names, key=lambda name: _key(name, rules or ()))


def _key(name: str, rules: Rules) -> list[tuple[int, int, str, int]]:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return [_part(part) for part in name.split(".")]


def _part(part: str) -> tuple[int, int, str, int]:
    """Numbers first, by value; then words by their text, then by the number at their end."""
    if part.isdigit():
        return 0, int(part), "", 0
    text = part.rstrip("0123456789")
    digits = part[len(text) :]
    return 1, 0, text, int(digits) if digits else -1
