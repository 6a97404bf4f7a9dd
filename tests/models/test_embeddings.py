"""Vocabulary tensors, with transformers' own resize as the judge."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from ckptd import errors
from ckptd.checkpoint.dtypes import Dtype
from ckptd.models import architectures, configuration, embeddings
from ckptd.models.embeddings import Fill

BEYOND_THE_LIBRARY = {"bert untied", "deberta v2 new"}
"""Families whose resize in transformers leaves a checkpoint that does not load whole: it shares the
two biases of an untied BERT, and takes a dense layer of the new DeBERTa for its head."""
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97}


@dataclass(frozen=True)
class Spec:
    dtype: Dtype = Dtype.F32
    shape: tuple[int, ...] = (97, 32)


def llama(*extra: tuple[str, tuple[int, ...]], **config: object) -> embeddings.Vocabulary:
    tensors = {"model.embed_tokens.weight": Spec(), "lm_head.weight": Spec()}
    tensors |= {name: Spec(shape=shape) for name, shape in extra}
    return embeddings.find(LLAMA | {"hidden_size": 32} | config, tensors, path="/runs/x")


def resized(saved, rows: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return config.json and weights with every vocabulary tensor at `rows` rows of zeros added."""
    found = embeddings.find(saved.config, saved.tensors, path=saved.path)
    weights = dict(saved.weights)
    for tensor in found.tensors:
        shape = list(weights[tensor.name].shape)
        shape[tensor.axis] = rows - shape[tensor.axis]
        weights[tensor.name] = torch.cat([weights[tensor.name], torch.zeros(shape)], tensor.axis)
    return configuration.written(saved.config, found.writes(rows)), weights


def test_vocabulary_tensors_are_those_that_transformers_resizes(saved, tmp_path) -> None:
    """The same tensors change their shape on disk, the same keys of config.json their value."""
    if saved.family == "vit":
        with pytest.raises(errors.StageRefused, match="no vocabulary"):
            embeddings.find(saved.config, saved.tensors, path=saved.path)
        return
    if saved.family in BEYOND_THE_LIBRARY:
        return
    saved.load(tmp_path / "source", saved.config, saved.weights)
    model = type(saved.model).from_pretrained(tmp_path / "source")
    options = {} if saved.family == "marian" else {"mean_resizing": False}
    model.resize_token_embeddings(112, **options)
    model.save_pretrained(tmp_path / "resized")
    theirs = load_file(tmp_path / "resized" / "model.safetensors")
    changed = {n for n, value in theirs.items() if value.shape != saved.weights[n].shape}
    found = embeddings.find(saved.config, saved.tensors, path=saved.path)
    assert {tensor.name for tensor in found.tensors} == changed
    assert found.rows == 99
    config = json.loads((tmp_path / "resized" / "config.json").read_text())
    ours = configuration.written(saved.config, found.writes(112))
    assert configuration.integers(ours) == configuration.integers(config)


def test_what_is_resized_loads(saved, tmp_path) -> None:
    """With every vocabulary tensor and key changed, transformers finds nothing mismatched."""
    if saved.family == "vit":
        return
    config, weights = resized(saved, 112)
    saved.load(tmp_path / "m", config, weights)


def test_biases_grow_as_their_heads_do(saved) -> None:
    """A tied head's bias gets zeros, one of its own the mean; the logits' buffer gets zeros."""
    if saved.family == "vit":
        return
    found = embeddings.find(saved.config, saved.tensors, path=saved.path)
    fills = {tensor.name: tensor.fill for tensor in found.tensors}
    expected = {
        "final_logits_bias": Fill.ZEROS,
        "cls.predictions.bias": Fill.MEAN if saved.family == "bert untied" else Fill.ZEROS,
        "cls.predictions.decoder.bias": Fill.MEAN,
        "lm_head.bias": Fill.MEAN if saved.family == "gptj" else Fill.ZEROS,
    }
    for name, fill in fills.items():
        assert fill is expected.get(name, fill)
        if not name.endswith("bias"):
            assert fill is Fill.ROWS


def test_padding_starts_from_the_rows() -> None:
    """The base is what the embedding has, not what config.json says."""
    found = llama(vocab_size=90)
    assert (found.rows, found.size) == (97, 90)
    assert [(w.key, w.value) for w in found.writes(128)] == [("vocab_size", 128)]


