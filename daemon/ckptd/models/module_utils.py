"""`ModuleUtilsMixin`: what can be asked of any module that has parameters and a `config`.

Counts, dtype and device, and the two attention masks that the documented page describes. Names and
defaults are that page's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class ModuleUtilsMixin(_Module):
    """A few questions and masks for `torch.nn.Module`, as a mixin."""

    @property
    def device(self) -> torch.device:
        """The device of the first parameter (of the first buffer where there is none)."""
        first = next(self._weights(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter (or buffer); float32 where there is none."""
        floating = (weight.dtype for weight in self._weights() if weight.is_floating_point())
        return next(floating, torch.float32)

    def invert_attention_mask(self, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        """Return an additive mask: 0 where attention goes, the lowest value of the dtype elsewhere.

        Args:
            encoder_attention_mask: `(batch, keys)` or `(batch, queries, keys)`, ones to attend to.

        Returns:
            `(batch, 1, 1, keys)` or `(batch, 1, queries, keys)`, in the model's dtype.

        Raises:
            ValueError: another number of dimensions.
        """
        mask = encoder_attention_mask
        if mask.dim() not in (2, 3):
            raise ValueError(
                f"an attention mask has 2 or 3 dimensions, this one has {tuple(mask.shape)}"
            )
        wide = mask[:, None, :, :] if mask.dim() == 3 else mask[:, None, None, :]
        return (1.0 - wide.to(self.dtype)) * torch.finfo(self.dtype).min

    def get_extended_attention_mask(
        self,
        attention_mask: torch.Tensor,
        input_shape: tuple[int, ...],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return an additive mask that also hides the future where the model is a decoder.

        Args:
            attention_mask: `(batch, keys)` or `(batch, queries, keys)`, ones to attend to.
            input_shape: the shape of the input, `(batch, queries)`.
            device: deprecated and ignored; the mask's own device counts.
            dtype: of the result; the model's by default.

        Returns:
            `(batch, 1, 1 or queries, keys)` in `dtype`.

        Raises:
            ValueError: the mask fits no input of this shape.
        """
        if device is not None:
            warnings.warn(
                "the `device` argument is deprecated: the mask stays on its device",
                FutureWarning,
                stacklevel=2,
            )
        kind = self.dtype if dtype is None else dtype
        if attention_mask.dim() == 3:
            extended = attention_mask[:, None, :, :]
        elif attention_mask.dim() == 2:
            extended = attention_mask[:, None, None, :]
            if getattr(self.config, "is_decoder", False):
                extended = _causal(attention_mask, input_shape)[:, None] * extended
        else:
            raise ValueError(
                f"Wrong shape for input_ids (shape {input_shape}) or attention_mask "
                f"(shape {tuple(attention_mask.shape)})"
            )
        return (1.0 - extended.to(kind)) * torch.finfo(kind).min

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of elements of all parameters, shared ones counted once.

        Args:
            only_trainable: count those that require a gradient.
            exclude_embeddings: leave out the weight of every `nn.Embedding`. A head tied to an
                embedding is the same parameter, named by the embedding, and so left out; an untied
                head counts.
        """
        left_out = set()
        if exclude_embeddings:
            left_out = {
                f"{name}.weight"
                for name, module in self.named_modules()
                if isinstance(module, nn.Embedding)
            }
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if name not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of all parameters and, by default, all buffers.

        Shared tensors count once, buffers that are not saved count too. A model of quantized files
        counts as it is held: plain.
        """
        total = sum(p.nelement() * p.element_size() for p in self.parameters())
        if return_buffers:
            total += sum(b.nelement() * b.element_size() for b in self.buffers())
        return total

    def get_parameter_or_buffer(self, target: str) -> Any:
        """Return the parameter, buffer or extra state called `target`.

        Raises:
            AttributeError: there is none, or `target` is a module.
        """
        for find in (self.get_parameter, self.get_buffer):
            try:
                return find(target)
            except AttributeError:
                continue
        path, _, leaf = target.rpartition(".")
        if leaf == "_extra_state":
            module = self.get_submodule(path)
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                return module.get_extra_state()
        raise AttributeError(f"`{target}` is neither a parameter, a buffer nor an extra state")

    def _weights(self) -> Iterator[torch.Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    if TYPE_CHECKING:

        @property
        def config(self) -> Any:
            """The configuration, which the class this is mixed into has."""
            return cast("Any", None)


def _causal(mask_BK: torch.Tensor, input_shape: tuple[int, ...]) -> torch.Tensor:
    """Return ones where a query may look: `(batch, queries, keys)`, a cached past in front."""
    batch, queries = input_shape
    place = torch.arange(queries, device=mask_BK.device)
    seen = (place[None, None, :] <= place[None, :, None]).to(mask_BK.dtype)
    seen = seen.expand(batch, queries, queries)
    past = mask_BK.shape[1] - queries
    if past > 0:
        seen = torch.cat([seen.new_ones(batch, queries, past), seen], dim=-1)
    return seen
