"""GPT-NeoX (Pythia): rotary positions on a part of each head, attention and MLP side by side.

Parameter names are those of the Hub's checkpoints: the fused projection `query_key_value` holds
query, key and value of one head after the other, and the head is `embed_out`.

Shapes: B batch, T new positions, S all positions so far, D hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.rope_config import RopeKeys
from ckptd.models.generation.generation import GenerationMixin
from ckptd.models.layers import rope
from ckptd.models.layers.cache import Cache
from ckptd.models.layers.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    TokenClassifierOutput,
)
from ckptd.models.native import heads, keys, record
from ckptd.models.native.gpt_neox_layers import GPTNeoXAttention, GPTNeoXLayer


class GPTNeoXConfig(PreTrainedConfig):
    """Sizes and switches of a GPT-NeoX; the defaults are those of `gpt-neox-20b`."""

    model_type = "gpt_neox"
    rope_keys = RopeKeys(theta="rotary_emb_base", partial="rotary_pct", default_partial=0.25)

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float = 0.1
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = True
    is_decoder: bool = False

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class GPTNeoXPreTrainedModel(PreTrainedModel):
    """What all GPT-NeoX classes share."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    supports_gradient_checkpointing = True
    _can_record_outputs = {  # noqa: RUF012 - ClassVar in the base
        "hidden_states": GPTNeoXLayer,
        "attentions": GPTNeoXAttention,
    }
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["GPTNeoXLayer"]  # noqa: RUF012 - ClassVar in the base
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012 - ClassVar in the base
        r"attention.bias",
        r"attention.masked_bias",
    ]
    _input_embed_layer = "embed_in"

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as usual; the rotary frequencies are computed."""
        if isinstance(module, rope.RotaryEmbedding):
            device = next(module.buffers()).device
            module.reset_buffers(None if device.type == "meta" else device)
        else:
            super()._init_weights(module)


class GPTNeoXModel(GPTNeoXPreTrainedModel):
    """The body: token embedding, the layers, the last norm."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            GPTNeoXLayer(config, idx) for idx in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = rope.RotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body on `input_ids` (B, T) or `inputs_embeds` (B, T, D).

        `attention_mask` (B, S) covers the cached positions, too. Positions count on from the
        cache, padding included, unless given.

        Returns:
            `BaseModelOutputWithPast`, or its fields as a tuple.

        Raises:
            ValueError: both or neither input given.
        """
        hidden_BTD = record.embedded(input_ids, inputs_embeds, self.embed_in)
        cache = keys.begin_own(past_key_values, use_cache, self)
        mask = keys.causal_mask(self.config, hidden_BTD, cache, attention_mask, position_ids)
        if position_ids is None:
            past = keys.past_length(cache)
            stop = past + hidden_BTD.shape[1]
            position_ids = torch.arange(past, stop, device=hidden_BTD.device)[None]
        turn = self.rotary_emb(hidden_BTD, position_ids)
        kept = record.Record(self.config, options)
        hidden_BTD = self.emb_dropout(hidden_BTD)
        hidden_BTD = kept.run(self.layers, hidden_BTD, mask, turn, past_key_values=cache)
        hidden_BTD = self.final_layer_norm(hidden_BTD)
        kept.state(hidden_BTD)
        return kept.answer(
            BaseModelOutputWithPast(
                last_hidden_state=hidden_BTD,
                past_key_values=cache,
                hidden_states=kept.hidden_states,
                attentions=kept.attentions,
            )
        )


class GPTNeoXForCausalLM(GPTNeoXPreTrainedModel, GenerationMixin):
    """The body with logits over the vocabulary."""

    _tied_weights_keys = {"embed_out.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.embed_out: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head."""
        return self.embed_out

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put `new_embeddings` where the head is."""
        self.embed_out = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body as `GPTNeoXModel` does and give logits of the last `logits_to_keep` positions.

        0 keeps all of them; a tensor names positions. `labels` (B, T) give the loss of the next
        token; `num_items_in_batch` divides its sum.

        Returns:
            `CausalLMOutputWithPast`, or its fields as a tuple.
        """
        body = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **options,
        )
        logits_BTV = self.embed_out(heads.last_positions(body.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = heads.next_token_loss(logits_BTV, labels, options)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class GPTNeoXForSequenceClassification(GPTNeoXPreTrainedModel):
    """The body with one decision a sequence, read at its last token."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.gpt_neox = GPTNeoXModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
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
        body = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **options,
        )
        output = heads.sequence_output(self.config, self.score, body, input_ids, labels)
        return record.answer(self.config, return_dict, output)


class GPTNeoXForTokenClassification(GPTNeoXPreTrainedModel):
    """The body with one decision a position."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.num_labels = config.num_labels
        self.gpt_neox = GPTNeoXModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
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

        `token_type_ids` are accepted, as tokenizers give them, and not read.

        Returns:
            `TokenClassifierOutput`, or its fields as a tuple.
        """
        body = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
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


class GPTNeoXForQuestionAnswering(GPTNeoXPreTrainedModel):
    """The body with the start and the end of an answer."""

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.gpt_neox = GPTNeoXModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
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

        `token_type_ids` are accepted, as tokenizers give them, and not read.

        Returns:
            `QuestionAnsweringModelOutput`, or its fields as a tuple.
        """
        body = self.gpt_neox(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **options,
        )
        output = heads.span_output(self.qa_outputs, body, start_positions, end_positions)
        return record.answer(self.config, return_dict, output)
