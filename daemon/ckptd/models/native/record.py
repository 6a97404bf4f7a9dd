"""What a forward keeps beside its result, and in which form it answers.

Every native forward takes `output_attentions`, `output_hidden_states` and `return_dict` by name;
where they are not given (or None) the configuration decides.

Shapes: B batch, T query positions, S keys, H heads, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckptd.models.layers.outputs import ModelOutput


class Record:
    """The hidden states and attentions of one forward, kept only where they are wanted.

    `options` are the named arguments of the forward, of which three are read. `crossing` says
    whether the layers also attend to an encoder; without it `cross_attentions` stays None.
    """

    def __init__(self, config: Any, options: Mapping[str, Any], *, crossing: bool = False) -> None:
        self._config = config
        self._options = options
        self.wants_weights = bool(_chosen(config, options, "output_attentions"))
        wants_states = _chosen(config, options, "output_hidden_states")
        self._states: list[torch.Tensor] | None = [] if wants_states else None
        self._weights: list[torch.Tensor] | None = [] if self.wants_weights else None
        self._crossing: list[torch.Tensor] | None = None
        if self.wants_weights and crossing:
            self._crossing = []

    def run(
        self, layers: Iterable[nn.Module], hidden_BTD: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Run the layers one after the other and return what the last one wrote (B, T, D).

        Each is called with the hidden states, then with what is given here and `want_weights`, and
        answers with hidden states, weights (B, H, T, T) or None, and those over the encoder. What
        each layer reads is kept; what the last one wrote is not: see `state`.
        """
        for layer in layers:
            self.state(hidden_BTD)
            hidden_BTD, own, crossing = layer(
                hidden_BTD, *args, want_weights=self.wants_weights, **kwargs
            )
            self.weights(own, crossing)
        return hidden_BTD

    def state(self, hidden_BTD: torch.Tensor) -> None:
        """Keep a hidden state."""
        if self._states is not None:
            self._states.append(hidden_BTD)

    def weights(self, own: torch.Tensor | None, crossing: torch.Tensor | None = None) -> None:
        """Keep one layer's attention weights: its own (B, H, T, T), over the encoder (B, H, T, S)."""
        if self._weights is not None and own is not None:
            self._weights.append(own)
        if self._crossing is not None and crossing is not None:
            self._crossing.append(crossing)

    @property
    def hidden_states(self) -> tuple[torch.Tensor, ...] | None:
        """The kept states, None where they were not wanted."""
        return None if self._states is None else tuple(self._states)

    @property
    def attentions(self) -> tuple[torch.Tensor, ...] | None:
        """One tensor (B, H, T, T) a layer, None where they were not wanted."""
        return None if self._weights is None else tuple(self._weights)

    @property
    def cross_attentions(self) -> tuple[torch.Tensor, ...] | None:
        """One tensor (B, H, T, S) a layer; None where they were not wanted, or without encoder."""
        return None if self._crossing is None else tuple(self._crossing)

    def answer(self, output: ModelOutput) -> Any:
        """Return `output`, or its fields as a tuple where one is wanted."""
        return answer(self._config, self._options.get("return_dict"), output)


def answer(config: Any, return_dict: bool | None, output: ModelOutput) -> Any:
    """Return `output`, or its fields as a tuple where the call or the configuration wants one."""
    wanted = config.use_return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


def embedded(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, embedding: nn.Module
) -> torch.Tensor:
    """Return the input's vectors (B, T, D): those given, or those of `input_ids` (B, T).

    Raises:
        ValueError: both or neither are given.
    """
    check_one(input_ids, inputs_embeds)
    if inputs_embeds is not None:
        return inputs_embeds
    found: torch.Tensor = embedding(input_ids)
    return found


def check_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Check that exactly one input is given.

    Raises:
        ValueError: both or neither are.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")


def _chosen(config: Any, options: Mapping[str, Any], name: str) -> Any:
    given = options.get(name)
    return getattr(config, name) if given is None else given
