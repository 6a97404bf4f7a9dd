"""ViT: an image cut into patches, read by a bidirectional encoder.

Parameter names are those of the Hub's checkpoints
(`vit.encoder.layer.0.attention.attention.query.weight`).

Shapes: B batch, C channels, Y and X pixel rows and columns, P patches, T = P + 1 positions (the
class token first), H heads, D hidden size, K head size, L classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ckptd.models.base import PreTrainedModel
from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.layers import activations, attention
from ckptd.models.layers.outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from ckptd.models.native import heads, keys, record
from ckptd.models.native.vit_embeddings import ViTEmbeddings


class ViTConfig(PreTrainedConfig):
    """Sizes and switches of a ViT; the defaults are those of `vit-base-patch16-224`."""

    model_type = "vit"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: Any = 224
    patch_size: Any = 16
    num_channels: int = 3
    qkv_bias: bool = True
    encoder_stride: int = 16
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    def __post_init__(self) -> None:
        """The pooler is as wide as the model unless it is said."""
        super().__post_init__()
        if self.pooler_output_size is None:
            self.pooler_output_size = self.hidden_size

    def validate_architecture(self) -> None:
        """Check that the heads share the hidden size evenly."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class ViTSelfAttention(nn.Module):
    """Projections to query, key and value, and attention over all positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.head_dim = width // config.num_attention_heads
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)

    def forward(
        self, hidden_BTD: torch.Tensor, mask: torch.Tensor | None, *, want_weights: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended vectors (B, T, D) and, where wanted, the weights (B, H, T, T)."""
        out_BTHK, weights_BHTT = attention.attend(
            self.config._attn_implementation,
            keys.split_heads(self.query(hidden_BTD), self.head_dim),
            keys.split_heads(self.key(hidden_BTD), self.head_dim),
            keys.split_heads(self.value(hidden_BTD), self.head_dim),
            mask,
            scale=self.head_dim**-0.5,
            dropout=self.config.attention_probs_dropout_prob,
            training=self.training,
            want_weights=want_weights,
        )
        return out_BTHK.flatten(2), weights_BHTT


class ViTProjection(nn.Module):
    """A linear map with dropout, at the end of each half of a layer."""

    def __init__(self, num_inputs: int, config: ViTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(num_inputs, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (.., inputs) to (.., D)."""
        out: torch.Tensor = self.dropout(self.dense(x))
        return out


class ViTAttention(nn.Module):
    """Attention and the projection of what it gathered."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = ViTProjection(config.hidden_size, config)

    def forward(
        self, hidden_BTD: torch.Tensor, mask: torch.Tensor | None, *, want_weights: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended vectors (B, T, D) and, where wanted, the weights (B, H, T, T)."""
        out_BTD, weights_BHTT = self.attention(hidden_BTD, mask, want_weights=want_weights)
        return self.output(out_BTD), weights_BHTT


class ViTIntermediate(nn.Module):
    """The widening half of the MLP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activations.make(config.hidden_act)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, intermediate size)."""
        out: torch.Tensor = self.intermediate_act_fn(self.dense(hidden_BTD))
        return out


class ViTLayer(GradientCheckpointingLayer):
    """One layer, with norms before each half."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention = ViTAttention(config)
        self.intermediate = ViTIntermediate(config)
        self.output = ViTProjection(config.intermediate_size, config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_BTD: torch.Tensor, mask: torch.Tensor | None, *, want_weights: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Return the layer's output (B, T, D) and the weights where wanted."""
        attended_BTD, weights = self.attention(
            self.layernorm_before(hidden_BTD), mask, want_weights=want_weights
        )
        hidden_BTD = hidden_BTD + attended_BTD
        widened = self.intermediate(self.layernorm_after(hidden_BTD))
        return hidden_BTD + self.output(widened), weights, None


class ViTEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))


class ViTPooler(nn.Module):
    """The class token, projected."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        assert config.pooler_output_size is not None
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = activations.make(config.pooler_act)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, pooler size)."""
        out: torch.Tensor = self.activation(self.dense(hidden_BTD[:, 0]))
        return out


class ViTPreTrainedModel(PreTrainedModel):
    """What all ViT classes share."""

    config_class = ViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _can_record_outputs = {  # noqa: RUF012 - ClassVar in the base
        "hidden_states": ViTLayer,
        "attentions": ViTAttention,
    }
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]  # noqa: RUF012 - ClassVar in the base
    _input_embed_layer = "patch_embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise from a normal distribution cut off at 2, tokens and positions as well."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ViTEmbeddings):
            nn.init.trunc_normal_(module.position_embeddings, std=std)
            nn.init.trunc_normal_(module.cls_token, std=std)
            if module.mask_token is not None:
                nn.init.zeros_(module.mask_token)
        else:
            super()._init_weights(module)


