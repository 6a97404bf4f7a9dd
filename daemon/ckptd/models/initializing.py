"""Initial weights: which modules get them, and the default rule.

A module whose parameters are all marked `_is_hf_initialized` (they were loaded, or will be tied) is
left alone; where only some are, the marked ones keep their values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ckptd.models.base import PreTrainedModel

_STD_NAMES = ("initializer_range", "init_std", "initializer_factor")
_DEFAULT_STD = 0.02


def standard_deviation(config: Any) -> float:
    """Return the standard deviation of initial weights that a configuration asks for."""
    parts = (config, config.get_text_config())
    found = (getattr(part, name, None) for part in parts for name in _STD_NAMES)
    return next((float(value) for value in found if value is not None), _DEFAULT_STD)


def initialize(model: PreTrainedModel) -> None:
    """Initialise every module that is not yet, depth first, by the model it belongs to."""
    _descend(model, model)


@torch.no_grad()
def default(module: nn.Module, *, std: float) -> None:
    """Initialise one module: normal matrices, zero biases, norms that change nothing."""
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.weight.normal_(0.0, std)
        if bias is not None:
            bias.zero_()
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(0.0, std)
        if module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
    elif "Norm" in type(module).__name__:
        if isinstance(weight, nn.Parameter):
            weight.fill_(1.0)
        if isinstance(bias, nn.Parameter):
            bias.zero_()


def _descend(module: nn.Module, owner: PreTrainedModel) -> None:
    for child in module.children():
        inner = hasattr(child, "_init_weights")
        _descend(child, child if inner else owner)  # type: ignore[arg-type]
    own = list(module.parameters(recurse=False))
    kept = [parameter for parameter in own if _is_done(parameter)]
    if _is_done(module) or (own and len(kept) == len(own)):
        return
    values = [parameter.detach().clone() for parameter in kept]
    owner._init_weights(module)
    for parameter, value in zip(kept, values, strict=True):
        parameter.data.copy_(value)
    module._is_hf_initialized = True  # type: ignore[assignment]


def _is_done(part: Any) -> bool:
    return bool(getattr(part, "_is_hf_initialized", False))
