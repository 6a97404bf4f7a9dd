"""Heads: which positions they read, and what labels cost, reduced as training code expects.

All losses are scalars in the dtype of the logits (float32 for the next token). Labels of -100 do not
count. Shapes: B batch, T positions, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ckptd.models.layers.outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
)

IGNORED = -100
"""The label of a position that does not count."""


def next_token_loss(
    logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Cross entropy of each position's logits with the next position's label, float32.

    The mean over the labels that count; with `num_items_in_batch` among `options` the sum divided
    by that, as gradient accumulation wants it; with `shift_labels` these, one for each position
    already, in the place of the labels, as sequence parallelism wants it.
    """
    num_items_in_batch = options.get("num_items_in_batch")
    shifted_BT = options.get("shift_labels")
    logits = logits_BTV.float().flatten(0, 1)
    if shifted_BT is None:
        shifted_BT = functional.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]
    next_BT = shifted_BT.to(logits.device)
    if num_items_in_batch is None:
        return functional.cross_entropy(logits, next_BT.flatten(), ignore_index=IGNORED)
    total = functional.cross_entropy(
        logits, next_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def position_loss(logits_BTC: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each position with its own label: masked tokens, classes of tokens."""
    labels = labels_BT.to(logits_BTC.device).flatten()
    return functional.cross_entropy(logits_BTC.flatten(0, -2), labels, ignore_index=IGNORED)


def classification_loss(config: Any, logits_BC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss that `config.problem_type` names, else the one that labels and classes suggest.

    One class is a regression (mean squared error), integer labels (B,) are one class each (cross
    entropy), others (B, C) are independent (binary cross entropy). The configuration stays as it is.

    Raises:
        ValueError: an unknown `config.problem_type`.
    """
    labels = labels.to(logits_BC.device)
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None:
        is_index = not labels.is_floating_point()
        kind = "single_label_classification" if is_index else "multi_label_classification"
    if kind == "regression":
        if config.num_labels == 1:
            return functional.mse_loss(logits_BC.squeeze(), labels.squeeze())
        return functional.mse_loss(logits_BC, labels)
    if kind == "single_label_classification":
        return functional.cross_entropy(logits_BC.view(-1, config.num_labels), labels.view(-1))
    if kind == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits_BC, labels)
    raise ValueError(
        f"config.problem_type is {kind!r}; expected regression, single_label_classification or "
        "multi_label_classification"
    )


def span_loss(
    start_BT: torch.Tensor,
    end_BT: torch.Tensor,
    start_positions: torch.Tensor | None,
    end_positions: torch.Tensor | None,
) -> torch.Tensor | None:
    """Mean of the cross entropies of both ends (B,) or (B, 1); None where an end is not given.

    A position beyond the sequence does not count: the answer was cut off.
    """
    if start_positions is None or end_positions is None:
        return None
    length = start_BT.shape[1]
    losses = []
    for logits_BT, positions in ((start_BT, start_positions), (end_BT, end_positions)):
        wanted_B = positions.squeeze(-1) if positions.dim() > 1 else positions
        wanted_B = wanted_B.to(logits_BT.device).clamp(0, length)
        losses.append(functional.cross_entropy(logits_BT, wanted_B, ignore_index=length))
    return (losses[0] + losses[1]) / 2


def last_positions(hidden_BTD: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """Return the last `keep` positions, all of them for 0, or those that a tensor names.

    A tensor holds indices (n,) for every row, indices (B, n) for each, or is a boolean mask (B, T),
    whose positions come back in one row after the other, (number of True, D).
    """
    if isinstance(keep, int):
        return hidden_BTD[:, -keep:]
    if keep.dim() == 2 and keep.dtype == torch.bool:
        return hidden_BTD[keep]
    if keep.dim() == 2:
        return torch.take_along_dim(hidden_BTD, keep[..., None], dim=1)
    return hidden_BTD[:, keep]


def sequence_output(
    config: Any,
    score: nn.Module,
    body: Any,
    input_ids_BT: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> SequenceClassifierOutputWithPast:
    """Return a decoder's classification, read at each row's last token, and its loss.

    `body` is the output of the model below, `score` maps (.., D) to (.., C).

    Raises:
        ValueError: several rows and no pad token to tell where they end.
    """
    logits_BTC = score(body.last_hidden_state)
    rows = torch.arange(len(logits_BTC), device=logits_BTC.device)
    last_B = last_token(config, input_ids_BT, len(rows), rows.device)
    logits_BC = logits_BTC[rows, last_B]
    return SequenceClassifierOutputWithPast(
        loss=None if labels is None else classification_loss(config, logits_BC, labels),
        logits=logits_BC,
        past_key_values=body.past_key_values,
        hidden_states=body.hidden_states,
        attentions=body.attentions,
    )


def span_output(
    qa_outputs: nn.Module,
    body: Any,
    start_positions: torch.Tensor | None,
    end_positions: torch.Tensor | None,
) -> QuestionAnsweringModelOutput:
    """Return start and end logits (B, T) of a body's output, and the loss where both are given.

    `qa_outputs` maps (.., D) to (.., 2).
    """
    start_BT, end_BT = qa_outputs(body.last_hidden_state).unbind(-1)
    return QuestionAnsweringModelOutput(
        loss=span_loss(start_BT, end_BT, start_positions, end_positions),
        start_logits=start_BT.contiguous(),
        end_logits=end_BT.contiguous(),
        hidden_states=body.hidden_states,
        attentions=body.attentions,
    )


def last_token(
    config: Any, input_ids_BT: torch.Tensor | None, num_rows: int, device: torch.device
) -> torch.Tensor:
    """Index (B,) of each row's last token that is no padding, wherever the padding stands.

    Without a pad token, or from embeddings (where padding cannot be seen), it is the last position.

    Raises:
        ValueError: several rows and no pad token to tell where they end.
    """
    pad: int | None = config.pad_token_id
    if pad is None and num_rows != 1:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
    if pad is None or input_ids_BT is None:
        return torch.full((num_rows,), -1, device=device)
    position_T = torch.arange(input_ids_BT.shape[-1], device=device)
    return ((input_ids_BT.to(device) != pad) * position_T).argmax(-1)
