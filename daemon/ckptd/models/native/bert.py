"""BERT: the encoder with learned positions and token types, and its heads.

Parameter names are those of the Hub's checkpoints (`bert.encoder.layer.0.attention.self.query`,
`cls.predictions.transform.dense`).

Shapes: B batch, T positions, D hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ckptd.models.generation.generation import GenerationMixin
from ckptd.models.layers import activations
from ckptd.models.layers.outputs import ModelOutput, NextSentencePredictorOutput, Tensors
from ckptd.models.native import encoder, encoder_heads, heads, record

_TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class BertConfig(encoder.EncoderConfig):
    """Sizes and switches of a BERT; the defaults are those of `bert-base-uncased`."""

    model_type = "bert"


class BertEmbeddings(encoder.Embeddings):
    """Tokens, token types and positions, summed and normed."""


class BertLayer(encoder.Layer):
    """One layer."""


class BertPredictionHeadTransform(nn.Module):
    """Projection, activation and norm before the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activations.make(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to the same."""
        out_BTD: torch.Tensor = self.LayerNorm(self.transform_act_fn(self.dense(hidden_BTD)))
        return out_BTD


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary; `bias` is the decoder's own bias under its older name."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        logits_BTV: torch.Tensor = self.decoder(self.transform(hidden_BTD))
        return logits_BTV


class BertHeads(nn.Module):
    """The head over the vocabulary and, where wanted, the one over pairs of sentences."""

    def __init__(self, config: BertConfig, *, seq_relationship: bool = False) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertPreTrainedModel(encoder.EncoderPreTrainedModel):
    """What all BERT classes share."""

    config_class = BertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["BertEmbeddings", "BertLayer"]  # noqa: RUF012 - ClassVar in the base


class BertModel(encoder.EncoderModel, BertPreTrainedModel):
    """The body."""

    embeddings_class = BertEmbeddings
    layer_class = BertLayer


class BertForMaskedLM(encoder_heads.MaskedLM, BertPreTrainedModel):
    """Which token stands at each position."""

    body_class = BertModel
    decoder_path = "cls.predictions.decoder"
    _tied_weights_keys = _TIES

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_body(config, with_pooler=False)
        self.cls = BertHeads(config)
        self.post_init()

    def vocabulary_logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        logits_BTV: torch.Tensor = self.cls.predictions(hidden_BTD)
        return logits_BTV


class BertLMHeadModel(encoder_heads.CausalLM, BertPreTrainedModel, GenerationMixin):
    """Which token comes next."""

    body_class = BertModel
    decoder_path = "cls.predictions.decoder"
    _tied_weights_keys = _TIES

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_body(config, with_pooler=False)
        self.cls = BertHeads(config)
        self.post_init()

    def vocabulary_logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        logits_BTV: torch.Tensor = self.cls.predictions(hidden_BTD)
        return logits_BTV


@dataclass(eq=False)
class BertForPreTrainingOutput(ModelOutput):
    """`prediction_logits` (B, T, V) and `seq_relationship_logits` (B, 2)."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


class BertForPreTraining(encoder_heads.VocabularyHead, BertPreTrainedModel):
    """Both heads of BERT's training: masked tokens, and whether the second sentence follows."""

    body_class = BertModel
    decoder_path = "cls.predictions.decoder"
    _tied_weights_keys = _TIES

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_body(config, with_pooler=True)
        self.cls = BertHeads(config, seq_relationship=True)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give both logits; the loss, the sum of both, needs both labels.

        Returns:
            `BertForPreTrainingOutput`, or its fields as a tuple.
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
        prediction_BTV = self.cls.predictions(body.last_hidden_state)
        relationship_B2 = self.cls.seq_relationship(body.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = heads.position_loss(prediction_BTV, labels)
            loss = loss + functional.cross_entropy(relationship_B2, next_sentence_label.view(-1))
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=prediction_BTV,
            seq_relationship_logits=relationship_B2,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class BertSentenceHead(nn.Module):
    """Whether the second sentence follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Map (B, D) to (B, 2)."""
        logits_B2: torch.Tensor = self.seq_relationship(pooled_BD)
        return logits_B2


class BertForNextSentencePrediction(encoder_heads.EncoderHead, BertPreTrainedModel):
    """Whether the second sentence follows the first, read at the pooled first position."""

    body_class = BertModel

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_body(config, with_pooler=True)
        self.cls = BertSentenceHead(config)
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
        """Give logits (B, 2), and with `labels` (B,), 0 where it follows, the mean loss.

        Returns:
            `NextSentencePredictorOutput`, or its fields as a tuple.
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
        logits_B2 = self.cls(body.pooler_output)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits_B2, labels.view(-1).to(logits_B2.device))
        output = NextSentencePredictorOutput(
            loss=loss,
            logits=logits_B2,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class BertForMultipleChoice(encoder_heads.MultipleChoice, BertPreTrainedModel):
    """Which of several continuations is right."""

    body_class = BertModel

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add_head(config, dropout=config.head_dropout)

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
        """Score the choices (B, N, T); see `encoder_heads.MultipleChoice.choose`."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return self.choose(inputs, labels, return_dict, options)


class BertForSequenceClassification(encoder_heads.SequenceClassification, BertPreTrainedModel):
    """One decision a sequence, read at the pooled first position."""

    body_class = BertModel

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self._add_body(config, with_pooler=True)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def class_logits(self, body: Any) -> torch.Tensor:
        """Map the pooled first position to (B, C)."""
        logits_BC: torch.Tensor = self.classifier(self.dropout(body.pooler_output))
        return logits_BC


class BertForTokenClassification(encoder_heads.TokenClassification, BertPreTrainedModel):
    """One decision a position."""

    body_class = BertModel


class BertForQuestionAnswering(encoder_heads.QuestionAnswering, BertPreTrainedModel):
    """Where the answer starts and ends."""

    body_class = BertModel
