"""T5: an encoder and a decoder over one vocabulary, with relative positions.

Parameter names are those of the Hub's checkpoints
(`encoder.block.0.layer.0.SelfAttention.q.weight`). Both stacks read the one embedding `shared`; the
head is the same matrix unless `config.tie_word_embeddings` is False (T5 1.1).

The heads that classify are in `t5_heads`.

Shapes: B batch, T decoder positions, S encoder positions, H heads, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.generation.generation import GenerationMixin
from ckptd.models.layers.outputs import (
    BaseModelOutput,
    ModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from ckptd.models.native import heads, keys, record
from ckptd.models.native.t5_stack import T5Config, T5PreTrainedModel, T5Stack

STACK_TIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
}
STRAY_KEYS = [r"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]
"""What the first checkpoints of T5 hold besides."""


class T5PairedModel(T5PreTrainedModel):
    """Encoder, decoder and the embedding that both read."""

    _keys_to_ignore_on_load_unexpected = STRAY_KEYS

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.model_dim = config.d_model
        shared = nn.Embedding(config.vocab_size, config.d_model)
        self.shared: nn.Module = shared
        self.encoder = T5Stack(config, shared, is_decoder=False)
        self.decoder = T5Stack(config, shared, is_decoder=True)

    def get_input_embeddings(self) -> nn.Module:
        """Return the shared embedding."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put `value` into both stacks."""
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def both(
        self,
        encoder_outputs: Any,
        inputs: dict[str, Any],
        decoder_inputs: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Any, Any]:
        """Return the outputs of both halves; the encoder is not run where its output is given.

        `inputs` and `decoder_inputs` are named arguments of `T5Stack.forward`; both halves get
        `options`.
        """
        options = options | {"return_dict": True}
        if encoder_outputs is None:
            encoder_outputs = self.encoder(**inputs, **options)
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        decoded = self.decoder(
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=inputs["attention_mask"],
            **decoder_inputs,
            **options,
        )
        return encoder_outputs, decoded


class T5Model(T5PairedModel):
    """Both halves without head."""

    _tied_weights_keys = STACK_TIES

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: keys.AnyCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the encoder on `input_ids` (B, S) and the decoder on `decoder_input_ids` (B, T).

        Vectors may stand for either; `encoder_outputs`, of an earlier call, for the encoder.

        Returns:
            `Seq2SeqModelOutput`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given, of either half.
        """
        encoded, decoded = self.both(
            encoder_outputs,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "inputs_embeds": inputs_embeds,
            },
            {
                "input_ids": decoder_input_ids,
                "attention_mask": decoder_attention_mask,
                "inputs_embeds": decoder_inputs_embeds,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
            },
            options,
        )
        output = Seq2SeqModelOutput(decoded.last_hidden_state, *recorded(encoded, decoded))
        return record.answer(self.config, return_dict, output)


class T5ForConditionalGeneration(T5PairedModel, GenerationMixin):
    """Both halves with logits over the vocabulary."""

    _tied_weights_keys = STACK_TIES | {"lm_head.weight": "shared.weight"}

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: keys.AnyCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run both halves as `T5Model` does and give logits (B, T, V).

        `labels` (B, T) give the loss, and the decoder's input where it has none.

        Returns:
            `Seq2SeqLMOutput`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given, of either half.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        encoded, decoded = self.both(
            encoder_outputs,
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "inputs_embeds": inputs_embeds,
            },
            {
                "input_ids": decoder_input_ids,
                "attention_mask": decoder_attention_mask,
                "inputs_embeds": decoder_inputs_embeds,
                "past_key_values": past_key_values,
                "use_cache": use_cache,
            },
            options,
        )
        hidden_BTD = decoded.last_hidden_state
        if self.config.scale_decoder_outputs:
            hidden_BTD = hidden_BTD * self.model_dim**-0.5
        logits_BTV = self.lm_head(hidden_BTD)
        loss = None if labels is None else heads.position_loss(logits_BTV, labels)
        output = Seq2SeqLMOutput(loss, logits_BTV, *recorded(encoded, decoded))
        return record.answer(self.config, return_dict, output)


class T5EncoderModel(T5PreTrainedModel):
    """The encoder alone."""

    _tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"decoder"]  # noqa: RUF012

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        shared = nn.Embedding(config.vocab_size, config.d_model)
        self.shared: nn.Module = shared
        self.encoder = T5Stack(config, shared, is_decoder=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put `value` into the encoder."""
        self.shared = self.encoder.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run the encoder on `input_ids` (B, T) or `inputs_embeds` (B, T, D).

        Returns:
            `BaseModelOutput`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given.
        """
        return self.encoder(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **options
        )


def recorded(encoded: Any, decoded: Any) -> tuple[Any, ...]:
    """Return what both halves kept, in the order of the outputs' fields."""
    return (
        decoded.past_key_values,
        decoded.hidden_states,
        decoded.attentions,
        decoded.cross_attentions,
        encoded[0],
        getattr(encoded, "hidden_states", None),
        getattr(encoded, "attentions", None),
    )
