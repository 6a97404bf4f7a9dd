"""Adapters attached to a model, saved the way PEFT saves and loads them.

Only the adapter's own tensors are written, to `adapter_model.safetensors`, beside
`adapter_config.json`; the base model's stay where they are. PEFT's files name tensors without the
adapter's name and with `base_model.model.` before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

STEM = "adapter_model"
PREFIX = "base_model.model."
_MARKS = ("lora_", "modules_to_save", "ia3_", "vera_", "hada_", "lokr_", "boft_", "oft_")
"""Parts of the names of adapter parameters, by PEFT's methods."""


def attached(model: Any) -> bool:
    """Say whether the model carries adapters."""
    return bool(getattr(model, "peft_config", None))


def active(model: Any) -> str:
    """Return the name of the one adapter that is saved.

    Raises:
        ValueError: several are active; PEFT's folder holds one.
    """
    ask = getattr(model, "active_adapters", None)
    given = ask() if callable(ask) else (ask or list(model.peft_config))
    names = [given] if isinstance(given, str) else list(given)
    if len(names) != 1:
        raise ValueError(
            f"{len(names)} adapters are active ({', '.join(names)}), and a folder holds one: "
            "activate each in turn with set_adapter and save it to a folder of its own"
        )
    return names[0]


def adapter_state(
    model: Any, state: Mapping[str, torch.Tensor], *, peft_format: bool
) -> dict[str, torch.Tensor]:
    """Return the active adapter's tensors under the names they get in the file.

    Args:
        model: carries `peft_config`: adapter name -> configuration.
        state: of the whole model, or of the adapter alone.
        peft_format: put `base_model.model.` before every name.
    """
    name = active(model)
    prefix = PREFIX if peft_format else ""
    others = set(model.peft_config) - {name}
    found = {}
    for key, tensor in state.items():
        parts = key.split(".")
        marked = any(part.startswith(_MARKS) for part in parts)
        if not marked or others.intersection(parts):
            continue
        kept = [part for part in parts if part not in (name, "modules_to_save")]
        found[prefix + ".".join(kept)] = tensor
    return found