class ViTModel(ViTPreTrainedModel):
    """The body: patches, the layers, the last norm, the pooler where one is wanted."""

    def __init__(
        self, config: ViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ) -> None:
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = ViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run the body on images (B, C, Y, X).

        `bool_masked_pos` (B, P) is True for patches that the mask token replaces;
        `interpolate_pos_encoding` takes images of other sizes; `attention_mask` (B, T) hides
        positions. The hidden states are those before the last norm.

        Returns:
            `BaseModelOutputWithPooling`, or its fields as a tuple.

        Raises:
            ValueError: no images, or images of another shape.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        kept = record.Record(self.config, options)
        hidden_BTD = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        mask = keys.padding_mask(self.config, hidden_BTD, attention_mask)
        hidden_BTD = kept.run(self.encoder.layer, hidden_BTD, mask)
        kept.state(hidden_BTD)
        hidden_BTD = self.layernorm(hidden_BTD)
        return kept.answer(
            BaseModelOutputWithPooling(
                last_hidden_state=hidden_BTD,
                pooler_output=None if self.pooler is None else self.pooler(hidden_BTD),
                hidden_states=kept.hidden_states,
                attentions=kept.attentions,
            )
        )


class ViTForImageClassification(ViTPreTrainedModel):
    """The body without pooler, with one decision an image, read at the class token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        classes = config.num_labels or 0
        self.classifier = nn.Linear(config.hidden_size, classes) if classes else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the body and classify; see `heads.classification_loss` for `labels`.

        Returns:
            `ImageClassifierOutput` with logits (B, L), or its fields as a tuple.
        """
        body = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **options,
        )
        logits_BL = self.classifier(body.last_hidden_state[:, 0])
        loss = None
        if labels is not None:
            loss = heads.classification_loss(self.config, logits_BL, labels)
        output = ImageClassifierOutput(
            loss=loss,
            logits=logits_BL,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)


class ViTForMaskedImageModeling(ViTPreTrainedModel):
    """The body with a mask token, and the pixels of every patch as it thinks they are."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        stride = config.encoder_stride
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(stride),
        )
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Read images (B, C, Y, X); with masked patches (B, P) the loss is their absolute error.

        Returns:
            `MaskedImageModelingOutput` with a reconstruction like the images, or its fields as a
            tuple.

        Raises:
            ValueError: masked patches that are not as long as `encoder_stride`.
        """
        size = self.config.patch_size
        if bool_masked_pos is not None and size != self.config.encoder_stride:
            raise ValueError(
                "bool_masked_pos needs `patch_size` to be `encoder_stride`, so that the "
                f"reconstruction is as large as the image: found {size} and "
                f"{self.config.encoder_stride}"
            )
        body = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            return_dict=True,
            **options,
        )
        patches_BPD = body.last_hidden_state[:, 1:]
        side = math.isqrt(patches_BPD.shape[1])
        made_BCYX = self.decoder(patches_BPD.transpose(1, 2).unflatten(2, (side, side)))
        loss = None
        if bool_masked_pos is not None:
            loss = self._masked_error(pixel_values, made_BCYX, bool_masked_pos)
        output = MaskedImageModelingOutput(
            loss=loss,
            reconstruction=made_BCYX,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
        return record.answer(self.config, return_dict, output)

    def _masked_error(
        self, image_BCYX: Any, made_BCYX: torch.Tensor, masked_BP: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean absolute error of the pixels in masked patches."""
        size = self.config.patch_size
        side = self.config.image_size // size
        masked_B1YX = masked_BP.reshape(-1, 1, side, side)
        masked_B1YX = masked_B1YX.repeat_interleave(size, 2).repeat_interleave(size, 3)
        error_BCYX = functional.l1_loss(image_BCYX, made_BCYX, reduction="none")
        total: torch.Tensor = (error_BCYX * masked_B1YX).sum() / (masked_B1YX.sum() + 1e-5)
        loss: torch.Tensor = total / self.config.num_channels
        return loss
