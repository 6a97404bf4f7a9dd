"""The activation functions a config may name, as modules without parameters.

`make(name)` gives a fresh module. The names are those of the Hub's config.json files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x) (CLIP's approximation of GELU)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape and floating dtype; the same comes back."""
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    """max(x, 0) squared (Primer, arXiv:2109.08668)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape and floating dtype; the same comes back."""
        return torch.relu(x).square()


class ClippedGELU(nn.Module):
    """GELU whose result stays within [-10, 10] (for quantized export)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape and floating dtype; the same comes back."""
        return nn.functional.gelu(x).clamp(-10, 10)


def _tanh_gelu() -> nn.Module:
    return nn.GELU(approximate="tanh")


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_10": ClippedGELU,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": nn.GELU,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "linear": nn.Identity,
    "mish": nn.Mish,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}
"""By config name. The tanh forms of GELU differ only by rounding and share one kernel."""


def make(name: str) -> nn.Module:
    """A fresh activation module.

    Raises:
        ValueError: a name that is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
