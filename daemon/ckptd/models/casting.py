"""The dtype of a whole model: which of its parts stay in float32, and casting what is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ckptd.models.base import PreTrainedModel


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return a pattern of the names that stay in float32 although the model is in `dtype`."""
    globs: set[str] = set()
    for module in model.modules():
        if dtype is torch.float16:
            globs |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
        if dtype in {torch.float16, torch.bfloat16}:
            globs |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    patterns = [f"({glob.replace('*', '.*')})" for glob in sorted(globs)]
    return re.compile("|".join(patterns)) if patterns else None


def say(config: Any, dtype: torch.dtype) -> None:
    """Write the dtype into a configuration and its parts."""
    config.dtype = dtype
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            getattr(config, part).dtype = dtype


@torch.no_grad()
def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what a save of `model` holds to `dtype`, in place, as if it had been loaded in it.

    Parameters stay the same objects, so that ties and optimizers hold. Computed buffers (rotary
    frequencies) and parts that are kept in float32 are as loading makes them; what is no float of
    16 bits or more stays.
    """
    kept = kept_in_fp32(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and _is_wide_float(tensor):
            in_fp32 = kept is not None and kept.search(name) is not None
            tensor.data = tensor.data.to(torch.float32 if in_fp32 else dtype)
    say(model.config, dtype)


def _is_wide_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1
