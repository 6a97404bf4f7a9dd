"""T5 with heads that classify: sequences, tokens, and the span of an answer.

The first and the last read the decoder, which is given the encoder's own tokens, one place later,
where it has no input of its own. Parameter names are those of the Hub's checkpoints
(`transformer.encoder.block.0...`, `classification_head.dense`).

Shapes: B batch, T positions, D hidden size, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.layers.outputs import (
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    TokenClassifierOutput,
)
from ckptd.models.native import heads, record, t5
from ckptd.models.native.t5_stack import T5Config, T5PreTrainedModel


class T5ClassificationHead(nn.Module):
    """Two projections of one position."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        assert config.num_labels is not None
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(config.d_model, config.num_labels)

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Map (B, D) to (B, C)."""
        inner_BD = torch.tanh(self.dense(self.dropout(hidden_BD)))
        logits_BC: torch.Tensor = self.out_proj(self.dropout(inner_BD))
        return logits_BC


class _Initialised(T5PreTrainedModel):
    """Initial weights of the heads, which are no matrices of T5's own."""

    def _init_weights(self, module: nn.Module) -> None:
        factor = self.config.initializer_factor
        narrow = factor * self.config.d_model**-0.5
        if isinstance(module, T5ClassificationHead):
            for layer in (module.dense, module.out_proj):
                nn.init.normal_(layer.weight, std=narrow)
                nn.init.zeros_(layer.bias)
        elif isinstance(module, T5ForQuestionAnswering):
            nn.init.normal_(module.qa_outputs.weight, std=narrow)
            nn.init.zeros_(module.qa_outputs.bias)
        elif isinstance(module, T5ForTokenClassification):
            nn.init.normal_(module.classifier.weight, std=factor)
            nn.init.zeros_(module.classifier.bias)
        else:
            super()._init_weights(module)


class T5ForSequenceClassification(_Initialised):
    """One decision a sequence, read in the decoder at its last end token."""

    _keys_to_ignore_on_load_unexpected = t5.STRAY_KEYS

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.transformer = t5.T5Model(config)
        self.classification_head = T5ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Classify; see `heads.classification_loss` for `labels`.

        Returns:
            `Seq2SeqSequenceClassifierOutput` with logits (B, C), or its fields as a tuple.

        Raises:
            NotImplementedError: vectors instead of tokens: they do not show where the end is.
            ValueError: no input; no end token, or not as many in every row.
        """
        if input_ids is None and inputs_embeds is not None:
            raise NotImplementedError(
                f"Passing input embeddings is currently not supported for {type(self).__name__}"
            )
        if input_ids is None:
            raise ValueError("`input_ids` are needed: they show where each sequence ends")
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(input_ids)
        body = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=False if labels is not None else use_cache,
            return_dict=True,
            **options,
        )
        hidden_BTD = body.last_hidden_state
        rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        last_B = self._last_end(input_ids).to(hidden_BTD.device)
        logits_BC = self.classification_head(hidden_BTD[rows, last_B])
        loss = None
        if labels is not None:
            loss = heads.classification_loss(self.config, logits_BC, labels)
        output = Seq2SeqSequenceClassifierOutput(
            loss=loss,
            logits=logits_BC,
            past_key_values=body.past_key_values,
            decoder_hidden_states=body.decoder_hidden_states,
            decoder_attentions=body.decoder_attentions,
            cross_attentions=body.cross_attentions,
            encoder_last_hidden_state=body.encoder_last_hidden_state,
            encoder_hidden_states=body.encoder_hidden_states,
            encoder_attentions=body.encoder_attentions,
        )
        return record.answer(self.config, return_dict, output)

    def _last_end(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the place (B,) of each row's last end token.

        Raises:
            ValueError: a row has none, or another number of them than the others.
        """
        is_end_BT = input_ids_BT == self.config.eos_token_id
        counts = set(is_end_BT.sum(1).tolist())
        if len(counts) != 1:
            raise ValueError(
                "All examples must have the same number of <eos> tokens; found "
                f"{', '.join(map(str, sorted(counts)))}"
            )
        if counts == {0}:
            raise ValueError("Each example must contain at least one <eos> token.")
        place_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
        last_B: torch.Tensor = (is_end_BT * place_T).argmax(1)
        return last_B


class T5ForTokenClassification(_Initialised):
    """One decision a position, read in the encoder alone."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.transformer = t5.T5EncoderModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give logits (B, T, C), and with `labels` (B, T) the mean loss where they are not -100.

        Returns:
            `TokenClassifierOutput`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given.
        """
        body = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **options,
        )
        logits_BTC = self.classifier(self.dropout(body.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if labels is None else heads.position_loss(logits_BTC, labels),
            logits=logits_BTC,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class T5ForQuestionAnswering(t5.T5PairedModel, _Initialised):
    """Where the answer starts and ends, read in the decoder."""

    _tied_weights_keys = t5.STACK_TIES

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.qa_outputs = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give start and end logits (B, T), and with both positions (B,) the loss.

        Returns:
            `Seq2SeqQuestionAnsweringModelOutput`, or its fields as a tuple.

        Raises:
            ValueError: no input for the decoder, or both or neither of either half.
        """
        if start_positions is not None and end_positions is not None:
            use_cache = False
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise ValueError(
                    "without `decoder_input_ids` and `decoder_inputs_embeds` the decoder reads "
                    "`input_ids`, which are missing too"
                )
            decoder_input_ids = self._shift_right(input_ids)
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
                "use_cache": use_cache,
            },
            options,
        )
        span = heads.span_output(self.qa_outputs, decoded, start_positions, end_positions)
        output = Seq2SeqQuestionAnsweringModelOutput(
            span.loss, span.start_logits, span.end_logits, *t5.recorded(encoded, decoded)
        )
        return record.answer(self.config, return_dict, output)
