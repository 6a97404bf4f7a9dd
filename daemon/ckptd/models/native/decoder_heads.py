"""The decoder family's heads beside the next token: classes of sequences and tokens, answer spans.

Mixed in before the architecture's own base (`class LlamaForTokenClassification(
DecoderForTokenClassification, LlamaPreTrainedModel)`). The body stands under `base_model_prefix`.

Shapes: B batch, T positions, D hidden size, C classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ckptd.models.layers.outputs import TokenClassifierOutput
from ckptd.models.native import heads, record
from ckptd.models.native.decoder import DecoderModel, DecoderPreTrainedModel

_DEFAULT_DROPOUT = 0.1


class _WithBody(DecoderPreTrainedModel):
    """The body under its name, and how it is called."""

    _body_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self._body_class(config))
        self.num_labels = config.num_labels
        self._make_head(config)
        self.post_init()

    def _make_head(self, config: Any) -> None:
        raise NotImplementedError

    def _body(self, input_ids: torch.Tensor | None, **kwargs: Any) -> Any:
        body = getattr(self, self.base_model_prefix)
        return body(input_ids, **{**kwargs, "return_dict": True})


class DecoderForSequenceClassification(_WithBody):
    """`score` maps the last token's hidden state to classes."""

    def _make_head(self, config: Any) -> None:
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, C) and, with `labels`, the loss by `config.problem_type`.

        The last token is the last that is not `config.pad_token_id`, wherever padding stands.

        Raises:
            ValueError: several rows and no pad token.
        """
        outputs = self._body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        output = heads.sequence_output(self.config, self.score, outputs, input_ids, labels)
        return record.answer(self.config, return_dict, output)


class DecoderForTokenClassification(_WithBody):
    """`score` maps every hidden state to classes."""

    def _make_head(self, config: Any) -> None:
        names = ("classifier_dropout", "hidden_dropout")
        given = (getattr(config, name, None) for name in names)
        rate = next((rate for rate in given if rate is not None), _DEFAULT_DROPOUT)
        self.dropout = nn.Dropout(rate)
        self.score = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits (B, T, C) and, with `labels` (B, T), their cross entropy."""
        outputs = self._body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BTC = self.score(self.dropout(outputs.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if labels is None else heads.position_loss(logits_BTC.float(), labels),
            logits=logits_BTC,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return record.answer(self.config, return_dict, output)


class DecoderForQuestionAnswering(_WithBody):
    """`qa_outputs` scores every position as the start and as the end of the answer."""

    def _make_head(self, config: Any) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Two logits (B, T), and the mean loss of both ends where these are given (B,)."""
        outputs = self._body(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        output = heads.span_output(self.qa_outputs, outputs, start_positions, end_positions)
        return record.answer(self.config, return_dict, output)
