"""from_pretrained of quantized files: the plain values, under plain names, in bounded memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.models import AutoModel, AutoModelForCausalLM
from ckptd.models.backed import BackedModel
from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.loading import placing
from ckptd.models.native.llama import LlamaForCausalLM, LlamaModel
from ckptd.plan import evaluate, fill_decoded
from ckptd.quant import registry
from ckptd.quant import stored as quant_stored
from tests.models.loading import quantized_files
from tests.models.loading.quantized_files import FP8, INT8, in_shards, llama_config, written

BOTH = "output_loading_info"
DATA = Path(__file__).parents[2] / "data" / "quant"
"""Real folders of the real libraries with their own dequantized values in reference.safetensors."""
Made = tuple[dict[str, Tensor], dict[str, Tensor]]


def fp8_folder(folder: Path, *, tied: bool = False, **changes: Any) -> tuple[Path, Made]:
    config = llama_config(tie_word_embeddings=tied)
    made = quantized_files.fp8(quantized_files.weights(config))
    return written(folder, made[0], config, FP8, **changes), made


def int8_folder(folder: Path) -> tuple[Path, Made]:
    config = llama_config()
    made = quantized_files.int8(quantized_files.weights(config))
    return written(folder, made[0], config, INT8), made


def in_dtype(plain: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in plain.items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def logits(model: Any) -> Tensor:
    ids = torch.arange(12).view(1, 12) % 90
    with torch.inference_mode():
        found = model(input_ids=ids).logits
    assert isinstance(found, Tensor)
    return found


# Values, names, dtypes


@pytest.mark.parametrize(
    "dtype", [None, "auto", "float16", torch.bfloat16, torch.float32, "float64"]
)
@pytest.mark.parametrize("make", [fp8_folder, int8_folder], ids=["fp8 blocks", "int8 rows"])
def test_values_are_computed_in_float32_and_rounded_once(
    make: Callable[[Path], tuple[Path, Made]], dtype: Any, tmp_path: Path
) -> None:
    """Every dtype holds the float32 product, rounded once; by default the config's dtype."""
    folder, (_, plain) = make(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **{BOTH: True})
    assert isinstance(model, LlamaForCausalLM)
    assert not any(info.values())
    wanted = {"auto": torch.bfloat16, None: torch.bfloat16}.get(
        dtype, getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    )
    assert_equal(model.state_dict(), in_dtype(plain, wanted))
    assert model.dtype == model.config.dtype == wanted


def test_a_config_without_a_dtype_gives_the_librarys(tmp_path: Path) -> None:
    """What the stage chooses by default is what a model is loaded in."""
    folder, (_, plain) = fp8_folder(tmp_path, dtype=None)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


def test_partners_in_two_files_are_one_weight(tmp_path: Path) -> None:
    """Weight and scale belong together over all shards."""
    folder, (stored, plain) = fp8_folder(tmp_path)
    model, info = LlamaForCausalLM.from_pretrained(in_shards(folder, stored), **{BOTH: True})
    assert not any(info.values())
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


def test_a_body_loads_from_a_head_model_without_a_trace_of_scales(tmp_path: Path) -> None:
    """Prefixes are matched on plain names; only the head is left over, never a scale."""
    folder, (_, plain) = fp8_folder(tmp_path)
    model, info = LlamaModel.from_pretrained(folder, **{BOTH: True})
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not info["missing_keys"]
    name = "layers.1.mlp.down_proj.weight"
    assert torch.equal(model.state_dict()[name], plain[f"model.{name}"].bfloat16())


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    """Ties hold as in a plain checkpoint, and count once."""
    folder, _ = fp8_folder(tmp_path, tied=True)
    model, info = PreTrainedModel.from_pretrained(folder, **{BOTH: True})
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_memory_footprint(return_buffers=False) == 2 * model.num_parameters()


