"""Which files of a folder are a PEFT adapter: its weights, and the configuration that says how.

PEFT writes adapter_model.safetensors first and adapter_config.json after it; there is no config.json
of the base model. A folder that holds a whole model, too, is a model and no adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ckptd.checkpoint import index
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete

STEM = "adapter_model"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
VALUE_HEAD_NAME = "value_head.safetensors"
"""What reward and PPO trainers save beside an adapter: it belongs to it, and to no merged model."""
_MODEL_NAMES = ("model.safetensors", "model.safetensors.index.json")


def recognise(names: Collection[str]) -> str | None:
    """Return the file that shows an adapter, or None where there is none or a whole model."""
    if any(name in names for name in _MODEL_NAMES):
        return None
    found = (name for name in (WEIGHTS_NAME, CONFIG_NAME, PICKLED_NAME) if name in names)
    return next(found, None)


def find(path: Path, names: Collection[str]) -> str:
    """Return the name of the adapter's weight file in the folder at `path`; a pickled one last.

    Raises:
        CheckpointIncomplete: weights or configuration are not there.
        CheckpointCorrupt: the configuration is not a JSON object.
    """
    found = next((name for name in (WEIGHTS_NAME, PICKLED_NAME) if name in names), None)
    if found is None:
        raise CheckpointIncomplete("no adapter weights yet", path=path, expected=WEIGHTS_NAME)
    if CONFIG_NAME not in names:
        raise CheckpointIncomplete(
            f"{CONFIG_NAME} is missing",
            path=path,
            hint="PEFT writes it after the weights: wait for the save to end, or save again",
        )
    read_config(path / CONFIG_NAME)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        CheckpointCorrupt: it is not JSON, or names no method.
    """
    value = index.read_json(path)
    if not isinstance(value.get("peft_type"), str):
        raise CheckpointCorrupt(
            "names no PEFT method", path=path, expected="peft_type", found=repr(sorted(value)[:6])
        )
    return value


def describe(config: Mapping[str, Any]) -> str:
    """Return what adapter_config.json says of the adapter, in one line."""
    base = config.get("base_model_name_or_path") or "a base model that it does not name"
    return f"{config['peft_type']} adapter of {base}"
