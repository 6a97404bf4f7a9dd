"""Tie groups and decisions, with transformers as the judge of what they lead to."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ckptd import errors
from ckptd.checkpoint.dtypes import Dtype
from ckptd.models import tying
from ckptd.models.tying import Outcome

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 99}
PINNED = {"switch", "t5", "t5 encoder", "umt5"}
"""Families whose flag also means something else, or nothing."""
BODY = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Spec:
    dtype: Dtype = Dtype.F32
    shape: tuple[int, ...] = (99, 32)


def llama(*names: str, **config: object) -> tying.Ties:
    tensors = {name: Spec() for name in names} | {BODY: Spec(shape=(48, 32))}
    return tying.find(LLAMA | config, tensors, path="/runs/x")


def groups(ties: tying.Ties) -> list[tuple[str, list[str]]]:
    return [(group.source, [t.name for t in group.targets]) for group in ties.groups]


# --- against transformers, family by family ---------------------------------------------------


def test_groups_are_the_parameters_the_model_shares(saved) -> None:
    """What the flag ties in the table is one storage in the model, and only what is absent."""
    state = saved.model.state_dict()
    shared: dict[int, set[str]] = {}
    for name, value in state.items():
        shared.setdefault(value.data_ptr(), set()).add(name)
    expected = {frozenset(names) for names in shared.values() if len(names) > 1}
    ties = saved.ties()
    flagged = {}
    for tie in ties.architecture.ties:
        if tie.flag.value(saved.config):
            flagged.setdefault(tie.source, {tie.source}).add(tie.target)
    assert {frozenset(names) for names in flagged.values()} == expected
    for group in ties.groups:
        assert group.source_present
        for target in group.targets:
            assert target.present is not target.flag.value(saved.config)


def test_a_saved_checkpoint_needs_no_decision(saved) -> None:
    """What transformers saved from an untouched model is published as it is."""
    decision, _, _ = saved.tie(saved.config, saved.weights)
    assert not (decision.copies)
    assert not (decision.renames)
    assert not (decision.drops)
    assert all(write.value is False for write in decision.writes)


def test_equal_copies_become_what_transformers_saves(saved, tmp_path) -> None:
    """With every target written out as an equal copy, `tie` drops exactly the copies."""
    weights = dict(saved.weights)
    for group in saved.ties().groups:
        for target in group.targets:
            weights[target.name] = weights[group.anchor].clone()
    decision, config, published = saved.tie(saved.config, weights)
    assert set(decision.drops) == {t.name for g in saved.ties().groups for t in g.targets}
    state = saved.load(tmp_path / "m", config, published)
    for group in saved.ties().groups:
        assert torch.equal(state_of(saved, state, group.source), weights[group.anchor])
        for target in group.targets:
            assert torch.equal(state_of(saved, state, target.name), weights[group.anchor])


def test_different_tensors_stay_themselves(saved, tmp_path) -> None:
    """A head unlike the embedding is loaded as it was, and so is everything else."""
    weights = dict(saved.weights)
    for group in saved.ties().groups:
        for target in group.targets:
            if not target.alias:
                weights[target.name] = torch.randn(weights[group.anchor].shape)
    decision, config, published = saved.tie(saved.config, weights)
    assert not decision.drops
    state = saved.load(tmp_path / "m", config, published)
    for name, value in weights.items():
        if value.dtype.is_floating_point and value.shape[0] == 99:
            assert torch.equal(state_of(saved, state, name), value), name


def test_untied_is_whole_and_loads(saved, tmp_path) -> None:
    """`untie` writes every target out and the flag is false afterwards, or refuses by name."""
    if saved.family in PINNED:
        with pytest.raises(errors.StageRefused, match=r"shared\.weight"):
            saved.tie(saved.config, saved.weights, untie=True)
        return
    decision, config, published = saved.tie(saved.config, saved.weights, untie=True)
    ties = tying.find(config, {name: Spec() for name in published}, path="x")
    assert all(t.present for group in ties.groups for t in group.targets)
    assert not any(flag.value(config) for flag in ties.flags)
    assert not decision.drops
    saved.load(tmp_path / "m", config, published)


def test_the_only_copy_gets_the_canonical_name(saved, tmp_path) -> None:
    """A tied checkpoint that holds its one matrix under the head's name is published rightly."""
    ties = saved.ties()
    tied = [g for g in ties.groups if g.targets and g.targets[0].flag.value(saved.config)]
    weights = dict(saved.weights)
    for group in tied:
        weights[group.targets[-1].name] = weights.pop(group.source)
    decision, config, published = saved.tie(saved.config, weights)
    assert published.keys() == saved.weights.keys()
    assert len(decision.renames) == len(tied)
    state = saved.load(tmp_path / "m", config, published)
    for group in tied:
        assert torch.equal(state_of(saved, state, group.source), saved.weights[group.source])