def test_names_can_be_mapped(tmp_path: Path) -> None:
    """key_mapping sees plain names, those that decoding gives."""
    config = llama_config()
    stored, plain = quantized_files.fp8(quantized_files.weights(config))
    renamed = {name.replace("model.", "trunk."): value for name, value in stored.items()}
    written(tmp_path, renamed, config, FP8)
    model, info = LlamaForCausalLM.from_pretrained(
        tmp_path, key_mapping={r"^trunk\.(.*weight)$": r"model.\1"}, **{BOTH: True}
    )
    assert not any(info.values())
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


def test_shapes_are_compared_as_they_will_be_decoded(tmp_path: Path) -> None:
    """A mismatch names both plain shapes before anything is decoded, or gives new values."""
    folder, _ = fp8_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"up_proj.*\(144, 160\).*\(100, 160\)"):
        LlamaForCausalLM.from_pretrained(folder)
    _, info = LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, **{BOTH: True})
    assert len(info["mismatched_keys"]) == 6


def test_a_variant_is_decoded(tmp_path: Path) -> None:
    """The plain files of the folder stay plain, its quantized variant is decoded."""
    config = llama_config()
    state = quantized_files.weights(config)
    stored, plain = quantized_files.fp8(state)
    written(tmp_path, state, config, None)
    written(tmp_path, stored, config, FP8, file="model.fp8.safetensors")
    variant = LlamaForCausalLM.from_pretrained(tmp_path, variant="fp8")
    assert_equal(variant.state_dict(), in_dtype(plain, torch.bfloat16))
    assert_equal(LlamaForCausalLM.from_pretrained(tmp_path).state_dict(), state)


def test_a_weight_file_can_be_named_itself(tmp_path: Path) -> None:
    """How it is quantized stands in the config.json beside it."""
    folder, (_, plain) = fp8_folder(tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder / "model.safetensors")
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


def test_a_config_that_says_nothing_does_not_hide_what_the_files_are(tmp_path: Path) -> None:
    """The config.json beside the weights says how they are quantized, whatever is given."""
    folder, (_, plain) = fp8_folder(tmp_path)
    config = LlamaForCausalLM.config_class.from_pretrained(folder)
    del config.quantization_config
    model = LlamaForCausalLM.from_pretrained(folder, config=config)
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


@pytest.mark.parametrize(
    "case",
    sorted(p.name for p in DATA.iterdir() if (p / "reference.safetensors").is_file())
    if DATA.is_dir()
    else [],
)
def test_real_folders_load_with_the_librarys_values(case: str, tmp_path: Path) -> None:
    """Each weight is the library's, but for the rounding of its arithmetic and its dtype."""
    if not (DATA / case / "config.json").is_file() or list((DATA / case).glob("*.gguf")):
        pytest.skip("no safetensors folder")
    folder = tmp_path / case
    shutil.copytree(DATA / case, folder, ignore=shutil.ignore_patterns("reference.*"))
    reference = load_file(DATA / case / "reference.safetensors")
    config = PreTrainedConfig.from_pretrained(folder)
    model, info = BackedModel.from_pretrained(
        folder, config=config, dtype=torch.float32, **{BOTH: True}
    )
    assert not any(info.values())
    assert model.dequantized_from is not None
    state = model.state_dict()
    for name, value in reference.items():
        assert state[name].dtype == torch.float32
        # Some libraries round to 8 bits of mantissa two or three times, before they subtract.
        scale = float(value.float().abs().max())
        torch.testing.assert_close(
            state[name], value.float(), rtol=2**-6, atol=2**-8 * scale, msg=name
        )


# transformers


def test_values_and_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """Where transformers dequantizes FP8 rightly, our model is its model."""
    config = llama_config(hidden_size=256, intermediate_size=384)
    stored, _ = quantized_files.fp8(quantized_files.weights(config))
    folder = written(tmp_path, stored, config, FP8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    ours = LlamaForCausalLM.from_pretrained(folder)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=2**-7, atol=0)
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=0.05, atol=0.02)


