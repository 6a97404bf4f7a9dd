"""Keys and values of past positions, so that each step computes only its new ones.

A cache belongs to one batch of sequences and is written in place by the model's attention layers.
Layers with a sliding window keep only the positions that a later query may still see; `num_keys`
says how many keys a layer will return, from which `masks.causal_mask` builds a mask that fits.

Shapes: B batch, H key-value heads, T new positions, S kept and new positions, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class CacheLayer:
    """One layer's keys and values (B, H, S, D), all positions or the last `window - 1`.

    `window` is the number of keys a query sees including its own, None for all. `length` counts
    every position ever written, whether kept or not.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.length = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    @property
    def num_kept(self) -> int:
        """Past positions that are still held."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def update(
        self, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, S, D) of the kept positions and the new ones, which are stored."""
        self.length += key_BHTD.shape[-2]
        if self.keys is None or self.values is None:
            key_BHSD, value_BHSD = key_BHTD, value_BHTD
        else:
            key_BHSD = torch.cat([self.keys, key_BHTD], dim=-2)
            value_BHSD = torch.cat([self.values, value_BHTD], dim=-2)
        self.keys, self.values = key_BHSD, value_BHSD
        if self.window is not None and key_BHSD.shape[-2] >= self.window:
            start = key_BHSD.shape[-2] - (self.window - 1)
            self.keys, self.values = key_BHSD[:, :, start:], value_BHSD[:, :, start:]
            if start > self.window:
                # After a long prompt a view would keep most of it alive until the next step.
                self.keys, self.values = self.keys.clone(), self.values.clone()
        return key_BHSD, value_BHSD

    def crop(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ValueError: positions that would be needed again have slid out of the window.
        """
        surplus = self.length - length
        if surplus <= 0 or self.keys is None or self.values is None:
            return
        if self.num_kept < self.length:
            raise ValueError(
                f"cannot crop to {length} positions: of the {self.length} seen, this layer keeps"
                f" only the last {self.num_kept} (sliding window {self.window})"
            )
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.length = length

    def select(self, index_B: torch.Tensor) -> None:
        """Row i of the batch becomes the former row `index_B[i]` (B may change)."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, index_B.to(self.keys.device))
            self.values = self.values.index_select(0, index_B.to(self.values.device))


class Cache:
    """The layers' caches, made as the layers first write."""

    def __init__(self, windows: list[int | None] | None = None) -> None:
        self._windows = windows or []
        self.layers: list[CacheLayer] = [CacheLayer(window) for window in self._windows]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        return iter([(layer.keys, layer.values) for layer in self.layers])

    def update(
        self, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What layer `layer_idx` attends to: its kept positions and these new ones (B, H, S, D)."""
        while len(self.layers) <= layer_idx:
            self.layers.append(CacheLayer())
        return self.layers[layer_idx].update(key_BHTD, value_BHTD)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that the layer has seen, kept or not; 0 before its first write."""
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def num_keys(self, num_new: int, layer_idx: int = 0) -> int:
        """Keys that `update` will return to the layer when it brings `num_new` positions."""
        kept = self.layers[layer_idx].num_kept if layer_idx < len(self.layers) else 0
        return kept + num_new

    def reorder(self, index_B: torch.Tensor) -> None:
        """Row i of every layer becomes the former row `index_B[i]`: beams, rows that ended."""
        for layer in self.layers:
            layer.select(index_B)

    reorder_cache = reorder
    batch_select_indices = reorder

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch becomes `repeats` neighbouring rows."""
        for layer in self.layers:
            if layer.keys is not None:
                rows = torch.arange(layer.keys.shape[0], device=layer.keys.device)
                layer.select(rows.repeat_interleave(repeats))

    def crop(self, length: int) -> None:
        """Keep the first `length` positions, or, when negative, drop the last `-length`.

        Raises:
            ValueError: a sliding layer no longer holds what it would need.
        """
        for layer in self.layers:
            layer.crop(length if length >= 0 else layer.length + length)

    def reset(self) -> None:
        """Forget everything; the windows stay."""
        self.layers = [CacheLayer(window) for window in self._windows]


class DynamicCache(Cache):
    """A cache that grows with the sequence.

    With a config, layers whose `layer_types` entry is `sliding_attention` (or all, when the config
    has a `sliding_window` and no `layer_types`) keep only their window.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(None if config is None else sliding_windows(config.get_text_config()))


class EncoderDecoderCache:
    """The decoder's own cache and that of the encoder's keys and values.

    `is_updated[layer]` tells whether the layer's cross-attention has been written, which happens
    once: the encoder's output does not change while the decoder goes on.
    """

    def __init__(
        self,
        self_attention_cache: Cache | None = None,
        cross_attention_cache: Cache | None = None,
    ) -> None:
        self.self_attention_cache = (
            Cache() if self_attention_cache is None else self_attention_cache
        )
        self.cross_attention_cache = (
            Cache() if cross_attention_cache is None else cross_attention_cache
        )
        self.is_updated: dict[int, bool] = {
            idx: layer.length > 0 for idx, layer in enumerate(self.cross_attention_cache.layers)
        }

    def __len__(self) -> int:
        return len(self.self_attention_cache)

    def update(
        self, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`, of the decoder's own cache."""
        return self.self_attention_cache.update(key_BHTD, value_BHTD, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Decoder positions seen."""
        return self.self_attention_cache.get_seq_length(layer_idx)

    def num_keys(self, num_new: int, layer_idx: int = 0) -> int:
        """As `Cache.num_keys`, of the decoder's own cache."""
        return self.self_attention_cache.num_keys(num_new, layer_idx)

    def reorder(self, index_B: torch.Tensor) -> None:
        """As `Cache.reorder`, of both caches."""
        self.self_attention_cache.reorder(index_B)
        self.cross_attention_cache.reorder(index_B)

    reorder_cache = reorder
    batch_select_indices = reorder

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As `Cache.batch_repeat_interleave`, of both caches."""
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def crop(self, length: int) -> None:
        """As `Cache.crop`, of the decoder's own cache."""
        self.self_attention_cache.crop(length)

    def reset(self) -> None:
        """Forget everything, the encoder's side too."""
        self.self_attention_cache.reset()
        self.cross_attention_cache.reset()
        self.is_updated.clear()


def sliding_windows(config: Any) -> list[int | None]:
    """The window of each layer of a decoder's config, None where a layer sees everything."""
    window: int | None = getattr(config, "sliding_window", None)
    layer_types: list[str] | None = getattr(config, "layer_types", None)
    num_layers: int = getattr(config, "num_hidden_layers", 0)
    if layer_types is None:
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in layer_types[:num_layers]]
