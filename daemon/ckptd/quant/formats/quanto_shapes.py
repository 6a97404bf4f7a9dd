"""Shapes that quanto does not store: of a weight whose codes lie in groups, two axes are one.

The number of elements is known, and so is the size of groups, which follows from the columns alone.
What is missing is one axis: a bias tells the rows, config.json the axis that a layer of that name
shares with the hidden state. The other one must then be a number that config.json knows, too, and
the groups must be those that quanto makes for it. Anything else has no answer here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GROUP_SIZES = (128, 96, 64, 32)
"""What quanto tries in this order; none divides the columns: one group a row."""

_READS_HIDDEN = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "lm_head",
        "gate",
        "router",
        "w1",
        "w3",
        "q",
        "k",
        "v",
        "wi",
        "wi_0",
        "wi_1",
        "fc1",
        "fc_in",
        "query_key_value",
        "dense_h_to_4h",
    ]
)
"""Layers whose columns are the hidden state."""
_WRITES_HIDDEN = frozenset(
    ["o_proj", "down_proj", "out_proj", "w2", "o", "wo", "fc2", "fc_out", "dense_4h_to_h"]
)
"""Layers whose rows are the hidden state."""
_HIDDEN_KEYS = ("hidden_size", "d_model", "n_embd")
_HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "num_heads", "n_head")
_HEAD_SIZE_KEYS = ("head_dim", "d_kv", "v_head_dim")
_NO_LINEAR = ("conv", "patch_embed")
"""In the name of a module that may be a convolution: its shape has more axes than can be known."""
_NESTED = {"vision": "vision_config", "visual": "vision_config", "audio": "audio_config"}


def group_size(columns: int) -> int:
    """Return the size of groups that quanto gives a linear layer of so many columns."""
    if columns <= GROUP_SIZES[0]:
        return columns
    return next((size for size in GROUP_SIZES if columns % size == 0), columns)


def linear_shape(
    module: str, *, numel: int, group: int, bias_rows: int | None, config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return (rows, columns) of the linear layer `module`, or None where they cannot be known.

    `numel` is the number of its elements, `group` the columns of its matrix of codes.
    """
    if any(word in module for word in _NO_LINEAR):
        return None
    config = config_of(module, config)
    hidden = next((size for key in _HIDDEN_KEYS if (size := _size(config, key))), None)
    leaf = module.rpartition(".")[2]
    rows = bias_rows
    if rows is None and leaf in _WRITES_HIDDEN:
        rows = hidden
    if rows is None and leaf in _READS_HIDDEN and hidden:
        rows = numel // hidden
    if not rows or numel % rows:
        return None
    columns = numel // rows
    known = known_sizes(config)
    if rows not in known or columns not in known or group_size(columns) != group:
        return None
    return rows, columns


def config_of(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes `module`."""
    key = next((key for word, key in _NESTED.items() if word in module), "text_config")
    nested = config.get(key)
    return nested if isinstance(nested, Mapping) else config


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None


def known_sizes(config: Mapping[str, Any]) -> set[int]:
    """Return every number of the config and what attention makes of heads and their size."""
    return set(_known(config))


def _known(config: Mapping[str, Any]) -> Iterator[int]:
    for value in config.values():
        for number in value if isinstance(value, list) else (value,):
            if type(number) is int and number > 0:
                yield number
    heads = {key: size for key in _HEAD_KEYS if (size := _size(config, key))}
    sizes = [size for key in _HEAD_SIZE_KEYS if (size := _size(config, key))]
    hidden = next((size for key in _HIDDEN_KEYS if (size := _size(config, key))), None)
    if hidden and "num_attention_heads" in heads:
        sizes.append(hidden // heads["num_attention_heads"])
    queries = max(heads.values(), default=0)
    keys = heads.get("num_key_value_heads", queries)
    for size in sizes:
        yield from (count * size for count in heads.values())
        yield (queries + 2 * keys) * size  # one layer for queries, keys and values
    inner = _size(config, "intermediate_size")
    if inner:
        yield 2 * inner  # one layer for gate and up
