"""The decoder family's models: the body, and the head that predicts the next token.

An architecture derives `XPreTrainedModel` from `DecoderPreTrainedModel` (configuration, traits), and
its models from that and from a class here or in `decoder_heads`; it adds no forward of its own.

Shapes: B batch, T new positions, D hidden size, V vocabulary, S keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.generation.generation import GenerationMixin
from ckptd.models.layers import masks
from ckptd.models.layers.cache import Cache, DynamicCache
from ckptd.models.layers.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from ckptd.models.layers.rope import RotaryEmbedding
from ckptd.models.native import heads, record
from ckptd.models.native.decoder_layers import (
    Attention,
    DecoderLayer,
    RMSNorm,
    Rotation,
    ScaledEmbedding,
    Traits,
)
from ckptd.models.native.experts import load_balancing_loss


class DecoderPreTrainedModel(PreTrainedModel):
    """What all classes of an architecture share."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_record_outputs: ClassVar[dict[str, Any] | None] = {
        "hidden_states": DecoderLayer,
        "attentions": Attention,
    }
    _supports_sdpa = True
    _supports_flash_attn = True
    _layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    """Named after the architecture, because device maps speak of layers by class name."""

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """What this architecture does in its own way, for this configuration."""
        raise NotImplementedError(f"{cls.__name__} does not say what it does differently")

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, RotaryEmbedding):
            device = next(module.buffers()).device
            module.reset_buffers(None if device.type == "meta" else device)
        else:
            super()._init_weights(module)


