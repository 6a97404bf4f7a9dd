"""Models as people write them for transformers; ours are made from this text by changing the import.

A decoder with a tied head, ties by pattern, buffers saved and not; a whole of two parts; a model with
a regression head. Nothing here knows which library it runs on.
"""

# ruff: noqa: RUF012 - class attributes as users write them

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class NoteConfig(PreTrainedConfig):
    model_type = "note"
    attribute_map = {"width": "hidden_size"}

    def __init__(
        self,
        vocab_size=13,
        hidden_size=8,
        depth=2,
        initializer_range=0.5,
        tie_word_embeddings=True,
        head_bias=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.depth = depth
        self.initializer_range = initializer_range
        self.head_bias = head_bias
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class NoteLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden, mask):
        seen = torch.ones(hidden.shape[1], hidden.shape[1], dtype=hidden.dtype).tril()
        seen = seen[None] * mask[:, None, :].to(hidden.dtype)
        past = seen @ self.mix(hidden) / seen.sum(-1, keepdim=True).clamp(min=1)
        return self.norm(hidden + torch.tanh(past))


class NotePreTrainedModel(PreTrainedModel):
    config_class = NoteConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["NoteLayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, self.config.initializer_range)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.25)
        elif isinstance(module, nn.Embedding):
            nn.init.constant_(module.weight, 2 * self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, NoteModel):
            # A buffer that is computed and not saved: transformers wants it computed again here.
            module.table.copy_(torch.arange(5.0))


class NoteModel(NotePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(NoteLayer(config) for _ in range(config.depth))
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))
        self.register_buffer("table", torch.arange(5.0), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = attention_mask
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.long)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(layer.__call__, hidden, mask)
            else:
                hidden = layer(hidden, mask)
        return hidden * self.scale[0]


class NoteForCausalLM(NotePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config, gain=1.0):
        super().__init__(config)
        self.gain = gain
        self.model = NoteModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs
    ):
        logits = self.lm_head(self.model(input_ids, attention_mask, inputs_embeds)) * self.gain
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits)


class NoteForRegression(NotePreTrainedModel):
    _keys_to_ignore_on_save = ["score.bias"]
    _keys_to_ignore_on_load_missing = ["score.bias"]

    def __init__(self, config):
        super().__init__(config)
        self.model = NoteModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        return self.score(self.model(input_ids, attention_mask)[:, -1])


class FolioConfig(PreTrainedConfig):
    model_type = "folio"
    sub_configs = {"text_config": NoteConfig, "vision_config": NoteConfig}

    def __init__(self, text_config=None, vision_config=None, tie_word_embeddings=True, **kwargs):
        parts = {"text_config": text_config, "vision_config": vision_config}
        for name, part in parts.items():
            setattr(
                self, name, part if isinstance(part, NoteConfig) else NoteConfig(**(part or {}))
            )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Folio(PreTrainedModel):
    """A model of two models, whose heads are tied by patterns."""

    config_class = FolioConfig
    _supports_sdpa = True
    _tied_weights_keys = {
        r"heads.[1-9]": "heads.0",
        "lm_head.weight": "language_model.embed_tokens.weight",
    }

    def __init__(self, config):
        super().__init__(config)
        self.language_model = NoteModel(config.text_config)
        self.vision_tower = NoteModel(config.vision_config)
        width = config.text_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(3))
        self.lm_head = nn.Linear(width, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None):
        return self.lm_head(self.language_model(input_ids))
