"""The heads that BERT and RoBERTa share; the architecture names their body and their attributes.

The body stands under `base_model_prefix` (`bert`, `roberta`). Every forward takes what the body
takes (see `encoder.EncoderModel.forward`) and `labels`.

Shapes: B batch, T positions, D hidden size, V vocabulary, C classes, N choices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ckptd.models.layers.outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from ckptd.models.native import heads, keys, record
from ckptd.models.native.encoder import EncoderConfig, EncoderModel, EncoderPreTrainedModel


class EncoderHead(EncoderPreTrainedModel):
    """A body of `body_class` under the name that `base_model_prefix` gives."""

    body_class: type[EncoderModel]

    def _add_body(self, config: EncoderConfig, *, with_pooler: bool) -> None:
        setattr(
            self, self.base_model_prefix, self.body_class(config, add_pooling_layer=with_pooler)
        )


class VocabularyHead(EncoderHead):
    """A head with logits over the vocabulary, whose last projection is the token embedding's.

    `decoder_path` says where that projection is.
    """

    decoder_path: str

    def vocabulary_logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the last projection of the head."""
        return self.get_submodule(self.decoder_path)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put `new_embeddings` there; the head's own bias becomes its bias where it has one."""
        path, _, name = self.decoder_path.rpartition(".")
        holder = self.get_submodule(path)
        setattr(holder, name, new_embeddings)
        bias = getattr(new_embeddings, "bias", None)
        if bias is not None:
            holder.bias = bias


class MaskedLM(VocabularyHead):
    """Which token stands at each position."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give logits (B, T, V), and with `labels` (B, T) the mean loss where they are not -100.

        Returns:
            `MaskedLMOutput`, or its fields as a tuple.
        """
        body = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=True,
            **options,
        )
        logits_BTV = self.vocabulary_logits(body.last_hidden_state)
        output = MaskedLMOutput(
            loss=None if labels is None else heads.position_loss(logits_BTV, labels),
            logits=logits_BTV,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class CausalLM(VocabularyHead):
    """Which token comes next; the configuration should say `is_decoder`."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give logits of the last `logits_to_keep` positions (0: all), with `labels` the loss.

        Returns:
            `CausalLMOutputWithCrossAttentions`, or its fields as a tuple.
        """
        body = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=False if labels is not None else use_cache,
            return_dict=True,
            **options,
        )
        kept_BTD = heads.last_positions(body.last_hidden_state, logits_to_keep)
        logits_BTV = self.vocabulary_logits(kept_BTD)
        loss = None
        if labels is not None:
            loss = heads.next_token_loss(logits_BTV, labels, options)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits_BTV,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            cross_attentions=body.cross_attentions,
        )
        return record.answer(self.config, return_dict, output)


class SequenceClassification(EncoderHead):
    """One decision a sequence."""

    def class_logits(self, body: Any) -> torch.Tensor:
        """Map the body's output to (B, C)."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Classify; see `heads.classification_loss` for `labels`.

        Returns:
            `SequenceClassifierOutput`, or its fields as a tuple.
        """
        body = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **options,
        )
        logits_BC = self.class_logits(body)
        loss = None
        if labels is not None:
            loss = heads.classification_loss(self.config, logits_BC, labels)
        output = SequenceClassifierOutput(
            loss=loss,
            logits=logits_BC,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class TokenClassification(EncoderHead):
    """One decision a position."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self._add_body(config, with_pooler=False)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give logits (B, T, C), and with `labels` (B, T) the mean loss where they are not -100.

        Returns:
            `TokenClassifierOutput`, or its fields as a tuple.
        """
        body = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
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


class QuestionAnswering(EncoderHead):
    """Where the answer starts and ends."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self._add_body(config, with_pooler=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give start and end logits (B, T), and with both positions (B,) the loss.

        Returns:
            `QuestionAnsweringModelOutput`, or its fields as a tuple.
        """
        body = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **options,
        )
        output = heads.span_output(self.qa_outputs, body, start_positions, end_positions)
        return record.answer(self.config, return_dict, output)


class MultipleChoice(EncoderHead):
    """One score a choice, read at the pooled first position; choices are scored alone."""

    def _add_head(self, config: EncoderConfig, *, dropout: float) -> None:
        self._add_body(config, with_pooler=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def choose(
        self,
        inputs: dict[str, torch.Tensor | None],
        labels: torch.Tensor | None,
        return_dict: bool | None,
        options: dict[str, Any],
    ) -> Any:
        """Score the choices, N a row; `labels` (B,) name the right one.

        `inputs` are those of the body by name, each (B, N, T) or `inputs_embeds` (B, N, T, D).

        Returns:
            `MultipleChoiceModelOutput` with logits (B, N), or its fields as a tuple.

        Raises:
            ValueError: neither tokens nor vectors are given.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        first = given.get("input_ids", given.get("inputs_embeds"))
        if first is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        flat = {name: value.flatten(0, 1) for name, value in given.items()}
        body = self.base_model(**flat, return_dict=True, **options)
        logits_BN = self.classifier(self.dropout(body.pooler_output)).view(-1, first.shape[1])
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_BN, labels.to(logits_BN.device))
        output = MultipleChoiceModelOutput(
            loss=loss,
            logits=logits_BN,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)
