"""Gradient checkpointing: layers that drop their activations and compute them again.

`GradientCheckpointingLayer` is the base of every repeated layer; `enable` and `disable` switch a
model's layers. Memory falls by what the layers keep between forward and backward; gradients are the
same, for the forward is repeated with the same random state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import checkpoint

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class GradientCheckpointingLayer(nn.Module):
    """A layer whose call is checkpointed while it trains and its flag is set.

    The first positional argument is the hidden states; further tensors may be positional or by
    name: either way gradients flow into them, with reentrance too. A cache makes no sense while activations are computed twice, so it is switched off.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, through the checkpoint function where that is wanted."""
        if not (self.gradient_checkpointing and self.training):
            return super().__call__(*args, **kwargs)
        for name in ("past_key_values", "past_key_value"):
            if kwargs.get(name) is not None:
                kwargs[name] = None
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        run = self._gradient_checkpointing_func
        assert run is not None
        names = [name for name, value in kwargs.items() if _wants_gradient(value)]
        tensors = [kwargs.pop(name) for name in names]
        whole = functools.partial(super().__call__, **kwargs)
        return run(_Renamed(whole, names), *args, *tensors)


class _Renamed:
    """A call that takes its last arguments by position and passes them on by name.

    Reentrant checkpoints detach only what they are given by position.
    """

    def __init__(self, call: Callable[..., Any], names: list[str]) -> None:
        self._call = call
        self._names = names

    def __call__(self, *args: Any) -> Any:
        count = len(args) - len(self._names)
        return self._call(*args[:count], **dict(zip(self._names, args[count:], strict=True)))


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def enable(model: nn.Module, kwargs: Mapping[str, Any] | None) -> None:
    """Switch every layer of `model` that can be checkpointed on.

    Args:
        model: the model; its own modules are searched.
        kwargs: arguments of `torch.utils.checkpoint.checkpoint`; None means without reentrance,
            which also works where no input needs a gradient.

    Raises:
        ValueError: no layer of the model can be checkpointed.
    """
    run = functools.partial(checkpoint.checkpoint, **(kwargs or {"use_reentrant": False}))
    layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer that can be checkpointed: derive its repeated "
            "layers from GradientCheckpointingLayer"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = run  # type: ignore[assignment]
        layer.gradient_checkpointing = True  # type: ignore[assignment]


def disable(model: nn.Module) -> None:
    """Switch every layer of `model` off."""
    for layer in model.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False  # type: ignore[assignment]


def is_enabled(model: nn.Module) -> bool:
    """Return whether any layer of `model` is checkpointed."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def require_input_gradients(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
    """Let gradients flow into the output of an embedding that is itself frozen (forward hook)."""
    output.requires_grad_(True)


class TrainingMixin(_Module):
    """Switches for training: checkpointed layers, and gradients into frozen embeddings."""

    supports_gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer is checkpointed."""
        return is_enabled(self)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Compute activations again in backward instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; the default is
                `use_reentrant=False`.

        Raises:
            ValueError: the model does not support it.
        """
        if not self.supports_gradient_checkpointing:
            raise ValueError(f"{type(self).__name__} does not support gradient checkpointing.")
        enable(self, gradient_checkpointing_kwargs)
        if getattr(self, "_hf_peft_config_loaded", False):
            self.enable_input_require_grads()

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        disable(self)
        if getattr(self, "_hf_peft_config_loaded", False):
            self.disable_input_require_grads()

    def enable_input_require_grads(self) -> None:
        """Let gradients flow into the input embeddings while the weights themselves are frozen."""
        self.disable_input_require_grads()
        embeddings: dict[int, nn.Module] = {}
        for module in self.modules():
            if hasattr(module, "get_input_embeddings"):
                with contextlib.suppress(NotImplementedError):
                    found = module.get_input_embeddings()  # type: ignore[operator]
                    embeddings[id(found)] = found
        self._require_grads_hooks = [
            embedding.register_forward_hook(require_input_gradients)
            for embedding in embeddings.values()
        ]
        self._require_grads_hook = next(iter(self._require_grads_hooks), None)

    def disable_input_require_grads(self) -> None:
        """Remove what `enable_input_require_grads` added; nothing happens where it was not called."""
        for hook in getattr(self, "_require_grads_hooks", ()):
            hook.remove()
        self._require_grads_hooks = []
        self._require_grads_hook = None