def state_of(saved, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a tensor of a loaded state by its name on disk."""
    known = saved.ties().architecture
    runtime = {s: row.name for row in known.rows for s in known.candidates(row.name)}
    return state[runtime.get(name, name)] if name not in state else state[name]


# --- the rules, one by one --------------------------------------------------------------------


def test_equal_tensors_are_tied_whatever_the_flag_said() -> None:
    """Equal embedding and head: one tensor, and the flag becomes true and explicit."""
    for config in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}):
        ties = llama(EMBEDDING, HEAD, **config)
        decision = tying.decide(ties, same={(EMBEDDING, HEAD): True})
        assert decision.drops == (HEAD,)
        said = config.get("tie_word_embeddings")
        assert [write.value for write in decision.writes] == ([] if said else [True])
        assert decision.results[0].outcome is Outcome.TIED


def test_different_tensors_correct_the_flag() -> None:
    """Different embedding and head: both stay and the flag becomes false."""
    ties = llama(EMBEDDING, HEAD, tie_word_embeddings=True)
    decision = tying.decide(ties, same={(EMBEDDING, HEAD): False})
    assert (decision.drops, decision.copies, decision.renames) == ((), (), ())
    assert [(w.key, w.value) for w in decision.writes] == [("tie_word_embeddings", False)]


def test_another_dtype_is_different_without_a_look() -> None:
    """Tensors of unlike dtype or shape are never compared and never tied."""
    tensors = {EMBEDDING: Spec(), HEAD: Spec(dtype=Dtype.BF16)}
    ties = tying.find(LLAMA | {"tie_word_embeddings": True}, tensors, path="x")
    assert ties.pairs == ()
    assert tying.decide(ties, same={}).writes[0].value is False
    with pytest.raises(errors.StageRefused, match=HEAD):
        tying.decide(ties, same={}, force=True)


def test_a_quantized_head_is_a_head_of_its_own() -> None:
    """`lm_head.qweight` beside an embedding means apart."""
    ties = llama(EMBEDDING, "lm_head.qweight", "lm_head.scales", tie_word_embeddings=True)
    decision = tying.decide(ties, same={})
    assert not decision.copies
    assert decision.writes[0].value is False


def test_only_the_head_is_the_swap() -> None:
    """A tied model's only matrix gets the embedding's name."""
    ties = llama(HEAD, tie_word_embeddings=True)
    decision = tying.decide(ties, same={})
    assert decision.renames == ((HEAD, EMBEDDING),)
    assert decision.writes == ()


@pytest.mark.parametrize(("present", "missing"), [(EMBEDDING, HEAD), (HEAD, EMBEDDING)])
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}])
def test_half_of_an_untied_model_is_refused(present, missing, config) -> None:
    """The flag says apart and one is absent: refused by name, tied by force."""
    ties = llama(present, **config)
    with pytest.raises(errors.StageRefused, match=missing):
        tying.decide(ties, same={})
    decision = tying.decide(ties, same={}, force=True)
    assert [(w.key, w.value) for w in decision.writes] == [("tie_word_embeddings", True)]
    assert decision.renames == (((HEAD, EMBEDDING),) if present == HEAD else ())


def test_force_ties_what_differs() -> None:
    """`force`: the embedding's content wins."""
    decision = tying.decide(llama(EMBEDDING, HEAD), same={(EMBEDDING, HEAD): False}, force=True)
    assert decision.drops == (HEAD,)


def test_untie_writes_the_missing_one() -> None:
    """`untie`: the head is a copy and the flag false."""
    ties = llama(EMBEDDING, tie_word_embeddings=True)
    decision = tying.decide(ties, same={}, untie=True)
    assert decision.copies == ((EMBEDDING, HEAD),)
    assert decision.writes[0].value is False


def test_force_and_untie_exclude_each_other() -> None:
    """Both at once is a mistake of the caller."""
    with pytest.raises(ValueError, match="exclude"):
        tying.decide(llama(EMBEDDING), same={}, force=True, untie=True)


def test_unknown_names_are_refused() -> None:
    """A known class under names nobody knows: refused, with the names that were tried."""
    with pytest.raises(errors.StageRefused, match=r"model\.embed_tokens\.weight"):
        llama("module.model.embed_tokens.weight")


def test_a_flag_gets_one_value_for_all_it_governs() -> None:
    """BART with a head of its own keeps its encoder's embedding, as a copy."""
    config = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}
    tensors = {"model.shared.weight": Spec(), "lm_head.weight": Spec()}
    ties = tying.find(config, tensors, path="x")
    decision = tying.decide(ties, same={ties.pairs[0]: False})
    assert {name for _, name in decision.copies} == {
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    }
    assert [(w.key, w.value) for w in decision.writes] == [("tie_word_embeddings", False)]


