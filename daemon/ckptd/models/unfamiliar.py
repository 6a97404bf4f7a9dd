"""The rule for model classes that the architecture table does not know (custom code).

Names, shapes and config.json together must allow exactly one reading: one input embedding, at most
one head, a vocabulary size that fits both. Anything else is refused with the tensors that compete;
what such a class ties is believed only where config.json says so itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ckptd import errors
from ckptd.checkpoint.dtypes import Dtype
from ckptd.models import configuration
from ckptd.models.architectures import FLAG, Architecture, Flag, Role, Row, Tie

INPUT_MODULES = frozenset(
    {
        "embed_in", "embed_tokens", "embedding", "embeddings", "shared", "tok_embeddings",
        "token_embedding", "tokens_embed", "word_embedding", "word_embeddings", "wte",
    }
)  # fmt: skip
"""What modules that embed tokens are called."""
HEAD_MODULES = frozenset(
    {
        "embed_out", "generator_lm_head", "head", "lm_head", "lm_heads", "lm_loss", "output",
        "output_layer", "output_projection", "proj_out", "vocab_projector",
    }
)  # fmt: skip
"""What modules that give logits are called."""
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
_MAX_SPARE_ROWS = 4096
"""How many rows more than `vocab_size` padding may have added."""


class Shaped(Protocol):
    """What is asked of a tensor: no more than a header says."""

    @property
    def dtype(self) -> Dtype:
        """The element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""


def infer(
    config: Mapping[str, Any], tensors: Mapping[str, Shaped], stage: str, path: Path | str
) -> Architecture:
    """Return what can be said for certain of a checkpoint of an unknown class.

    Raises:
        StageRefused: several tensors may be the input embedding or the head, or config.json has
            several text models.
    """
    where = configuration.text_path(config)
    if where is None:
        raise errors.StageRefused(
            "config.json has several text models and names an unknown class", stage=stage, path=path
        )
    key = f"{where}.vocab_size" if where else "vocab_size"
    size = configuration.get(config, key)
    size = size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None
    inputs = _matching(tensors, INPUT_MODULES, size)
    heads = _matching(tensors, HEAD_MODULES, size)
    for what, names in (("input embedding", inputs), ("head", heads)):
        if len(names) > 1:
            raise errors.StageRefused(
                f"may be the {what} of this unknown class, and so may {', '.join(names[1:4])}",
                stage=stage,
                path=path,
                tensor=names[0],
            )
    name = str((config.get("architectures") or ["an unnamed class"])[0])
    flag = Flag(
        keys=(f"{where}.{FLAG}" if where and FLAG not in config else FLAG,), defaults=(False,)
    )
    if not inputs or not heads:
        _check_headless(name, inputs, heads, flag, config, stage, path)
    rows = [Row(name=one, role=Role.INPUT, axis=0, key=key, offset=0) for one in inputs]
    rows += [Row(name=one, role=Role.HEAD, axis=0, key=key, offset=0) for one in heads]
    biases = [one.removesuffix("weight") + "bias" for one in heads]
    rows += [
        Row(name=one, role=Role.BIAS, axis=0, key=key, offset=0) for one in biases if one in tensors
    ]
    ties = [Tie(target=head, source=source, flag=flag) for source in inputs for head in heads]
    return Architecture(
        name=name,
        model_type=str(config.get("model_type")),
        known=False,
        rows=tuple(rows),
        ties=tuple(ties),
        resize_keys=(key,) if size is not None else (),
        not_resizable=None if size is not None else f"config.json has no {key}",
    )


def _matching(
    tensors: Mapping[str, Shaped], modules: frozenset[str], size: int | None
) -> list[str]:
    """Return the matrices that are called like this and have rows for the vocabulary."""
    found = []
    for name, tensor in tensors.items():
        *_, module, leaf = ("", *name.split("."))
        if leaf != "weight" or module not in modules or len(tensor.shape) != 2:
            continue
        if size is None or size <= tensor.shape[0] <= size + _MAX_SPARE_ROWS:
            found.append(name)
    return found


def _check_headless(
    name: str,
    inputs: list[str],
    heads: list[str],
    flag: Flag,
    config: Mapping[str, Any],
    stage: str,
    path: Path | str,
) -> None:
    """Refuse what lacks one of the two although its class or flag says there are two."""
    if heads and not inputs:
        raise errors.StageRefused(
            f"is a head without an input embedding, and {name} is unknown: "
            "the embedding's canonical name cannot be told",
            stage=stage,
            path=path,
            tensor=heads[0],
        )
    apart = flag.explicit(config) and not flag.value(config)
    if inputs and not heads and apart and _CAUSAL.search(name):
        raise errors.StageRefused(
            f"is there without a head, but {flag.keys[0]} is false and {name} is unknown",
            stage=stage,
            path=path,
            tensor=inputs[0],
        )
