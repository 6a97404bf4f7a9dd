"""Resizing the vocabulary of a module in memory: embedding, head, biases and configuration.

The rows that are kept are bit-identical; new ones follow the documented distributions, by the same
functions as the pipeline's stage `resize` (`plan.grown`); without mean resizing a class of a user's
own draws them by its `_init_weights`. Differences from the original that are
meant: no float32 copy of the matrix and no covariance are made, a buffer added to the logits grows
with them, and `out_features` is always right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ckptd.models import initializing
from ckptd.plan import grown

if TYPE_CHECKING:
    from ckptd.models.base import PreTrainedModel

_LOGITS_BIAS = "final_logits_bias"
_OWN_RULES = "ckptd.models."
"""The `_init_weights` of this package draw each row of a vocabulary from N(0, std) alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawing:
    """Where new rows come from: around the mean of the old ones, else from N(0, std).

    `rule` is the `_init_weights` of a user's class, which then takes the place of the latter.
    """

    mean: bool
    std: float
    rule: Callable[[nn.Module], None] | None

    @classmethod
    def of(cls, model: PreTrainedModel, *, mean: bool) -> _Drawing:
        """Return how new rows of `model` are drawn."""
        std = initializing.standard_deviation(model.config)
        is_own = model._init_weights.__module__.startswith(_OWN_RULES)
        return cls(mean=mean, std=std, rule=None if mean or is_own else model._init_weights)

    def fresh(self, made: type[nn.Module], size: tuple[int, int], **like: Any) -> Any:
        """Return a module of this size whose values the rule has drawn; None without a rule.

        It has all rows, not only the new ones, for a rule may look at the shape.
        """
        if self.rule is None or like["device"].type == "meta":
            return None
        module = made(*size, **like)
        self.rule(module)
        return module


def resize(
    model: PreTrainedModel,
    new_num_tokens: int | None,
    pad_to_multiple_of: int | None,
    *,
    mean_resizing: bool,
) -> nn.Embedding:
    """Give the text vocabulary of `model` as many rows as asked; return the input embedding.

    Raises:
        ValueError: `pad_to_multiple_of` is not a positive integer.
        TypeError: the embedding is no `nn.Embedding`, or the head no `nn.Linear`.
        RuntimeError: a negative size.
    """
    embedding = model.get_input_embeddings()
    if new_num_tokens is None and pad_to_multiple_of is None:
        return embedding  # type: ignore[no-any-return]
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            f"the input embedding is a {type(embedding).__name__}; only an nn.Embedding can be "
            "resized"
        )
    num_rows = wanted_rows(len(embedding.weight), new_num_tokens, pad_to_multiple_of)
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    drawing = _Drawing.of(model, mean=mean_resizing)
    if num_rows != len(embedding.weight):
        _resize_embedding(embedding, num_rows, drawing)
    if head is not None and not tied:
        _resize_head(head, num_rows, drawing)
        model.set_output_embeddings(head)  # some classes keep the head's bias in a second place
    elif head is not None:
        _follow(head, embedding)
    _resize_logits_bias(model, num_rows)
    model.config.get_text_config().vocab_size = num_rows
    if hasattr(model, "vocab_size"):
        cast("Any", model).vocab_size = num_rows
    model.tie_weights()
    return embedding


def wanted_rows(rows: int, new_num_tokens: int | None, multiple: int | None) -> int:
    """Return the rows that a vocabulary of `rows` rows shall have.

    Raises:
        ValueError: `multiple` is not a positive integer.
        RuntimeError: a negative size.
    """
    wanted = rows if new_num_tokens is None else new_num_tokens
    if multiple is not None:
        if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
            raise ValueError(f"pad_to_multiple_of must be a positive integer, not {multiple!r}")
        wanted = math.ceil(wanted / multiple) * multiple
    if wanted < 0:
        raise RuntimeError(f"a vocabulary cannot have {wanted} rows")
    return wanted


def grown_rows(weight: torch.Tensor, rows: int, *, mean: bool, std: float) -> torch.Tensor:
    """Return the matrix with `rows` rows: the old ones as they are, new ones by the distribution."""
    out = zero_padded(weight, rows)
    old = weight.detach()
    num_new = rows - len(old)
    if num_new <= 0 or out.device.type == "meta":
        return out
    seed = _seed()
    if mean and len(old):
        new = grown.around_mean(
            grown.steps_of(old),
            num_rows=len(old),
            first=0,
            num_new=num_new,
            seed=seed,
            device=old.device,
        )
    else:
        new = grown.normal(first=0, num_new=num_new, width=old.shape[1], seed=seed).mul_(std)
    out[len(old) :] = new
    return out


