"""What holds for every native class with every head: saving and loading."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptd.models import registry
from tests.models.native.cases import (
    CASES,
    ONE_EACH,
    PAD,
    TEXT,
    VOCABULARY,
    WITH_LOSS,
    Case,
    first_of,
    name_of,
    run,
)

NAMED_ANEW = {"gpt_neox", "mixtral", "qwen3_moe", "vit"}
"""Whose modules transformers calls otherwise than their files do."""


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_save_and_load(case: Case, tmp_path: Path) -> None:
    """What was saved loads with nothing missing, every bit the same, and answers the same."""
    model = case.model()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    loaded, info = case.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    inputs = case.inputs()
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    from_there = {"dtype": "float32", "_name_or_path": str(tmp_path)}
    assert loaded.config.to_dict() == model.config.to_dict() | from_there


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ties(case: Case, tmp_path: Path) -> None:
    """Tied names are one parameter, fresh, copied and loaded, and only one of them is in the file."""
    model = case.model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for one in (model, copy.deepcopy(model), case.cls.from_pretrained(tmp_path)):
        for target, source in one.all_tied_weights_keys.items():
            assert one.get_parameter(target) is one.get_parameter(source)
            assert target not in stored
            assert source in stored
    declared = model._tied_weights_keys or {}
    assert declared.items() <= model.all_tied_weights_keys.items()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_untied_weights_are_saved_each(case: Case, tmp_path: Path) -> None:
    """Without the flag a head has a matrix of its own, in the file as well."""
    model = case.model(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    model.save_pretrained(tmp_path)
    loaded, info = case.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    if head is not None:
        assert head.weight is not model.get_input_embeddings().weight
        assert torch.equal(loaded.get_output_embeddings().weight, head.weight)


@pytest.mark.parametrize("case", TEXT, ids=name_of)
@pytest.mark.parametrize("rows", [VOCABULARY + 10, VOCABULARY - 15])
def test_resized_models_run_and_load(case: Case, rows: int, tmp_path: Path) -> None:
    """After a resize the model runs with its last token, trains, saves and loads."""
    model = case.model(pad_token_id=PAD)
    before = model.get_input_embeddings().weight.detach().clone()
    embedding = model.resize_token_embeddings(rows)
    kept = min(rows, VOCABULARY)
    assert torch.equal(embedding.weight[:kept], before[:kept])
    assert (embedding.num_embeddings, model.config.vocab_size) == (rows, rows)
    inputs = case.inputs()
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            inputs[name] = inputs[name].clamp(max=rows - 1)
            inputs[name][..., 0] = rows - 1
    answer = first_of(model(**inputs))
    answer.float().sum().backward()
    assert embedding.weight.grad.shape[0] == rows
    model.save_pretrained(tmp_path)
    again = run(case.cls.from_pretrained(tmp_path), inputs)
    torch.testing.assert_close(again, answer, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_runs(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """A model that is loaded in a dtype is in it, answers in it, and nearly the same."""
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == loaded.config.dtype == dtype
    inputs = case.inputs()
    typed = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    answer = run(loaded, typed)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.double(), run(model, inputs).double(), atol=0.25, rtol=0.1)


@pytest.mark.parametrize("case", ONE_EACH, ids=name_of)
def test_what_is_missing_gets_the_initial_distribution(case: Case, tmp_path: Path) -> None:
    """A model of a file with nothing in it is a fresh one: the same seed, the same values."""
    model = case.model()
    model.save_pretrained(tmp_path)
    save_file({"nothing": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.manual_seed(3)
    loaded = case.cls.from_pretrained(tmp_path)
    fresh = case.cls(case.config())
    for name, parameter in loaded.named_parameters():
        wanted = fresh.get_parameter(name)
        assert parameter.isfinite().all(), name
        assert abs(parameter.mean() - wanted.mean()) <= 4 * wanted.std(correction=0) + 1e-6, name
        assert (parameter.std(correction=0) == 0) == (wanted.std(correction=0) == 0), name


@pytest.mark.parametrize("case", WITH_LOSS, ids=name_of)
def test_other_labels_give_a_new_head(case: Case, tmp_path: Path) -> None:
    """A head with other labels is refused, and given new values where that is asked for."""
    model = case.model()
    model.save_pretrained(tmp_path)
    other = dict(case.cls(case.config(num_labels=5)).named_parameters())
    sized = {n for n, p in model.named_parameters() if p.shape != other[n].shape}
    if not sized:
        assert case.head not in {"sequence_classification", "token_classification"}
        return
    with pytest.raises(RuntimeError, match="size mismatch"):
        case.cls.from_pretrained(tmp_path, num_labels=5)
    loaded, info = case.cls.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, _, _ in info["mismatched_keys"]} == sized
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_body_and_its_heads_load_from_each_other(case: Case, tmp_path: Path) -> None:
    """What of the base model's folder a head takes, and the base model of the head's."""
    base_class = registry.imported(registry.MODELS["base"][case.model_type])
    pairs = [(base_class, case.cls), (case.cls, base_class)]
    for number, (writer, reader) in enumerate(pairs):
        folder = tmp_path / str(number)
        model = writer(case.config())
        model.save_pretrained(folder)
        loaded, info = reader.from_pretrained(folder, output_loading_info=True)
        oracle = getattr(transformers, reader.__name__)
        wanted, theirs = oracle.from_pretrained(folder, output_loading_info=True)
        ours, state = loaded.state_dict(), wanted.state_dict()
        if case.model_type in NAMED_ANEW:
            inner = [name for name in info["missing_keys"] if "layer" in name]
            assert not inner or case.cls.base_model_prefix != base_class.base_model_prefix
            continue
        assert info["missing_keys"] == set(theirs["missing_keys"])
        assert info["unexpected_keys"] == set(theirs["unexpected_keys"])
        assert ours.keys() == state.keys()
        for name in state.keys() - info["missing_keys"] - loaded.all_tied_weights_keys.keys():
            assert torch.equal(ours[name], state[name]), name


@pytest.mark.parametrize("case", ONE_EACH, ids=name_of)
def test_the_configuration_comes_back(case: Case, tmp_path: Path) -> None:
    """A configuration that is saved and loaded is the same, key by key, and JSON."""
    config = case.config(num_labels=4)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == case.model_type
