"""Stage `tie` from end to end: what transformers loads from the output is what the source held."""

from __future__ import annotations

import json

import pytest
import torch

from ckptd import errors
from tests.pipeline.stages.conftest import FAMILIES, config_of, planned, run, weights_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLAG = "tie_word_embeddings"
COPIES: dict[str, tuple[str, ...]] = {
    "bart": (HEAD, "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    "bert": ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    "bloom": (HEAD,),
    "falcon": (HEAD,),
    "gemma2": (HEAD,),
    "gemma3": ("language_model.lm_head.weight",),
    "gpt2": (HEAD,),
    "marian": (HEAD, "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    "opt": (HEAD,),
    "qwen2 tied": (HEAD,),
    "roberta": ("lm_head.decoder.weight", "lm_head.decoder.bias"),
    "t5": (HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "whisper": ("proj_out.weight",),
}
"""What each tied family leaves out when it is saved, by the name on disk."""
SOURCES = {
    "bart": "model.shared.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
    "bloom": "transformer.word_embeddings.weight",
    "falcon": "transformer.word_embeddings.weight",
    "gemma2": EMBEDDING,
    "gemma3": "language_model.model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "marian": "model.shared.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "qwen2 tied": EMBEDDING,
    "roberta": "roberta.embeddings.word_embeddings.weight",
    "t5": "shared.weight",
    "whisper": "model.decoder.embed_tokens.weight",
}
BIASES = {
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}
"""A tied bias and where its content is kept."""


def copies(saved) -> dict[str, torch.Tensor]:
    """Return every tensor that the family leaves out, as an equal copy."""
    weights = saved.weights
    return {
        name: weights[BIASES.get(name, SOURCES[saved.family])].clone()
        for name in COPIES[saved.family]
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_transformers_saved_stays_what_it_is(name, family, tmp_path) -> None:
    """An untouched checkpoint passes byte for byte, and gives the logits it gave."""
    saved = family(name)
    run(saved.path, "- tie", tmp_path / "out")
    assert same(weights_of(tmp_path / "out"), saved.weights)
    loaded = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(loaded), saved.logits(saved.model))


@pytest.mark.parametrize("name", sorted(COPIES))
def test_equal_copies_become_one(name, family, tmp_path) -> None:
    """Copies beside the canonical tensor are dropped, and the flag stays true."""
    saved = family(name)
    source = saved.modified(tmp_path / "source", change=copies(saved))
    outcome = run(source, "- tie", tmp_path / "out")
    assert same(weights_of(tmp_path / "out"), saved.weights)
    assert {n for g in outcome.reports["tie"]["groups"] for n in g["names"]} == set(COPIES[name])
    model = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(model), saved.logits(saved.model))
    assert model.config.get_text_config(decoder=True).tie_word_embeddings is not False


@pytest.mark.parametrize("name", sorted(COPIES.keys() - {"t5"}))
def test_a_head_of_its_own_is_kept_and_the_flag_corrected(name, family, tmp_path) -> None:
    """A head unlike the embedding, under a config that says tied: the head's logits are given."""
    saved = family(name)
    head = COPIES[name][0]
    weights = copies(saved)
    weights[head] = torch.randn(weights[head].shape)
    source = saved.modified(tmp_path / "source", change=weights)
    run(source, "- tie", tmp_path / "out")
    assert torch.equal(weights_of(tmp_path / "out")[head], weights[head])
    truth = saved.modified(tmp_path / "truth", change=weights, config=untied(config_of(source)))
    expected = saved.logits(saved.load(truth))
    assert torch.equal(saved.logits(saved.load(tmp_path / "out")), expected)
    assert not torch.equal(expected, saved.logits(saved.model))
    assert False in flags(config_of(tmp_path / "out"))


def flags(config) -> list[object]:
    """Return every tie flag that a config.json holds, wherever it is nested."""
    nested = [flag for value in config.values() if isinstance(value, dict) for flag in flags(value)]
    return nested + ([config[FLAG]] if FLAG in config else [])


def untied(config) -> dict[str, object]:
    """Return a config.json with every flag false, there or not."""
    nested = {
        key: untied(value)
        for key, value in config.items()
        if isinstance(value, dict) and "model_type" in value
    }
    return config | nested | {FLAG: False}


def test_a_t5_head_of_its_own_is_loaded_although_the_flag_means_scaling(family, tmp_path) -> None:
    """T5 computes by its flag: a different head stays and the flag keeps its value."""
    saved = family("t5 untied")
    head = {HEAD: torch.randn(99, 32)}
    source = saved.modified(tmp_path / "source", change=head, config={FLAG: False})
    run(source, "- tie", tmp_path / "out")
    assert config_of(tmp_path / "out")[FLAG] is False
    expected = saved.logits(saved.load(source))
    assert torch.equal(saved.logits(saved.load(tmp_path / "out")), expected)


@pytest.mark.parametrize("name", sorted(COPIES))
def test_the_only_matrix_is_published_under_the_embeddings_name(name, family, tmp_path) -> None:
    """A tied checkpoint whose one matrix has the head's name loads and gives the same logits."""
    saved = family(name)
    only = COPIES[name][0]
    embedding = SOURCES[name]
    source = saved.modified(
        tmp_path / "source", change={only: saved.weights[embedding]}, drop=(embedding,)
    )
    run(source, "- tie", tmp_path / "out")
    assert same(weights_of(tmp_path / "out"), saved.weights)
    loaded = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(loaded), saved.logits(saved.model))


@pytest.mark.parametrize("name", sorted(COPIES.keys() - {"t5"}))
def test_untied_is_written_out_and_loads_the_same(name, family, tmp_path) -> None:
    """`untie` writes every copy, sets the flag to false, and changes no logit."""
    saved = family(name)
    run(saved.path, "- tie: {untie: true}", tmp_path / "out")
    assert same(weights_of(tmp_path / "out"), saved.weights | copies(saved))
    model = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(model), saved.logits(saved.model))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_t5_refuses_to_untie_by_name(family, tmp_path) -> None:
    """The class ties whatever config.json says: a copy would be lost at the next load."""
    with pytest.raises(errors.StageRefused, match=r"shared\.weight.*cannot untie"):
        run(family("t5").path, "- tie: {untie: true}", tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "mixtral", "llava"])
