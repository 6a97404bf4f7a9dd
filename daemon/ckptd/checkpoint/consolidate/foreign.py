"""Weights that transformers does not load under any name: told by what stands beside them, or by names.

Published with a config of transformers they would look right and be wrong, so they are refused,
with what converts them.
Sources: nanoGPT `train.py`, openai/whisper `load_model`, fairseq `checkpoint_utils`, LitGPT `model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint.pieces import Tensor
from ckptd.errors import CheckpointUnsupported


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A trainer's file, told by all of `keys` at its top."""

    keys: frozenset[str]
    what: str
    hint: str


_FILES = (
    _Foreign(
        frozenset({"model", "model_args", "iter_num"}),
        "a checkpoint of nanoGPT: its linear weights lie across those of transformers' GPT-2",
        "load it and transpose c_attn, c_proj and c_fc into a GPT2LMHeadModel, and save that",
    ),
    _Foreign(
        frozenset({"dims", "model_state_dict"}),
        "a model of OpenAI's whisper, with names of its own",
        "convert it with transformers' convert_openai_to_hf.py",
    ),
    _Foreign(
        frozenset({"model", "optimizer_history", "extra_state"}),
        "a checkpoint of fairseq, with names of its own",
        "convert it with the script of its architecture in transformers, and point ckptd at the result",
    ),
)
_LITGPT = re.compile(r"(^|\.)transformer\.h\.\d+\.(attn\.(qkv|attn)|mlp\.fc_1)\.weight$")
_CONV1D = re.compile(r"(^|\.)h\.\d+\.attn\.c_attn\.weight$")


def require_known_file(value: Mapping[Any, Any], path: Path) -> None:
    """Refuse a file of a trainer whose weights transformers does not load.

    Raises:
        CheckpointUnsupported: says whose it is, and what converts it.
    """
    for one in _FILES:
        if one.keys <= value.keys():
            raise CheckpointUnsupported(one.what, path=path, hint=one.hint)


def require_known_names(names: Collection[str], path: Path) -> None:
    """Refuse names that only LitGPT gives.

    Raises:
        CheckpointUnsupported: names the tensor, and what converts it.
    """
    found = next((name for name in names if _LITGPT.search(name)), None)
    if found is not None:
        raise CheckpointUnsupported(
            "a model of LitGPT, with names and fused weights of its own",
            path=path,
            tensor=found,
            hint="convert it with `litgpt convert_from_litgpt` and point ckptd at the result",
        )


def require_own_order(tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """Refuse linear weights of GPT-2 that lie `(outputs, inputs)`: transformers has them across.

    Raises:
        CheckpointUnsupported: names the tensor and its shape.
    """
    if config.get("model_type") != "gpt2":
        return
    for name, tensor in tensors.items():
        shape = tensor.spec.shape
        if _CONV1D.search(name) and len(shape) == 2 and shape[0] == 3 * shape[1]:
            raise CheckpointUnsupported(
                "lies across what transformers' GPT-2 has there",
                path=path,
                tensor=name,
                expected=f"shape {shape[::-1]}",
                found=f"shape {shape}",
                hint="transpose c_attn, c_proj and c_fc before saving (nanoGPT has them as Linear)",
            )