def test_a_save_loads_and_runs_in_transformers(tmp_path: Path) -> None:
    """The folder is plain, its config too, and the logits are equal; here a save of theirs breaks."""
    folder, _ = fp8_folder(tmp_path / "a")
    ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours.save_pretrained(tmp_path / "b")
    content = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "quantization_config" not in content
    assert content["dtype"] == "float32"
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", **{BOTH: True})
    assert not any(info.values())
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-5, atol=1e-6)


def test_a_save_over_the_quantized_folder_leaves_nothing_of_it(tmp_path: Path) -> None:
    """No packed file and no description of the quantization stays beside plain weights."""
    folder, (stored, _) = fp8_folder(tmp_path)
    in_shards(folder, stored)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    (folder / "notes.json").write_text("{}")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "notes.json",
    }  # fmt: skip
    again = LlamaForCausalLM.from_pretrained(folder)
    assert again.dequantized_from is None


# dequantize()


def test_dequantize_of_what_was_decoded_returns_the_model(tmp_path: Path) -> None:
    """Nothing is left to do: it is the same model, and it knows where it came from."""
    folder, (_, plain) = fp8_folder(tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dequantize() is model
    assert model.dequantized_from
    assert not hasattr(model.config, "quantization_config")
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


def test_dequantize_to_a_dtype_casts_all_and_says_so(tmp_path: Path) -> None:
    """Parameters stay the same objects, ties hold, rotary frequencies keep their precision."""
    folder, (_, plain) = fp8_folder(tmp_path / "a", tied=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    before = dict(model.named_parameters())
    frequencies = [buffer.clone() for buffer in model.buffers()]
    assert model.dequantize(torch.float32) is model
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == model.config.dtype == torch.float32
    for name, value in plain.items():
        assert torch.equal(model.state_dict()[name], value.bfloat16().float())
    assert all(map(torch.equal, frequencies, model.buffers()))
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"


def test_a_model_that_was_never_quantized_refuses(tmp_path: Path) -> None:
    """As transformers says it; also one that was saved plain and loaded again."""
    folder, _ = fp8_folder(tmp_path / "a")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    for model in (
        LlamaForCausalLM.from_pretrained(tmp_path / "b"),
        LlamaForCausalLM(LlamaForCausalLM.config_class(**quantized_files.SMALL)),
    ):
        with pytest.raises(ValueError, match="first quantize your model"):
            model.dequantize()


# Arguments and refusals


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "fp8", "dequantize": True},
        transformers.FineGrainedFP8Config(dequantize=True),
        transformers.Mxfp4Config(dequantize=True),
    ],
    ids=["mapping", "fp8", "mxfp4"],
)
def test_a_request_to_dequantize_is_what_is_done_anyway(said: Any, tmp_path: Path) -> None:
    """The argument that transformers needs is taken."""
    folder, (_, plain) = fp8_folder(tmp_path)
    for cls in (LlamaForCausalLM, AutoModelForCausalLM, PreTrainedModel):
        model = cls.from_pretrained(folder, quantization_config=said)
        assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))


@pytest.mark.parametrize(
    "said",
    [{"load_in_4bit": True}, {"dequantize": False}, transformers.FineGrainedFP8Config()],
    ids=["mapping", "not", "fp8"],
)
def test_a_request_to_quantize_is_refused(said: Any, tmp_path: Path) -> None:
    """It says that nothing is quantized here, and what to leave out."""
    folder, _ = fp8_folder(tmp_path)
    with pytest.raises(ValueError, match=r"nothing is quantized.*leave it out"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=said)


def test_a_state_dictionary_of_plain_values_is_taken(tmp_path: Path) -> None:
    """The configuration then says nothing of quantization; packed tensors are refused by name."""
    folder, (stored, plain) = fp8_folder(tmp_path)
    config = LlamaForCausalLM.config_class.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=plain)
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))
    assert model.dequantized_from is None
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match=r"state_dict.*float8_e4m3fn"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=stored)