def test_t5_keeps_its_flag_for_it_means_scaling() -> None:
    """T5 v1.1 has a head of its own and `false`: nothing is written, nothing is copied."""
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "tie_word_embeddings": False,
    }
    tensors = {"shared.weight": Spec(), "lm_head.weight": Spec()}
    ties = tying.find(config, tensors, path="x")
    decision = tying.decide(ties, same={ties.pairs[0]: False})
    assert not decision.changes
    assert tying.decide(ties, same={ties.pairs[0]: True}).drops == ("lm_head.weight",)
    with pytest.raises(errors.StageRefused, match="whatever config"):
        tying.decide(ties, same={ties.pairs[0]: False}, untie=True)


@pytest.mark.parametrize(
    ("name", "model_type", "embedding"),
    [
        ("ZambaForCausalLM", "zamba", "model.embed_tokens.weight"),
        ("SwitchTransformersForConditionalGeneration", "switch_transformers", "shared.weight"),
    ],
)
def test_a_flag_that_does_more_keeps_its_value(name, model_type, embedding) -> None:
    """Zamba shares layers by it, Switch scales by it: a head of its own is kept beside `true`."""
    config = {"architectures": [name], "model_type": model_type, "tie_word_embeddings": True}
    ties = tying.find(config, {embedding: Spec(), HEAD: Spec()}, path="x")
    decision = tying.decide(ties, same={(embedding, HEAD): False})
    assert not decision.changes
    assert HEAD in decision.notes[0]
    with pytest.raises(errors.StageRefused, match="cannot untie"):
        tying.decide(ties, same={(embedding, HEAD): False}, untie=True)


def test_a_nested_flag_cannot_bring_the_tie_back() -> None:
    """Qwen2-VL forwards the text model's flag: false is written there too."""
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "text_config": {"tie_word_embeddings": True},
    }
    tensors = {"model.embed_tokens.weight": Spec(), "lm_head.weight": Spec()}
    ties = tying.find(config, tensors, path="x")
    decision = tying.decide(ties, same={ties.pairs[0]: False})
    assert {(w.key, w.value) for w in decision.writes} == {
        ("tie_word_embeddings", False),
        ("text_config.tie_word_embeddings", False),
    }


UNKNOWN = {"architectures": ["NobodyForCausalLM"], "model_type": "nobody", "vocab_size": 99}


def test_an_unknown_class_is_believed_where_it_speaks() -> None:
    """Custom code: equal tensors become one only if config.json says that the class ties."""
    tensors = {"transformer.wte.weight": Spec(), "lm_head.weight": Spec()}
    silent = tying.find(UNKNOWN, tensors, path="x")
    pair = silent.pairs[0]
    assert not tying.decide(silent, same={pair: True}).changes
    speaking = tying.find(UNKNOWN | {"tie_word_embeddings": True}, tensors, path="x")
    assert tying.decide(speaking, same={pair: True}).drops == ("lm_head.weight",)
    assert tying.decide(speaking, same={pair: False}).writes[0].value is False


def test_an_unknown_class_with_several_readings_is_refused() -> None:
    """Two candidates for the embedding: refused, both named."""
    tensors = {"a.embed_tokens.weight": Spec(), "b.embed_tokens.weight": Spec()}
    with pytest.raises(errors.StageRefused, match=r"a\.embed.*b\.embed"):
        tying.find(UNKNOWN, tensors, path="x")


def test_an_unknown_class_with_only_a_head_is_refused() -> None:
    """Nobody can tell the embedding's name."""
    with pytest.raises(errors.StageRefused, match=r"lm_head\.weight"):
        tying.find(UNKNOWN, {"lm_head.weight": Spec()}, path="x")


def test_a_wish_that_nobody_can_fulfil_is_refused() -> None:
    """`untie` for an unknown class without a head: nobody knows the head's name."""
    ties = tying.find(UNKNOWN, {"transformer.wte.weight": Spec()}, path="x")
    assert not tying.decide(ties, same={}).changes
    with pytest.raises(errors.StageRefused, match="unknown"):
        tying.decide(ties, same={}, untie=True)


def test_a_class_without_a_head_has_nothing_to_tie() -> None:
    """A classifier passes `tie` untouched, whatever is asked."""
    config = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}
    ties = tying.find(config, {EMBEDDING: Spec(), "score.weight": Spec(shape=(2, 32))}, path="x")
    assert not tying.decide(ties, same={}, untie=True).changes