def grown_bias(bias: torch.Tensor, rows: int, *, mean: bool) -> torch.Tensor:
    """Return the vector with `rows` elements: new ones around the old ones' mean, or zero."""
    out = zero_padded(bias, rows)
    num_new = rows - len(bias)
    if mean and num_new > 0 and len(bias) and out.device.type != "meta":
        out[len(bias) :] = grown.around_bias_mean(
            bias.detach(), first=0, num_new=num_new, seed=_seed()
        )
    return out


def zero_padded(old: torch.Tensor, rows: int) -> torch.Tensor:
    """Return `rows` rows in new memory: the first of `old`, then zeros.

    Raises:
        RuntimeError: `old` is quantized.
    """
    if not old.is_floating_point():
        raise RuntimeError("Only Tensors of floating point can be resized; dequantize first")
    kept = min(rows, len(old))
    out = old.new_zeros((rows, *old.shape[1:]))
    out[:kept] = old.detach()[:kept]
    return out


def replace(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Put new data behind a parameter; the object stays, so that whatever shares it follows."""
    parameter.data = value
    parameter.grad = None


def _resize_embedding(embedding: nn.Embedding, rows: int, drawing: _Drawing) -> None:
    old = embedding.weight
    fresh = None
    if rows > len(old):
        size = (rows, old.shape[1])
        fresh = drawing.fresh(nn.Embedding, size, device=old.device, dtype=old.dtype)
    if fresh is None:
        weight = grown_rows(old, rows, mean=drawing.mean, std=drawing.std)
    else:
        weight = _with_old_rows(fresh.weight, old)
    padding = embedding.padding_idx
    if padding is not None and not drawing.mean and len(old) <= padding < rows:
        weight[padding] = 0
    replace(embedding.weight, weight)
    embedding.num_embeddings = rows
    if padding is not None and padding > rows - 1:
        embedding.padding_idx = None


def _resize_head(head: nn.Module, rows: int, drawing: _Drawing) -> None:
    if isinstance(head, nn.Embedding):
        _resize_embedding(head, rows, drawing)
        return
    if not isinstance(head, nn.Linear):
        raise TypeError(f"the head is a {type(head).__name__}; only an nn.Linear can be resized")
    weight, bias, fresh = head.weight, head.bias, None
    if rows > len(weight):
        like = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        fresh = drawing.fresh(nn.Linear, (weight.shape[1], rows), **like)
    if fresh is not None:
        replace(weight, _with_old_rows(fresh.weight, weight))
        if bias is not None:
            replace(bias, _with_old_rows(fresh.bias, bias))
    elif len(weight) != rows:
        replace(weight, grown_rows(weight, rows, mean=drawing.mean, std=drawing.std))
    head.out_features = rows
    if bias is not None and len(bias) != rows:
        replace(bias, grown_bias(bias, rows, mean=drawing.mean))


def _with_old_rows(fresh: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return the memory of `fresh`, whose first rows are now those of `old`."""
    data = fresh.detach()
    data[: len(old)] = old.detach()
    return data


def _follow(head: nn.Module, embedding: nn.Embedding) -> None:
    """Let a tied head be the embedding's parameter again, its bias padded with zeros."""
    head.weight = embedding.weight
    if isinstance(head, nn.Linear):
        head.out_features = len(embedding.weight)
    bias = getattr(head, "bias", None)
    if isinstance(bias, nn.Parameter) and len(bias) != len(embedding.weight):
        replace(bias, zero_padded(bias, len(embedding.weight)))


def _resize_logits_bias(model: nn.Module, rows: int) -> None:
    """Resize the buffer `(1, rows)` that some encoder-decoder models add to their logits."""
    bias = getattr(model, _LOGITS_BIAS, None)
    if isinstance(bias, torch.Tensor) and bias.shape[-1] != rows:
        model.register_buffer(_LOGITS_BIAS, zero_padded(bias.T, rows).T.contiguous())


def _seed() -> int:
    """A seed drawn from torch's global generator, so that `torch.manual_seed` decides."""
    return int(torch.randint(0, 2**62, ()).item())