class DecoderModel(DecoderPreTrainedModel):
    """Embedding, layers and final norm: tokens to hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        traits = self.traits(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = _embedding(config, traits)
        self.layers = nn.ModuleList(
            self._layer_class(config, traits, idx) for idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, traits.norm)
        self.rotary_emb = RotaryEmbedding(config)
        self._traits = traits
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Hidden states (B, T, D) for tokens (B, T) or embeddings (B, T, D).

        Args:
            input_ids: tokens; or `inputs_embeds`, not both.
            attention_mask: (B, past + T), 0 for padding; or four-dimensional, then used as it is.
            position_ids: (B, T) or (1, T); by default they go on from the cache.
            past_key_values: what earlier calls left; written in place.
            inputs_embeds: given instead of tokens.
            use_cache: make a cache where none is given (default: the configuration's).
            options: `output_attentions`, `output_hidden_states`, `output_router_logits` (mixtures)
                and `return_dict` (False for a tuple); the configuration decides what is not given.

        Raises:
            ValueError: both or neither of tokens and embeddings; a mask that is too short.
        """
        x_BTD = record.embedded(input_ids, inputs_embeds, self.embed_tokens)
        if self._traits.embedding_multiplier != 1.0:
            x_BTD = x_BTD * self._traits.embedding_multiplier
        cache = self._cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)[None]
        layer_masks = self._masks(x_BTD, attention_mask, position_ids, cache, past)
        kept = record.Record(self.config, options)
        rotations = self._rotations(x_BTD, position_ids)
        x_BTD, router_logits = self._run(x_BTD, rotations, layer_masks, cache, kept)
        return kept.answer(self._output(x_BTD, cache, kept, router_logits, options))

    def _output(
        self,
        x_BTD: torch.Tensor,
        cache: Cache | None,
        kept: record.Record,
        router_logits: list[torch.Tensor],
        options: Mapping[str, Any],
    ) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
        values: dict[str, Any] = {
            "last_hidden_state": x_BTD,
            "past_key_values": cache,
            "hidden_states": kept.hidden_states,
            "attentions": kept.attentions,
        }
        if self._traits.mixture is None:
            return BaseModelOutputWithPast(**values)
        wanted = options.get("output_router_logits")
        if wanted is None:
            wanted = self.config.output_router_logits
        logits = tuple(router_logits) if wanted else None
        return MoeModelOutputWithPast(**values, router_logits=logits)

    def _run(
        self,
        x_BTD: torch.Tensor,
        rotations: list[Rotation | None],
        layer_masks: list[torch.Tensor | None],
        cache: Cache | None,
        kept: record.Record,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states (B, T, D) after all layers and the final norm; the routers' logits."""
        router_logits = []
        for layer, rotation, mask in zip(self.layers, rotations, layer_masks, strict=True):
            kept.state(x_BTD)
            x_BTD, weights, logits = layer(
                x_BTD, rotation, mask, past_key_values=cache, want_weights=kept.wants_weights
            )
            kept.weights(weights)
            if logits is not None:
                router_logits.append(logits)
        x_BTD = self.norm(x_BTD)
        kept.state(x_BTD)
        return x_BTD, router_logits

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to write into; none while layers are computed twice."""
        if self.training and self.is_gradient_checkpointing:
            return None
        wanted = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache(config=self.config) if given is None and wanted else given

    def _masks(
        self,
        x_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
        past: int,
    ) -> list[torch.Tensor | None]:
        """Each layer's mask; layers with the same window share one."""
        made: dict[int | None, torch.Tensor | None] = {}
        num_queries = x_BTD.shape[1]
        wants_eager = self._traits.softcap is not None
        implementation = "eager" if wants_eager else self.config._attn_implementation
        windows = [self._traits.window(idx) for idx in range(len(self.layers))]
        for idx, window in enumerate(windows):
            if window in made:
                continue
            if not self._traits.is_causal:
                made[window] = masks.bidirectional_mask(
                    attention_mask,
                    num_queries=num_queries,
                    dtype=x_BTD.dtype,
                    device=x_BTD.device,
                    implementation=implementation,
                    window=window,
                )
                continue
            made[window] = masks.causal_mask(
                attention_mask,
                num_queries=num_queries,
                num_keys=num_queries if cache is None else cache.num_keys(num_queries, idx),
                past=past,
                window=window,
                dtype=x_BTD.dtype,
                device=x_BTD.device,
                implementation=implementation,
                position_ids=position_ids if cache is None else None,
            )
        return [made[window] for window in windows]

    def _rotations(self, x_BTD: torch.Tensor, position_ids: torch.Tensor) -> list[Rotation | None]:
        """Each layer's cosine and sine; None for layers without positions."""
        like = x_BTD.float() if self._traits.rotates_in_float32 else x_BTD
        made = {kind: self.rotary_emb(like, position_ids, kind) for kind in self.rotary_emb.kinds}
        if None in made:
            still = self._traits.without_positions
            return [None if idx in still else made[None] for idx in range(len(self.layers))]
        return [made[kind] for kind in self.config.layer_types[: len(self.layers)]]


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The body (`model`) and a linear head (`lm_head`) that predicts the next token."""

    _tied_weights_keys: ClassVar[dict[str, str] | None] = {
        "lm_head.weight": "model.embed_tokens.weight"
    }
    _body_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self._body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._traits = self.traits(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **options: Any,
    ) -> Any:
        """Logits (B, T, V), and with `labels` (B, T) the loss of the next token.

        Arguments are those of the body, and:

        Args:
            labels: -100 counts for nothing; an option `num_items_in_batch` divides the loss's sum.
            logits_to_keep: only the last so many positions (0: all), or these positions: indices
                (n,) of every row, indices (B, n) of each, or a boolean mask (B, T), which flattens.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**options, "return_dict": True},
        )
        logits = self._logits(heads.last_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = heads.next_token_loss(logits, labels, options)
        output = self._output(loss, logits, outputs, attention_mask)
        return record.answer(self.config, options.get("return_dict"), output)

    def _logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(x_BTD)
        if self._traits.logits_divisor != 1.0:
            logits = logits / self._traits.logits_divisor
        if (bound := self._traits.logits_softcap) is not None:
            logits = torch.tanh(logits / bound) * bound
        return logits

    def _output(
        self,
        loss: torch.Tensor | None,
        logits: torch.Tensor,
        outputs: Any,
        attention_mask: torch.Tensor | None,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        recorded = {name: outputs[name] for name in list(outputs)[1:]}
        if self._traits.mixture is None:
            return CausalLMOutputWithPast(loss=loss, logits=logits, **recorded)
        aux_loss = None
        if outputs.router_logits:
            if attention_mask is not None:
                # The mask covers cached positions too; the routers saw the new ones.
                is_plain = attention_mask.dim() == 2
                num_new = outputs.last_hidden_state.shape[1]
                attention_mask = attention_mask[:, -num_new:] if is_plain else None
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                num_chosen=self._traits.mixture.num_chosen,
                attention_mask_BT=attention_mask,
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **recorded)


def _embedding(config: Any, traits: Traits) -> nn.Embedding:
    rows, size, padding_idx = config.vocab_size, config.hidden_size, config.pad_token_id
    if traits.embedding_scale is None:
        return nn.Embedding(rows, size, padding_idx)
    return ScaledEmbedding(rows, size, padding_idx, traits.embedding_scale)
