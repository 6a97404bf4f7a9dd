"""Where a module that an adapter names is among the tensors of its base.

Adapters name modules as the model had them in memory; files may leave the model's own prefix out
(`h.0...` of the first GPT-2 files), and newer libraries have renamed parts. A name is tried as it
is first, then without and with its first part, then under the renamings known here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_RENAMED = (
    ("mlp.", "block_sparse_moe."),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
"""In memory, in transformers 5 and 4.52 or later, and in the files of older checkpoints."""
_FUSED = re.compile(r"(?P<module>.+)\.(?P<kind>gate_up_proj|down_proj)")
_EXPERT_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


def find(name: str, tensors: Collection[str]) -> str | None:
    """Return the tensor of the base that `name` is; None where there is none."""
    for candidate in _candidates(name, tensors):
        if candidate in tensors:
            return candidate
    return None


def experts(name: str, tensors: Collection[str]) -> list[list[str]]:
    """Return the tensors of separate experts that the fused parameter `name` is in memory.

    For each expert, those that stand one below the other in its part of the parameter. Empty where
    the base has no such experts.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return []
    for parts in _EXPERT_NAMES[match["kind"]]:
        first = find(f"{match['module']}.0.{parts[0]}.weight", tensors)
        if first is None:
            continue
        stem = first.removesuffix(f"0.{parts[0]}.weight")
        found: list[list[str]] = []
        while all(f"{stem}{len(found)}.{part}.weight" in tensors for part in parts):
            found.append([f"{stem}{len(found)}.{part}.weight" for part in parts])
        return found
    return []


def _candidates(name: str, tensors: Collection[str]) -> Iterator[str]:
    spelled = [name]
    for new, old in _RENAMED:
        for one, other in ((new, old), (old, new)):
            spelled += [
                re.sub(rf"(^|(?<=\.)){re.escape(one)}", other, n, count=1) for n in [*spelled]
            ]
    for spelling in dict.fromkeys(spelled):
        yield spelling
        if "." in spelling:
            yield spelling.partition(".")[2]
    firsts = dict.fromkeys(tensor.partition(".")[0] for tensor in tensors)
    for spelling in dict.fromkeys(spelled):
        yield from (f"{first}.{spelling}" for first in firsts)