def test_force_ties_what_differs(name, family, tmp_path) -> None:
    """`force`: the head becomes the embedding, for transformers, too."""
    saved = family(name)
    run(saved.path, "- tie: {force: true}", tmp_path / "out")
    model = saved.load(tmp_path / "out")
    embedding = saved.model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, embedding)
    assert len(weights_of(tmp_path / "out")) == len(saved.weights) - 1


@pytest.mark.parametrize("value", [True, False, None])
def test_the_config_alone_decides_nothing(value, family, tmp_path) -> None:
    """Whatever the flag says, equal tensors are tied and different ones are not."""
    saved = family("llama")
    embedding = saved.weights[EMBEDDING]
    equal = saved.modified(tmp_path / "equal", change={HEAD: embedding}, config={FLAG: value})
    apart = saved.modified(tmp_path / "apart", config={FLAG: value})
    run(equal, "- tie", tmp_path / "tied")
    run(apart, "- tie", tmp_path / "kept")
    assert HEAD not in weights_of(tmp_path / "tied")
    assert config_of(tmp_path / "tied")[FLAG] is True
    assert torch.equal(weights_of(tmp_path / "kept")[HEAD], saved.weights[HEAD])
    assert not config_of(tmp_path / "kept")[FLAG]
    assert torch.equal(saved.logits(saved.load(tmp_path / "kept")), saved.logits(saved.model))