def test_a_method_that_is_not_decoded_is_refused_as_by_the_stage(tmp_path: Path) -> None:
    """An OSError with the text that the pipeline has, before a byte is read."""
    config = llama_config()
    folder = written(tmp_path, quantized_files.weights(config), config, {"quant_method": "vptq"})
    view = quant_stored.of_checkpoint(checkpoint.open_checkpoint(folder))
    with pytest.raises(errors.CheckpointUnsupported) as expected:
        registry.choose(view)
    with pytest.raises(OSError, match="vptq") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_an_oserror(value: float, tmp_path: Path) -> None:
    """The weight is named, and no model comes out."""
    folder, (stored, _) = fp8_folder(tmp_path)
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] = value
    written(folder, stored, llama_config(), FP8)
    with pytest.raises(OSError, match=r"layers\.1\.mlp\.up_proj"):
        LlamaForCausalLM.from_pretrained(folder)


def test_values_beyond_float16_are_a_valueerror(tmp_path: Path) -> None:
    """The checkpoint is well, the dtype asked for is not; the weight is named."""
    folder, (stored, _) = fp8_folder(tmp_path)
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"].fill_(1e6)
    written(folder, stored, llama_config(), FP8)
    assert LlamaForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        LlamaForCausalLM.from_pretrained(folder, dtype="float16")


def test_a_missing_scale_is_an_oserror_that_names_it(tmp_path: Path) -> None:
    """Codes without their scale are never taken for values."""
    folder, (stored, _) = fp8_folder(tmp_path)
    del stored["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    written(folder, stored, llama_config(), FP8)
    with pytest.raises(OSError, match=r"layers\.0\.self_attn\.q_proj"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_file_that_changes_before_it_is_decoded_is_an_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half of one checkpoint and half of another."""
    folder, (stored, _) = fp8_folder(tmp_path)
    decode = fill_decoded.fill

    def replacing(*args: Any, **kwargs: Any) -> None:
        written(folder, stored, llama_config(), FP8)
        decode(*args, **kwargs)

    monkeypatch.setattr(placing.fill_decoded, "fill", replacing)
    with pytest.raises(OSError, match="changed while it was read"):
        LlamaForCausalLM.from_pretrained(folder)


# Architectures without a module


def test_an_unknown_architecture_is_decoded_too(tmp_path: Path) -> None:
    """Its modules follow the plain names; it is resized, saved, and read by transformers."""
    torch.manual_seed(0)
    original = transformers.StableLmForCausalLM(
        transformers.StableLmConfig(**quantized_files.SMALL, tie_word_embeddings=False)
    ).to(torch.bfloat16)
    stored, plain = quantized_files.fp8(original.state_dict())
    written(tmp_path / "a", stored, original.config, FP8, architectures=["StableLmForCausalLM"])
    model, info = AutoModel.from_pretrained(tmp_path / "a", **{BOTH: True})
    assert isinstance(model, BackedModel)
    assert not any(info.values())
    assert_equal(model.state_dict(), in_dtype(plain, torch.bfloat16))
    assert model.dequantize(torch.float32).dtype == torch.float32
    assert model.resize_token_embeddings(128).weight.shape == (128, 160)
    model.save_pretrained(tmp_path / "b")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", **{BOTH: True})
    assert not any(info.values())
    assert theirs.dtype == torch.float32
    assert torch.isfinite(logits(theirs)).all()


# Memory


def test_memory_beyond_the_parameters_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large a weight, what is read at once is a few blocks, and torch's threads come back."""
    config = llama_config(hidden_size=2048, intermediate_size=32768, num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {
        name: torch.zeros(32768, 2048, dtype=torch.uint8).view(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.ones(256, 16),
    }
    written(tmp_path, stored, config, FP8, architectures=["OtherForCausalLM"], model_type="other")
    taken = []
    allocate = evaluate._private_memory

    def counted(capacity: int) -> Tensor:
        taken.append(capacity)
        return allocate(capacity)

    monkeypatch.setattr(evaluate, "_private_memory", counted)
    before = torch.get_num_threads()
    model = AutoModel.from_pretrained(tmp_path)
    assert model.num_parameters() == 32768 * 2048
    assert sum(taken) <= 32 << 20 < 64 << 20
    assert torch.get_num_threads() == before
