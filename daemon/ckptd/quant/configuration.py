"""What config.json says of quantization, and the same config once nothing is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""The present key, the former one of compressed-tensors, and MLX's."""
SIDE_FILES = frozenset(
    {
        "hf_quant_config.json",
        "quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
        "quanto_qmap.json",
    }
)
"""Files that describe a quantization, whichever format they stand beside."""
_DTYPE_KEYS = ("dtype", "torch_dtype")


def declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization config, here or in a nested config; empty where there is none.

    Of several, the one with a `quant_method` counts.
    """
    found = list(_declared(config))
    named = [one for one in found if one.get("quant_method") is not None]
    return next(iter(named or found), {})


def plain(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config without its quantization at any depth and with `dtype`; all else stays.

    `dtype` is set wherever a dtype stands, and at the top.
    """
    changed = _with_dtype(without(config), dtype)
    if not any(key in changed for key in _DTYPE_KEYS):
        changed["dtype"] = dtype
    return changed


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without its quantization at any depth; all else stays."""
    return {
        key: without(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def compute_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that config.json loads the model in, here or in a nested config."""
    for key in _DTYPE_KEYS:
        if isinstance(config.get(key), str):
            return str(config[key])
    nested = (compute_dtype(value) for value in config.values() if isinstance(value, Mapping))
    return next((dtype for dtype in nested if dtype is not None), None)


def _declared(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    here = [config[key] for key in QUANTIZATION_KEYS if isinstance(config.get(key), Mapping)]
    nested = (v for k, v in config.items() if isinstance(v, Mapping) and k not in QUANTIZATION_KEYS)
    return here + [found for value in nested for found in _declared(value)]


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, Mapping)
        else dtype
        if key in _DTYPE_KEYS and value is not None
        else value
        for key, value in config.items()
    }