def test_a_tied_checkpoint_without_its_embedding_is_still_known() -> None:
    """The one matrix under the head's name has the rows."""
    tensors = {"lm_head.weight": Spec()}
    assert embeddings.find(LLAMA, tensors, path="x").rows == 97


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.61.embed_tokens.weight", (97, 32)),
        ("model.layers.61.shared_head.head.weight", (97, 32)),
        ("medusa.0.proj.weight", (97, 32)),
        ("logit_scale", (97,)),
    ],
)
def test_a_tensor_that_cannot_be_placed_is_refused_by_name(name, shape) -> None:
    """Rows of the vocabulary in a tensor the class does not have."""
    with pytest.raises(errors.StageRefused, match=name):
        llama((name, shape))


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("model.layers.0.mlp.up_proj.weight", (97, 32), {"intermediate_size": 97}),
        ("model.layers.0.self_attn.qkv_proj.bias", (97,), {"heads": 97}),
        ("model.layers.0.mlp.down_proj.weight", (32, 97), {}),
    ],
)
def test_a_dimension_that_is_only_equal_is_no_alarm(name, shape, config) -> None:
    """A size of config.json explains the dimension, or it is no table beside the embedding."""
    assert len(llama((name, shape), **config).tensors) == 2


def test_another_vocabulary_of_the_same_size_stays() -> None:
    """Gemma 3n's vision tokens have a table of their own, which may be as long by chance."""
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": {"vocab_size": 97},
    }
    names = ("model.language_model.embed_tokens.weight", "model.embed_vision.embedding.weight")
    found = embeddings.find(config, {name: Spec() for name in names}, path="x")
    assert [tensor.name for tensor in found.tensors] == [names[0]]


def test_quantized_rows_are_refused() -> None:
    """Packed or integer rows cannot be added to."""
    for name, dtype in (("lm_head.weight", Dtype.U8), ("lm_head.qweight", Dtype.I32)):
        tensors = {"model.embed_tokens.weight": Spec(), name: Spec(dtype=dtype)}
        with pytest.raises(errors.StageRefused, match=name):
            embeddings.find(LLAMA, tensors, path="x")


@pytest.mark.parametrize(
    "name",
    [
        "BarkModel",
        "BltForCausalLM",
        "DeepseekV4ForCausalLM",
        "EncoderDecoderModel",
        "FSMTForConditionalGeneration",
        "MllamaForConditionalGeneration",
        "MobileBertForMaskedLM",
        "MusicgenForConditionalGeneration",
    ],
)
def test_incoherent_vocabularies_are_refused_by_name(name) -> None:
    """A class with several vocabularies, or rows beyond its own, says why it cannot be resized."""
    model_type = architectures.table()["architectures"][name]["type"]
    config = {"architectures": [name], "model_type": model_type}
    with pytest.raises(errors.StageRefused, match=name):
        embeddings.find(config, {"x.weight": Spec()}, path="x")


@pytest.mark.parametrize("decoder_rows", [97, 77])
def test_a_source_and_a_target_vocabulary_of_two_sizes_are_refused(decoder_rows: int) -> None:
    """One number of rows cannot serve two tokenizers; where the sizes agree it is one vocabulary."""
    config = {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "share_encoder_decoder_embeddings": False,
        "vocab_size": 97,
        "decoder_vocab_size": decoder_rows,
        "d_model": 32,
    }
    tensors = {
        "model.encoder.embed_tokens.weight": Spec(),
        "model.decoder.embed_tokens.weight": Spec(shape=(decoder_rows, 32)),
        "final_logits_bias": Spec(shape=(1, decoder_rows)),
    }
    if decoder_rows == 97:
        assert len(embeddings.find(config, tensors, path="/runs/x").tensors) == 3
        return
    with pytest.raises(errors.StageRefused, match="decoder_vocab_size"):
        embeddings.find(config, tensors, path="/runs/x")


def test_per_layer_embeddings_share_the_size() -> None:
    """Gemma 3n has a second table for the same tokens, with a key of its own."""
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": {"vocab_size": 97, "vocab_size_per_layer_input": 90},
    }
    body = "model.language_model."
    tensors = {
        f"{body}embed_tokens.weight": Spec(),
        f"{body}embed_tokens_per_layer.weight": Spec(shape=(90, 64)),
    }
    found = embeddings.find(config, tensors, path="x")
    assert [(t.name, t.rows) for t in found.tensors] == [
        (f"{body}embed_tokens.weight", 97),
        (f"{body}embed_tokens_per_layer.weight", 90),
    ]
    assert [write.key for write in found.writes(128)] == [
        "text_config.vocab_size",
        "text_config.vocab_size_per_layer_input",
    ]


def test_an_unknown_class_is_resized_by_the_rule_or_refused() -> None:
    """One embedding, one head and a size: enough; no size in config.json: refused."""
    config = {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}
    tensors = {"transformer.wte.weight": Spec(), "lm_head.weight": Spec()}
    found = embeddings.find(config | {"vocab_size": 97}, tensors, path="x")
    assert [tensor.name for tensor in found.tensors] == list(tensors)
    with pytest.raises(errors.StageRefused, match="vocab_size"):
        embeddings.find(config, tensors, path="x")
