"""Rotary position embedding: frequencies of every published variant, and their application.

A pair of channels (i, i + R/2) of a query or key is turned by the angle position * inv_freq[i]; R is
the rotated part of the head (all of it unless `partial_rotary_factor` says less). The variants
change the frequencies, and some scale cosine and sine:

- default: theta ** (-2i / R) (RoFormer, arXiv:2104.09864);
- linear: all divided by `factor` (arXiv:2306.15595); proportional: of the first share of the
  channels only, the others do not turn;
- dynamic: theta grows with the length beyond `max_position_embeddings` (NTK-aware scaling);
- yarn: low frequencies divided, high ones kept, a ramp between (arXiv:2309.00071);
- longrope: a factor a channel, one list for short and one for long inputs (arXiv:2402.13753);
- llama3: as yarn, with bounds given as wavelengths (Llama 3.1).

Settings come from `config.rope_parameters` in the form of transformers 5, flat or one dict for each
kind of layer. Angles are computed in float32, whatever the model's dtype.

Shapes: B batch, H heads, K key-value heads, T positions, D head size, R rotated channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})
"""Types whose frequencies depend on how long the input is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the frequencies are computed from."""

    parameters: dict[str, Any]
    head_dim: int
    max_positions: int
    seq_len: int | None
    device: torch.device | str | None

    @property
    def num_channels(self) -> int:
        return int(self.head_dim * (self.parameters.get("partial_rotary_factor") or 1.0))

    @property
    def theta(self) -> float:
        return float(self.parameters["rope_theta"])

    @property
    def original_max_positions(self) -> int:
        return int(self.parameters["original_max_position_embeddings"])

    def powers(self, theta: float, num_channels: int, divisor: int) -> torch.Tensor:
        steps = torch.arange(0, num_channels, 2, dtype=torch.int64, device=self.device)
        return torch.pow(theta, steps.to(torch.float32) / divisor)

    def plain(self) -> torch.Tensor:
        return 1.0 / self.powers(self.theta, self.num_channels, self.num_channels)


def inverse_frequencies(
    config: Any,
    device: torch.device | str | None = None,
    layer_type: str | None = None,
    seq_len: int | None = None,
) -> tuple[torch.Tensor, float]:
    """The frequencies (R / 2,) in float32 and the factor for cosine and sine.

    `layer_type` picks the dict where `rope_parameters` holds one for each kind of layer; `seq_len`
    is the length of the input so far, for the types that depend on it (None: a short one).

    Raises:
        ValueError: an unknown `rope_type`.
    """
    parameters = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _TYPES:
        raise ValueError(f"unknown rope_type {rope_type!r}; known are {', '.join(_TYPES)}")
    head_dim = getattr(config, "head_dim", None)
    settings = _Settings(
        parameters=parameters,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        max_positions=config.max_position_embeddings,
        seq_len=seq_len,
        device=device,
    )
    return _TYPES[rope_type](settings)


class RotaryEmbedding(nn.Module):
    """Cosine and sine for given positions.

    Buffers `inv_freq` and `original_inv_freq` (R / 2,), float32 and not saved; with settings for
    each kind of layer, one pair a kind, prefixed by its name. `original_inv_freq` stays what it was
    at the start, `inv_freq` follows the length where the type demands it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        nested = any(kind in config.rope_parameters for kind in kinds)
        self.kinds: list[str | None] = [*kinds] if nested else [None]
        self.attention_scaling: dict[str | None, float] = {}
        self._cached_length: dict[str | None, int] = {}
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | str | None = None) -> None:
        """Compute the buffers afresh, on `device` (for modules made on the meta device)."""
        for kind in self.kinds:
            if self._parameters_of(kind) is None:
                continue
            inv_freq, self.attention_scaling[kind] = inverse_frequencies(self.config, device, kind)
            self._cached_length[kind] = self.config.max_position_embeddings
            self.register_buffer(_name(kind, "inv_freq"), inv_freq, persistent=False)
            original = inv_freq.clone()
            self.register_buffer(_name(kind, "original_inv_freq"), original, persistent=False)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (B, T, R) in the dtype and on the device of `x`, for positions (B, T)."""
        kind = layer_type if layer_type in self.kinds else None
        parameters = self._parameters_of(kind)
        if parameters is not None and parameters.get("rope_type") in LENGTH_DEPENDENT:
            self._follow_length(kind, parameters, int(position_ids.max()) + 1)
        inv_freq: torch.Tensor = getattr(self, _name(kind, "inv_freq"))
        angles = position_ids[..., None].float() * inv_freq.to(x.device, torch.float32)
        angles_BTR = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling[kind]
        return (angles_BTR.cos() * scale).to(x.dtype), (angles_BTR.sin() * scale).to(x.dtype)

    def _parameters_of(self, kind: str | None) -> dict[str, Any] | None:
        parameters: dict[str, Any] = self.config.rope_parameters
        return parameters if kind is None else parameters.get(kind)

    def _follow_length(self, kind: str | None, parameters: dict[str, Any], seq_len: int) -> None:
        """Longrope: short or long list. Dynamic: grow with the longest input, back on a short one."""
        original: torch.Tensor = getattr(self, _name(kind, "original_inv_freq"))
        name = _name(kind, "inv_freq")
        if parameters["rope_type"] == "longrope":
            is_long = seq_len > parameters["original_max_position_embeddings"]
            length = seq_len if is_long else 0
            if is_long != (self._cached_length[kind] == -1):
                inv_freq, _ = inverse_frequencies(self.config, original.device, kind, length)
                self.register_buffer(name, inv_freq, persistent=False)
                self._cached_length[kind] = -1 if is_long else 0
            return
        limit = self.config.max_position_embeddings
        if seq_len > self._cached_length[kind]:
            inv_freq, scale = inverse_frequencies(self.config, original.device, kind, seq_len)
            self.attention_scaling[kind] = scale
            self.register_buffer(name, inv_freq, persistent=False)
            self._cached_length[kind] = seq_len
        elif seq_len < limit < self._cached_length[kind]:
            self.register_buffer(name, original.clone(), persistent=False)
            self._cached_length[kind] = limit


def apply_rotary(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    cos_BTR: torch.Tensor,
    sin_BTR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with their first R channels turned, the others as they were.

    Computed in the wider dtype of the two sides; the result has that of queries and keys.
    """
    cos_B1TR, sin_B1TR = cos_BTR.unsqueeze(1), sin_BTR.unsqueeze(1)
    return _turned(query_BHTD, cos_B1TR, sin_B1TR), _turned(key_BKTD, cos_B1TR, sin_B1TR)


