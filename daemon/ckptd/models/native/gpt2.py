"""GPT-2: learned positions, norms before each block, projections stored transposed.

Parameter names are those of the Hub's checkpoints (`transformer.h.0.attn.c_attn.weight`), whose
projections have shape (inputs, outputs). With `config.add_cross_attention` the layers also attend to
an encoder's output.

Shapes: B batch, T new positions, S all positions so far, H heads, D hidden size, K head size,
V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.generation.generation import GenerationMixin
from ckptd.models.layers.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    TokenClassifierOutput,
)
from ckptd.models.native import heads, keys, record
from ckptd.models.native.gpt2_layers import Conv1D, GPT2Attention, GPT2Block


class GPT2Config(PreTrainedConfig):
    """Sizes and switches of a GPT-2; the defaults are those of `gpt2` (124M)."""

    model_type = "gpt2"
    attribute_map = {  # noqa: RUF012 - ClassVar in the base
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    scale_attn_weights: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


class GPT2PreTrainedModel(PreTrainedModel):
    """What all GPT-2 classes share."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _can_record_outputs = {  # noqa: RUF012 - ClassVar in the base
        "hidden_states": GPT2Block,
        "attentions": GPT2Attention,
        "cross_attentions": GPT2Attention,
    }
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["GPT2Block"]  # noqa: RUF012 - ClassVar in the base
    _keys_to_ignore_on_load_unexpected = ["attn.bias", "crossattention.bias"]  # noqa: RUF012
    _input_embed_layer = "wte"

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as usual; projections into the residual stream are scaled down by depth."""
        if isinstance(module, Conv1D):
            std = self.config.initializer_range * module.init_scale
            nn.init.normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class GPT2Model(GPT2PreTrainedModel):
    """The body: token and position embeddings, the layers, the last norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, idx) for idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body on `input_ids` (B, T) or `inputs_embeds` (B, T, D).

        `attention_mask` (B, S) covers the cached positions, too. Token types are embedded by the
        token embedding. Positions count on from the cache, padding included, unless given.

        Returns:
            `BaseModelOutputWithPastAndCrossAttentions`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given; an encoder's output for a model without
                cross-attention.
        """
        crossing = encoder_hidden_states is not None
        if crossing and not self.config.add_cross_attention:
            raise ValueError("encoder_hidden_states need config.add_cross_attention=True")
        hidden_BTD = record.embedded(input_ids, inputs_embeds, self.wte)
        cache = keys.begin(past_key_values, use_cache, self, crossing=crossing)
        mask = keys.causal_mask(self.config, hidden_BTD, cache, attention_mask, position_ids)
        hidden_BTD = self._placed(hidden_BTD, keys.past_length(cache), position_ids, token_type_ids)
        kept = record.Record(self.config, options, crossing=crossing)
        hidden_BTD = kept.run(
            self.h,
            hidden_BTD,
            mask,
            past_key_values=cache,
            encoder_BSD=encoder_hidden_states,
            encoder_mask=keys.padding_mask(self.config, hidden_BTD, encoder_attention_mask),
        )
        hidden_BTD = self.ln_f(hidden_BTD)
        kept.state(hidden_BTD)
        return kept.answer(
            BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=hidden_BTD,
                past_key_values=cache,
                hidden_states=kept.hidden_states,
                attentions=kept.attentions,
                cross_attentions=kept.cross_attentions,
            )
        )

    def _placed(
        self,
        hidden_BTD: torch.Tensor,
        past: int,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the input with positions and token types added."""
        if position_ids is None:
            stop = past + hidden_BTD.shape[1]
            position_ids = torch.arange(past, stop, device=hidden_BTD.device)[None]
        hidden_BTD = hidden_BTD + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_BTD = hidden_BTD + self.wte(token_type_ids)
        dropped: torch.Tensor = self.drop(hidden_BTD)
        return dropped


class GPT2LMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    """The body with logits over the vocabulary, from the token embedding itself."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body as `GPT2Model` does and give logits of the last `logits_to_keep` positions.

        0 keeps all of them; a tensor names positions. `labels` (B, T) give the loss of the next
        token; `num_items_in_batch` divides its sum.

        Returns:
            `CausalLMOutputWithCrossAttentions`, or its fields as a tuple.
        """
        body = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            return_dict=True,
            **options,
        )
        logits_BTV = self.lm_head(heads.last_positions(body.last_hidden_state, logits_to_keep))
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


class GPT2ForSequenceClassification(GPT2PreTrainedModel):
    """The body with one decision a sequence, read at its last token."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body and classify; see `heads.classification_loss` for `labels`.

        Returns:
            `SequenceClassifierOutputWithPast`, or its fields as a tuple.

        Raises:
            ValueError: several rows and no pad token in the configuration.
        """
        body = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **options,
        )
        output = heads.sequence_output(self.config, self.score, body, input_ids, labels)
        return record.answer(self.config, return_dict, output)


class GPT2ForTokenClassification(GPT2PreTrainedModel):
    """The body with one decision a position."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.classifier = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: keys.AnyCache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Give logits (B, T, C), and with `labels` (B, T) the mean loss where they are not -100.

        Returns:
            `TokenClassifierOutput`, or its fields as a tuple.
        """
        body = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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


class GPT2ForQuestionAnswering(GPT2PreTrainedModel):
    """The body with the start and the end of an answer."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
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
        body = self.transformer(
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
