"""ViT against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ckptd.models.native import vit
from tests.models.native import oracle

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "encoder_stride": 8,
}
IMAGES = oracle.vectors(2, 3, 24, 24)
NAMES = ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling")


def test_defaults() -> None:
    """A configuration without arguments is that of transformers; the pooler follows the width."""
    oracle.same_config("ViTConfig")
    oracle.same_config("ViTConfig", **SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_declarations(name: str) -> None:
    """Class attributes and the forward's arguments are those of transformers."""
    oracle.same_class(name)


@pytest.mark.parametrize("name", NAMES)
def test_state(name: str) -> None:
    """Tensors, counts and buffers are those of the files transformers writes."""
    oracle.same_state(oracle.pair(name, **SMALL))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str, implementation: str) -> None:
    """Every output is that of transformers; hidden states are those before the last norm."""
    oracle.compare(
        oracle.pair(name, implementation, **SMALL),
        pixel_values=IMAGES,
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


@pytest.mark.parametrize("size", [(24, 24), (32, 16), (33, 25), (40, 64)])
def test_other_sizes(size: tuple[int, int]) -> None:
    """With interpolated positions images of other sizes give what they give in transformers."""
    oracle.compare(
        oracle.pair("ViTModel", **SMALL),
        pixel_values=oracle.vectors(1, 3, *size),
        interpolate_pos_encoding=True,
    )


@pytest.mark.parametrize(
    "switches",
    [
        {"qkv_bias": False},
        {"image_size": (16, 32), "patch_size": (4, 8), "num_channels": 1},
        {"hidden_act": "relu", "pooler_act": "relu", "pooler_output_size": 12},
    ],
)
def test_switches(switches: dict[str, Any]) -> None:
    """Every switch of the configuration does what it does in transformers."""
    both = oracle.make("ViTModel", "sdpa", SMALL | switches)
    height, width = both.ours.embeddings.patch_embeddings.image_size
    images = oracle.vectors(2, both.ours.config.num_channels, height, width)
    oracle.compare(both, pixel_values=images)


def test_masked_patches() -> None:
    """Masked patches are replaced by the mask token, attention hides positions."""
    both = oracle.make("ViTModel", "eager", SMALL, use_mask_token=True)
    masked = torch.arange(9)[None].repeat(2, 1) % 2 == 0
    oracle.compare(both, pixel_values=IMAGES, bool_masked_pos=masked)
    visible = torch.arange(10)[None].repeat(2, 1) < 7
    oracle.compare(both, pixel_values=IMAGES, attention_mask=visible)


def test_masked_images() -> None:
    """The reconstruction, and its error in masked patches, are those of transformers."""
    both = oracle.pair("ViTForMaskedImageModeling", **SMALL)
    masked = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1, 0], [0] * 9], dtype=torch.bool)
    found = oracle.compare(both, pixel_values=IMAGES, bool_masked_pos=masked)
    assert found.reconstruction.shape == IMAGES.shape
    other = oracle.make("ViTForMaskedImageModeling", "sdpa", SMALL | {"encoder_stride": 4})
    oracle.compare(other, pixel_values=IMAGES)
    for model in (other.ours, other.theirs):
        with pytest.raises(ValueError, match="encoder_stride"):
            model(IMAGES, bool_masked_pos=masked)


def test_masked_patches_need_a_token() -> None:
    """A model without mask token refuses masked patches."""
    model = vit.ViTModel(vit.ViTConfig(**SMALL))
    with pytest.raises(ValueError, match="use_mask_token"):
        model(IMAGES, bool_masked_pos=torch.ones(2, 9))


def test_without_pooler() -> None:
    """Without the pooling layer there is no pooled output and no weight for it."""
    both = oracle.make("ViTModel", "sdpa", SMALL, add_pooling_layer=False)
    oracle.same_state(both)
    assert oracle.compare(both, pixel_values=IMAGES).pooler_output is None


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [
        (1, torch.tensor([0.5, -1.0])),
        (3, torch.tensor([2, 0])),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    ],
)
def test_loss(num_labels: int, labels: torch.Tensor) -> None:
    """Labels decide between regression, one class and several."""
    both = oracle.make("ViTForImageClassification", "sdpa", SMALL | {"num_labels": num_labels})
    oracle.compare(both, pixel_values=IMAGES, labels=labels)


def test_tuples() -> None:
    """Without `return_dict` the answer is a tuple of the fields that are there."""
    both = oracle.pair("ViTModel", **SMALL)
    given = {"output_hidden_states": True, "return_dict": False}
    with torch.no_grad():
        oracle.close(both.theirs(IMAGES, **given), both.ours(IMAGES, **given))


@pytest.mark.parametrize("shape", [(2, 1, 24, 24), (2, 3, 32, 24)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    """Images with other channels, or of another size, are refused with the text of transformers."""
    both = oracle.pair("ViTModel", **SMALL)
    with pytest.raises(ValueError) as theirs:
        both.theirs(torch.ones(shape))
    with pytest.raises(ValueError) as ours:
        both.ours(torch.ones(shape))
    assert str(ours.value).startswith(str(theirs.value).removesuffix("."))


def test_no_images() -> None:
    """Without images there is a sentence, not a missing attribute."""
    with pytest.raises(ValueError, match="pixel_values"):
        vit.ViTModel(vit.ViTConfig(**SMALL))()


def test_initial_weights() -> None:
    """Tokens and positions start normal, biases and the mask token at zero."""
    torch.manual_seed(0)
    values = SMALL | {"hidden_size": 256, "image_size": 64, "initializer_range": 0.1}
    model = vit.ViTModel(vit.ViTConfig(**values), use_mask_token=True)
    embeddings = model.embeddings
    projection = embeddings.patch_embeddings.projection
    for weight in (embeddings.position_embeddings, embeddings.cls_token, projection.weight):
        assert weight.std().item() == pytest.approx(0.1, rel=0.2)
    assert not embeddings.mask_token.any()
    assert not projection.bias.any()


def test_input_embedding() -> None:
    """The input embedding is that of the patches, from the head as well."""
    model = vit.ViTForImageClassification(vit.ViTConfig(**SMALL))
    assert model.get_input_embeddings() is model.vit.embeddings.patch_embeddings


def test_checkpointing() -> None:
    """Gradients are the same when activations are computed twice."""
    model = vit.ViTForImageClassification(vit.ViTConfig(**SMALL))
    oracle.same_gradients(model, pixel_values=IMAGES, labels=torch.tensor([0, 1]))


def test_ours_read_there(tmp_path: Any) -> None:
    """Weights under our names load in transformers without a missing or an unexpected key."""
    both = oracle.make("ViTForImageClassification", "sdpa", SMALL)
    both.ours.save_pretrained(tmp_path)
    again, info = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        oracle.close(again(IMAGES).logits, both.ours(IMAGES).logits)