def _turned(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    num_channels = cos.shape[-1]
    part, rest = x_BHTD[..., :num_channels], x_BHTD[..., num_channels:]
    first, second = part.chunk(2, dim=-1)
    turned = (part * cos + torch.cat((-second, first), dim=-1) * sin).to(part.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _name(kind: str | None, buffer: str) -> str:
    return buffer if kind is None else f"{kind}_{buffer}"


def _default(settings: _Settings) -> tuple[torch.Tensor, float]:
    return settings.plain(), 1.0


def _linear(settings: _Settings) -> tuple[torch.Tensor, float]:
    return settings.plain() / settings.parameters["factor"], 1.0


def _proportional(settings: _Settings) -> tuple[torch.Tensor, float]:
    share = settings.parameters.get("partial_rotary_factor", 1.0)
    num_turned = int(share * settings.head_dim // 2)
    turned = 1.0 / settings.powers(settings.theta, 2 * num_turned, settings.head_dim)
    still = turned.new_zeros(settings.head_dim // 2 - num_turned)
    return torch.cat((turned, still)) / settings.parameters.get("factor", 1.0), 1.0


def _dynamic(settings: _Settings) -> tuple[torch.Tensor, float]:
    length = max(settings.seq_len or 0, settings.max_positions)
    factor, channels = settings.parameters["factor"], settings.num_channels
    growth = factor * length / settings.max_positions - (factor - 1)
    theta = settings.theta * growth ** (channels / (channels - 2))
    return 1.0 / settings.powers(theta, channels, channels), 1.0


def _yarn(settings: _Settings) -> tuple[torch.Tensor, float]:
    parameters, channels = settings.parameters, settings.num_channels
    factor = parameters["factor"] or settings.max_positions / settings.original_max_positions

    def channel_of(num_rotations: float) -> float:
        """The channel that turns so often within the original context."""
        wavelengths = settings.original_max_positions / (num_rotations * 2 * math.pi)
        return channels * math.log(wavelengths) / (2 * math.log(settings.theta))

    low = channel_of(parameters.get("beta_fast") or 32)
    high = channel_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    if low == high:
        high += 0.001
    position = torch.arange(channels // 2, dtype=torch.float32, device=settings.device)
    kept = 1 - ((position - low) / (high - low)).clamp(0, 1)
    powers = settings.powers(settings.theta, channels, channels)
    inv_freq = (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept
    return inv_freq, _yarn_scale(parameters, factor)


def _yarn_scale(parameters: dict[str, Any], factor: float) -> float:
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return scale(numerator) / scale(denominator)
    return scale(1.0)


def _longrope(settings: _Settings) -> tuple[torch.Tensor, float]:
    parameters, original = settings.parameters, settings.original_max_positions
    scale = parameters.get("attention_factor")
    if scale is None:
        factor = parameters.get("factor") or settings.max_positions / original
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    is_long = settings.seq_len is not None and settings.seq_len > original
    factors = parameters["long_factor" if is_long else "short_factor"]
    factors_R = torch.tensor(factors, dtype=torch.float32, device=settings.device)
    powers = settings.powers(settings.theta, settings.num_channels, settings.num_channels)
    return 1.0 / (factors_R * powers), float(scale)


def _llama3(settings: _Settings) -> tuple[torch.Tensor, float]:
    parameters, original = settings.parameters, settings.original_max_positions
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    inv_freq = settings.plain()
    wavelength = 2 * math.pi / inv_freq
    # 0: long waves, divided by the factor; 1: short waves, kept; between them a ramp.
    kept = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq, 1.0


_TYPES: dict[str, Callable[[_Settings], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
