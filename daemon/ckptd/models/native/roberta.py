"""RoBERTa: BERT's encoder whose positions skip padding and start behind the pad token's row.

Parameter names are those of the Hub's checkpoints (`roberta.encoder.layer.0.attention.self.query`,
`lm_head.dense`).

Shapes: B batch, T positions, D hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ckptd.models.generation.generation import GenerationMixin
from ckptd.models.native import encoder, encoder_heads

_TIES = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}


class RobertaConfig(encoder.EncoderConfig):
    """Sizes and switches of a RoBERTa."""

    model_type = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2


class RobertaEmbeddings(encoder.Embeddings):
    """Tokens, token types and positions; row `pad_token_id` of the positions is padding's."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config, config.pad_token_id)
        # Checkpoints hold the positions last.
        positions = self.position_embeddings
        del self.position_embeddings
        self.position_embeddings = positions

    def positions(
        self, input_ids: torch.Tensor | None, hidden_BTD: torch.Tensor, past: int
    ) -> torch.Tensor:
        """Return positions (B or 1, T): tokens count up behind the padding row, padding stays on it.

        Vectors cannot show padding: all of them count.

        Raises:
            ValueError: more positions than the model has.
        """
        pad = self.position_embeddings.padding_idx or 0
        start = pad + 1 + past
        stop = start + hidden_BTD.shape[1]
        if input_ids is None:
            self.check_count(stop)
            return torch.arange(start, stop, device=hidden_BTD.device)[None]
        is_token_BT = (input_ids != pad).long()
        position_BT = (is_token_BT.cumsum(1) + past) * is_token_BT + pad
        if stop > self.max_positions:
            # Padding takes no positions: only now is it worth to look how many are taken.
            self.check_count(int(position_BT.max()) + 1)
        return position_BT


class RobertaLayer(encoder.Layer):
    """One layer."""


class RobertaLMHead(nn.Module):
    """Logits over the vocabulary; `bias` is the decoder's own bias under its older name."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        logits_BTV: torch.Tensor = self.decoder(
            self.layer_norm(functional.gelu(self.dense(hidden_BTD)))
        )
        return logits_BTV


class RobertaClassificationHead(nn.Module):
    """Two projections of the first position."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        assert config.num_labels is not None
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, C)."""
        first_BD = torch.tanh(self.dense(self.dropout(hidden_BTD[:, 0])))
        logits_BC: torch.Tensor = self.out_proj(self.dropout(first_BD))
        return logits_BC


class RobertaPreTrainedModel(encoder.EncoderPreTrainedModel):
    """What all RoBERTa classes share."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    _no_split_modules = ["RobertaEmbeddings", "RobertaLayer"]  # noqa: RUF012


class RobertaModel(encoder.EncoderModel, RobertaPreTrainedModel):
    """The body."""

    embeddings_class = RobertaEmbeddings
    layer_class = RobertaLayer


class RobertaForMaskedLM(encoder_heads.MaskedLM, RobertaPreTrainedModel):
    """Which token stands at each position."""

    body_class = RobertaModel
    decoder_path = "lm_head.decoder"
    _tied_weights_keys = _TIES

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self._add_body(config, with_pooler=False)
        self.lm_head = RobertaLMHead(config)
        self.post_init()

    def vocabulary_logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        logits_BTV: torch.Tensor = self.lm_head(hidden_BTD)
        return logits_BTV


class RobertaForCausalLM(encoder_heads.CausalLM, RobertaPreTrainedModel, GenerationMixin):
    """Which token comes next."""

    body_class = RobertaModel
    decoder_path = "lm_head.decoder"
    _tied_weights_keys = _TIES

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self._add_body(config, with_pooler=False)
        self.lm_head = RobertaLMHead(config)
        self.post_init()

    def vocabulary_logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, V)."""
        logits_BTV: torch.Tensor = self.lm_head(hidden_BTD)
        return logits_BTV


class RobertaForSequenceClassification(
    encoder_heads.SequenceClassification, RobertaPreTrainedModel
):
    """One decision a sequence, read at the first position."""

    body_class = RobertaModel

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._add_body(config, with_pooler=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()

    def class_logits(self, body: Any) -> torch.Tensor:
        """Map the first position to (B, C)."""
        logits_BC: torch.Tensor = self.classifier(body.last_hidden_state)
        return logits_BC


class RobertaForTokenClassification(encoder_heads.TokenClassification, RobertaPreTrainedModel):
    """One decision a position."""

    body_class = RobertaModel


class RobertaForQuestionAnswering(encoder_heads.QuestionAnswering, RobertaPreTrainedModel):
    """Where the answer starts and ends."""

    body_class = RobertaModel


class RobertaForMultipleChoice(encoder_heads.MultipleChoice, RobertaPreTrainedModel):
    """Which of several continuations is right."""

    body_class = RobertaModel

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self._add_head(config, dropout=config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
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