def test_one_bit_is_a_difference(family, tmp_path) -> None:
    """A head that differs in its last element is a head of its own."""
    saved = family("qwen2 tied")
    head = saved.weights[EMBEDDING]
    head[-1, -1] = torch.nextafter(head[-1, -1], torch.tensor(1.0))
    run(saved.modified(tmp_path / "source", change={HEAD: head}), "- tie", tmp_path / "out")
    assert torch.equal(weights_of(tmp_path / "out")[HEAD], head)
    assert config_of(tmp_path / "out")[FLAG] is False


def test_partners_in_different_shards_are_compared(family, tmp_path) -> None:
    """Embedding and head far apart: the copy is found, its shard written anew without it."""
    saved = family("qwen2 tied")
    source = saved.modified(tmp_path / "source", change=copies(saved))
    run(source, "- reshard: {max_shard_size: 13KB}", tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"][HEAD] != index["weight_map"][EMBEDDING]
    run(tmp_path / "sharded", "- tie", tmp_path / "out")
    assert same(weights_of(tmp_path / "out"), saved.weights)
    saved.load(tmp_path / "out")


def test_names_of_the_base_model_are_understood(family, tmp_path) -> None:
    """A causal model saved without its prefix is tied under the names that it has."""
    saved = family("qwen2 tied")
    bare = {name.removeprefix("model."): value for name, value in saved.weights.items()}
    bare[HEAD] = bare["embed_tokens.weight"].clone()
    source = saved.modified(tmp_path / "source", change=bare, drop=tuple(saved.weights))
    run(source, "- tie", tmp_path / "out")
    assert weights_of(tmp_path / "out").keys() == bare.keys() - {HEAD}
    loaded = saved.load(tmp_path / "out")
    assert torch.equal(saved.logits(loaded), saved.logits(saved.model))


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD])
def test_half_of_an_untied_model_is_refused_by_name(missing, family, tmp_path) -> None:
    """The flag says apart and one is absent: nobody knows what it held."""
    source = family("llama").modified(tmp_path / "source", drop=(missing,), config={FLAG: False})
    with pytest.raises(errors.StageRefused, match=missing) as caught:
        run(source, "- tie", tmp_path / "out")
    assert caught.value.tensor == missing
    assert not (tmp_path / "out").exists()


def test_an_ambiguous_model_is_refused_by_name(family, tmp_path) -> None:
    """An unknown class with two candidates for the embedding: both are named."""
    saved = family("llama")
    source = saved.modified(
        tmp_path / "source",
        change={"second.embed_tokens.weight": torch.randn(99, 32)},
        config={"architectures": ["NobodyForCausalLM"], "model_type": "nobody"},
    )
    with pytest.raises(errors.StageRefused, match=r"model\.embed_tokens.*second\.embed_tokens"):
        run(source, "- tie", tmp_path / "out")


def test_planning_from_headers_reads_no_tensor(family, tmp_path) -> None:
    """With every tensor byte made garbage, the plan from headers is still the same plan."""
    saved = family("qwen2 tied")
    source = saved.modified(tmp_path / "source", change=copies(saved))
    before = planned(source, "- tie").digest
    weights = source / "model.safetensors"
    raw = weights.read_bytes()
    head = 8 + int.from_bytes(raw[:8], "little")
    with weights.open("r+b") as file:
        file.truncate(head)
        file.truncate(len(raw))  # a hole: the header is real, the rest is not there
    assert planned(source, "- tie").digest == before


def test_quantized_heads_are_never_dropped(family, tmp_path) -> None:
    """A packed head beside the embedding is a head of its own, and the flag becomes false."""
    saved = family("qwen2 tied")
    packed = {"lm_head.qweight": torch.ones(4, 99, dtype=torch.int32)}
    source = saved.modified(tmp_path / "source", change=packed)
    run(source, "- tie", tmp_path / "out")
    assert "lm_head.qweight" in weights_of(tmp_path / "out")
    assert config_of(tmp_path / "out")[FLAG] is False
