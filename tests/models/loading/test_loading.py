"""from_pretrained: names, values, dtypes and reports against transformers; files; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from ckptd.models.base import PreTrainedModel
from ckptd.models.native import bert, llama
from tests.models.tiny import TinyBody, TinyConfig, TinyHead, tiny_saved, tiny_state

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OURS = {
    name: getattr(module, name)
    for module, names in (
        (llama, ("LlamaModel", "LlamaForCausalLM")),
        (bert, ("BertModel", "BertForMaskedLM")),
    )
    for name in names
}
BOTH = "output_loading_info"


def quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def theirs_saved(folder: Path, name: str, *, dtype: Any = None, **config: Any) -> None:
    quiet_transformers()
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SMALL, **config))
    model.to(dtype or torch.float32).save_pretrained(folder, max_shard_size="30KB")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder that holds a TinyBody."""
    return tiny_saved(tmp_path / "tiny", tiny_state())


def head_state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {f"body.{name}": tensor for name, tensor in tiny_state().items()}
    torch.manual_seed(1)
    return state | {"label.weight": torch.randn(2, 4), "label.bias": torch.randn(2)} | changes


# Against transformers


@pytest.mark.parametrize("dtype", [None, "float16", torch.bfloat16])
@pytest.mark.parametrize(
    ("saved", "config"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": False}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
        ("LlamaModel", {}),
        ("BertForMaskedLM", {}),
        ("BertModel", {}),
    ],
    ids=["llama-lm", "llama-tied", "llama", "bert-mlm", "bert"],
)
def test_base_and_head_load_from_each_other_as_in_transformers(
    tmp_path: Path, saved: str, config: dict[str, Any], dtype: Any
) -> None:
    """Info, names, values, dtypes and buffers are those of transformers, whatever was saved."""
    theirs_saved(tmp_path, saved, **config)
    for name in [one for one in OURS if one[:4] == saved[:4]]:
        ours, info = OURS[name].from_pretrained(tmp_path, dtype=dtype, **{BOTH: True})
        theirs, expected = getattr(transformers, name).from_pretrained(
            tmp_path, dtype=dtype, **{BOTH: True}
        )
        assert info == expected
        ours_state, their_state = ours.state_dict(), theirs.state_dict()
        assert ours_state.keys() == their_state.keys()
        for key, value in their_state.items():
            assert ours_state[key].dtype == value.dtype, key
            assert key in info["missing_keys"] or torch.equal(ours_state[key], value), key
        buffers, expected_buffers = dict(ours.named_buffers()), dict(theirs.named_buffers())
        assert buffers.keys() == expected_buffers.keys()
        for key, value in expected_buffers.items():
            assert buffers[key].dtype == value.dtype
            assert torch.equal(buffers[key], value)
        assert ours.config.dtype == theirs.config.dtype
        assert ours.get_memory_footprint() == theirs.get_memory_footprint()


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_there_are_compared(
    tmp_path: Path, equal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal ones become one parameter; different ones stay two, with a warning, as in 5.23."""
    theirs_saved(tmp_path, "LlamaForCausalLM", tie_word_embeddings=False)
    for path in tmp_path.glob("model*"):
        path.unlink()
    torch.manual_seed(0)
    state = dict(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).state_dict())
    if equal:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ours, info = llama.LlamaForCausalLM.from_pretrained(tmp_path, **{BOTH: True})
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not info["missing_keys"]
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == equal
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == equal
    assert torch.equal(ours.lm_head.weight, state["lm_head.weight"])
    assert ("kept apart" in caplog.text) != equal
    # Better than the original: a later save keeps both.
    assert ours.config.tie_word_embeddings == equal


def test_a_model_loaded_here_is_saved_and_read_by_transformers(tmp_path: Path) -> None:
    """Loading, saving and loading in transformers gives the same values and no complaint."""
    theirs_saved(tmp_path / "a", "LlamaForCausalLM", tie_word_embeddings=True)
    ours = llama.LlamaForCausalLM.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b", **{BOTH: True})
    assert not any(info.values())
    for key, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value)


# Names


def test_the_model_is_whole_and_in_evaluation_mode(tiny: Path) -> None:
    """Every value is the file's, computed buffers are computed, flags are the class's."""
    model = TinyBody.from_pretrained(tiny, scale=2.0)
    expected = load_file(tiny / "model.safetensors")
    assert {name: t.tolist() for name, t in model.state_dict().items()} == {
        name: t.tolist() for name, t in expected.items()
    }
    assert model.computed.tolist() == [0, 2, 4, 6, 8]
    assert model.scale == 2.0
    assert not model.training
    assert model.embed.weight.requires_grad
    assert not model.frozen.requires_grad
    assert model.name_or_path == str(tiny) == model.config._name_or_path


def test_only_the_target_of_a_tie_in_the_file_is_enough(tmp_path: Path) -> None:
    """Tying is symmetric: where only the head is there, the embedding is it."""
    state = head_state()
    head = state.pop("body.embed.weight")
    folder = tiny_saved(tmp_path, state | {"head.weight": head})
    model, info = TinyHead.from_pretrained(folder, **{BOTH: True})
    assert not any(info.values())
    assert model.body.embed.weight is model.head.weight
    assert torch.equal(model.head.weight, head)


def test_a_tie_of_which_nothing_is_there_stays_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With neither side in the file both are missing, new, and still one parameter."""
    state = head_state()
    del state["body.embed.weight"]
    model, info = TinyHead.from_pretrained(tiny_saved(tmp_path, state), **{BOTH: True})
    assert info["missing_keys"] == {"body.embed.weight", "head.weight"}
    assert model.body.embed.weight is model.head.weight
    assert model.head.weight.std() > 0
    assert "body.embed.weight" in caplog.text


def test_a_head_loads_from_its_base_model(tiny: Path) -> None:
    """Names without the prefix of the base model get it; the head's own are missing."""
    model, info = TinyHead.from_pretrained(tiny, **{BOTH: True})
    assert info["missing_keys"] == {"label.weight", "label.bias"}
    assert not info["unexpected_keys"]
    assert torch.equal(model.body.wide.weight, load_file(tiny / "model.safetensors")["wide.weight"])


def test_old_names_of_norms_and_a_key_mapping_are_understood(tmp_path: Path) -> None:
    """LayerNorm.gamma and beta are weight and bias; a pattern of the caller renames others."""
    state = tiny_state()
    state["LayerNorm.gamma"] = state.pop("LayerNorm.weight") + 1
    state["LayerNorm.beta"] = state.pop("LayerNorm.bias") + 2
    state["old.wide.weight"] = state.pop("wide.weight")
    model, info = TinyBody.from_pretrained(
        tiny_saved(tmp_path, state), key_mapping={r"^old\.": ""}, **{BOTH: True}
    )
    assert not any(info.values())
    assert torch.equal(model.LayerNorm.weight, state["LayerNorm.gamma"])
    assert torch.equal(model.LayerNorm.bias, state["LayerNorm.beta"])


def test_ignored_names_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class's patterns drop names from both sets; what is missing is initialised all the same."""
    state = tiny_state() | {"more.weight": torch.zeros(1)}
    del state["wide.weight"]
    monkeypatch.setattr(TinyBody, "_keys_to_ignore_on_load_missing", ["wide"])
    monkeypatch.setattr(TinyBody, "_keys_to_ignore_on_load_unexpected", [r"^more\."])
    model, info = TinyBody.from_pretrained(tiny_saved(tmp_path, state), **{BOTH: True})
    assert not any(info.values())
    assert model.wide.weight.std() > 0


def test_missing_and_unexpected_weights_are_one_readable_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning names class, folder and every name, those of many layers in one row."""
    theirs_saved(tmp_path, "LlamaModel", num_key_value_heads=2)
    with caplog.at_level("WARNING", logger="ckptd"):
        llama.LlamaModel.from_pretrained(tmp_path, num_hidden_layers=4)
    assert len(caplog.records) == 1
    assert f"LlamaModel from {tmp_path}" in caplog.text
    row = next(line for line in caplog.text.splitlines() if "q_proj" in line)
    assert row.split()[:2] == ["layers.{2..3}.self_attn.q_proj.weight", "missing"]


# Shapes


def test_other_shapes_are_a_runtime_error_that_lists_them(tiny: Path) -> None:
    """Each tensor is named with its shape in the checkpoint and in the model."""
    with pytest.raises(RuntimeError) as failure:
        TinyBody.from_pretrained(tiny, size=6)
    assert "embed.weight" in str(failure.value)
    assert "(7, 4)" in str(failure.value)
    assert "(7, 6)" in str(failure.value)
    assert "ignore_mismatched_sizes" in str(failure.value)


def test_other_shapes_can_be_given_new_values(tmp_path: Path) -> None:
    """With ignore_mismatched_sizes they are initialised and reported, not missing."""
    folder = tiny_saved(tmp_path, head_state())
    model, info = TinyHead.from_pretrained(
        folder, labels=5, ignore_mismatched_sizes=True, **{BOTH: True}
    )
    assert info["mismatched_keys"] == {
        ("label.weight", (2, 4), (5, 4)),
        ("label.bias", (2,), (5,)),
    }
    assert not info["missing_keys"]
    assert model.label.weight.shape == (5, 4)
    assert model.label.weight.std() > 0
    assert not model.label.bias.any()


# Dtypes and devices


@pytest.mark.parametrize(
    ("asked", "stored", "configured", "expected"),
    [
        ({}, torch.float16, None, torch.float16),
        ({}, torch.float32, "bfloat16", torch.bfloat16),
        ({"dtype": "auto"}, torch.float16, "float32", torch.float32),
        ({"dtype": "float64"}, torch.float32, "float16", torch.float64),
        ({"torch_dtype": torch.bfloat16}, torch.float32, None, torch.bfloat16),
        ({"dtype": {"": "bfloat16"}}, torch.float32, None, torch.bfloat16),
    ],
)
def test_the_dtype_is_the_wanted_one_the_configured_one_or_the_stored_one(
    tmp_path: Path, asked: dict[str, Any], stored: torch.dtype, configured: Any, expected: Any
) -> None:
    """An explicit dtype wins, then config.json's, then that of the first float tensor."""
    state = {name: tensor.to(stored) for name, tensor in tiny_state().items()}
    config = {"dtype": configured} if configured else {}
    model = TinyBody.from_pretrained(tiny_saved(tmp_path, state, **config), **asked)
    assert model.embed.weight.dtype == model.config.dtype == expected


@pytest.mark.parametrize(
    ("dtype", "wide", "strict"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_modules_that_must_stay_in_float32_do(
    tiny: Path, dtype: torch.dtype, wide: torch.dtype, strict: torch.dtype
) -> None:
    """The one list holds for float16, the strict one for bfloat16, too, with the file's values."""
    model = TinyHead.from_pretrained(tiny, dtype=dtype)
    assert model.body.wide.weight.dtype == wide
    assert model.body.strict.weight.dtype == strict
    assert model.body.embed.weight.dtype == dtype
    if wide is torch.float32:
        stored = load_file(tiny / "model.safetensors")["wide.weight"]
        assert torch.equal(model.body.wide.weight, stored)


def test_torch_is_left_as_it_was(tiny: Path) -> None:
    """Default dtype and module construction are the same afterwards, also after a failure."""
    TinyBody.from_pretrained(tiny, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        TinyBody.from_pretrained(tiny, dtype=torch.bfloat16, size=6)
    assert torch.get_default_dtype() is torch.float32
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_a_model_loaded_in_inference_mode_can_be_trained(tiny: Path) -> None:
    """Parameters are ordinary ones wherever `from_pretrained` was called."""
    with torch.inference_mode():
        model = TinyBody.from_pretrained(tiny, dtype=torch.float64)
    model.wide(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert model.wide.weight.grad is not None


@pytest.mark.parametrize("given", ["nonsense", "int8", 3, torch.float8_e4m3fn, "Tensor"])
def test_what_is_no_dtype_for_a_model_is_a_value_error(tiny: Path, given: Any) -> None:
    """Unknown names, objects of other types and dtypes no model can be made in are refused."""
    with pytest.raises(ValueError, match=r"dtype|made in"):
        TinyBody.from_pretrained(tiny, dtype=given)


@pytest.mark.parametrize(
    "given", ["cpu", {"": "cpu"}, torch.device("cpu"), {"a": "cpu", "b": "cpu"}, {"": "auto"}]
)
def test_one_device_in_any_spelling_is_understood(tiny: Path, given: Any) -> None:
    """A name, an object, a map to one device."""
    assert TinyBody.from_pretrained(tiny, device_map=given).device.type == "cpu"


@pytest.mark.parametrize("given", ["auto", "balanced", "sequential"])
def test_an_automatic_device_is_the_first_gpu_or_the_cpu(
    tiny: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU a model that may go anywhere goes to the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TinyBody.from_pretrained(tiny, device_map=given).device.type == "cpu"


@pytest.mark.parametrize("given", ["disk", {"a": "cpu", "b": "cuda:0"}, "meta", {}, [1]])
def test_several_devices_are_refused(tiny: Path, given: Any) -> None:
    """What is not one device is a ValueError that says what to give."""
    with pytest.raises(ValueError, match="device"):
        TinyBody.from_pretrained(tiny, device_map=given)


# Arguments


def test_a_state_dictionary_is_taken_and_not_shared() -> None:
    """With `state_dict` and `config` no file is read, and the caller's tensors stay its own."""
    state = tiny_state()
    model, info = TinyBody.from_pretrained(
        None, config=TinyConfig(), state_dict=state, **{BOTH: True}
    )
    assert not any(info.values())
    state["embed.weight"].zero_()
    assert model.embed.weight.std() > 0


def test_arguments_that_exclude_each_other_are_value_errors(tiny: Path) -> None:
    """A name beside a state dictionary, neither of them, or one without a configuration."""
    with pytest.raises(ValueError, match="state_dict"):
        TinyBody.from_pretrained(tiny, state_dict=tiny_state())
    with pytest.raises(ValueError, match="state_dict"):
        TinyBody.from_pretrained(None, config=TinyConfig())
    with pytest.raises(ValueError, match="config"):
        TinyBody.from_pretrained(None, state_dict=tiny_state())
    with pytest.raises(ValueError, match="not both"):
        TinyBody.from_pretrained(tiny, device="cpu", device_map="cpu")
    with pytest.raises(ValueError, match="GGUF"):
        TinyBody.from_pretrained(tiny, gguf_file="x.gguf")

    class Bare(PreTrainedModel):
        """A class that does not say what its configuration is."""

    with pytest.raises(ValueError, match="config_class"):
        Bare.from_pretrained(tiny)


def test_a_configuration_that_is_given_is_copied(tiny: Path) -> None:
    """The caller's object stays as it was; the rest of the arguments goes to the constructor."""
    config = TinyConfig()
    model = TinyBody.from_pretrained(tiny, config=config, dtype="float16", scale=3.0)
    assert model.config is not config
    assert config.dtype is None
    assert model.scale == 3.0
    assert TinyBody.from_pretrained(tiny, config=str(tiny / "config.json")).config.size == 4


def test_documented_and_former_arguments_are_accepted(tiny: Path) -> None:
    """What transformers takes and this loader has no use for changes nothing."""
    model = TinyBody.from_pretrained(
        tiny,
        proxies=None,
        trust_remote_code=True,
        low_cpu_mem_usage=True,
        weights_only=False,
        use_safetensors=True,
        force_download=True,
        token=None,
        attn_implementation="eager",
        output_hidden_states=True,
        _from_auto=True,
    )
    assert model.config.output_hidden_states is True
    assert model.config._attn_implementation == "eager"


def test_a_generation_config_comes_along(tmp_path: Path) -> None:
    """generation_config.json is read where the model can generate."""
    theirs_saved(tmp_path, "LlamaForCausalLM")
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7, "do_sample": true}')
    model = llama.LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config.do_sample is True
