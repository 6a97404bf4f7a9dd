"""Initial weights: which modules get them, and the default rule.

A tensor that is marked `_is_hf_initialized` (it was loaded, or will be tied) keeps its value whatever
a rule does to it, also one that reaches into the modules below its own, in place or through `.data`.
A module that has only such tensors is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

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
    with _kept(model):
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
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if _is_done(module) or (own and all(_is_done(tensor) for tensor in own)):
        return
    owner._init_weights(module)
    module._is_hf_initialized = True  # type: ignore[assignment]


def _is_done(part: Any) -> bool:
    return bool(getattr(part, "_is_hf_initialized", False))


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Let nothing write into the marked tensors of `model` meanwhile."""
    tensors = [*model.parameters(), *model.buffers()]
    places = {_place(tensor) for tensor in tensors if _is_done(tensor)} - {0}
    with _Kept(places) if places else contextlib.nullcontext():
        yield


class _Kept(TorchFunctionMode):
    """What would write into memory at one of these places does nothing."""

    def __init__(self, places: set[int]) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
            target = args[0] if args else given.get("tensor")
            if isinstance(target, torch.Tensor) and _place(target) in self._places:
                return target
        return func(*args, **given)


_WRITES = frozenset({
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__",
})  # fmt: skip
"""Functions that write into their first argument without a name that says so."""


def _place(tensor: torch.Tensor) -> int:
    """Return where a tensor's memory begins; 0 where it has none."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
