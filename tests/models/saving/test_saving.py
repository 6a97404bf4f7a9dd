"""Saving: the folder that transformers makes and reads, without what it gets wrong."""

from __future__ import annotations

import importlib
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ckptd.checkpoint import header, writer
from ckptd.models import backed
from ckptd.models.saving import name_order, saved_files, saving, weight_bytes

ROWS, WIDTH = 96, 32
LLAMA: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(LLAMA | options))
    return transformers.LlamaForCausalLM(config).eval()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def reload(folder: Path, kind: Any = transformers.LlamaForCausalLM, **options: Any) -> Any:
    """Load with transformers; nothing may be missing, unexpected or mismatched."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    return model


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


# Against transformers


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("size", ["50GB", "60KB", 20_000])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_folder_is_that_of_transformers(
    tmp_path: Path, options: dict[str, Any], size: str | int, *, loaded: bool
) -> None:
    """Same file names, same tensors in each, same index and same config as transformers writes."""
    model = llama(**options)
    if loaded:
        model.save_pretrained(tmp_path / "first")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "first")
        model._is_loaded_from_checkpoint = True
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    saving.save(model, tmp_path / "ours", max_shard_size=size)
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        ours = tmp_path / "ours" / path.name
        if path.suffix == ".json":
            assert json.loads(ours.read_text()) == json.loads(path.read_text()), path.name
            continue
        assert_same(load_file(ours), load_file(path))
        order = [tensor.spec.name for tensor in header.read(path).tensors]
        assert [tensor.spec.name for tensor in header.read(ours).tensors] == order
        with safe_open(ours, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert_same(reload(tmp_path / "ours").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("model_name", "config_name", "options"),
    [
        (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4},
        ),
        (
            "BertForMaskedLM",
            "BertConfig",
            {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"intermediate_size": 48},
        ),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
            | {"num_heads": 4, "decoder_start_token_id": 0},
        ),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_families_save_alike(
    tmp_path: Path, model_name: str, config_name: str, options: dict[str, Any], *, tied: bool
) -> None:
    """Heads, biases and shared embeddings: the same names in the same shards as transformers."""
    config = getattr(transformers, config_name)(**options, tie_word_embeddings=tied)
    model = getattr(transformers, model_name)(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    saving.save(model, tmp_path / "ours", max_shard_size="20KB")
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        assert_same(load_file(tmp_path / "ours" / path.name), load_file(path))
    assert_same(reload(tmp_path / "ours", type(model)).state_dict(), model.state_dict())


NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", LLAMA),
    "GPTNeoXForCausalLM": ("gpt_neox", {n: v for n, v in LLAMA.items() if "key" not in n}),
    "ViTForImageClassification": (
        "vit",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 11}
        | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
    ),
    "T5ForConditionalGeneration": (
        "t5",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_native_models_save_what_transformers_saves(tmp_path: Path, name: str) -> None:
    """Fresh and loaded, a native model's folder has the index and the config of transformers'."""
    model_type, options = NATIVE[name]
    native = getattr(importlib.import_module(f"ckptd.models.native.{model_type}"), name)
    kind = getattr(transformers, name)
    original = kind(kind.config_class(**options)).eval()
    original.save_pretrained(tmp_path / "fresh theirs", max_shard_size="30KB")
    native(native.config_class(**options)).save_pretrained(
        tmp_path / "fresh ours", max_shard_size="30KB"
    )
    loaded = kind.from_pretrained(tmp_path / "fresh theirs")
    loaded.save_pretrained(tmp_path / "loaded theirs", max_shard_size="30KB")
    ours = native.from_pretrained(tmp_path / "fresh theirs")
    ours.save_pretrained(tmp_path / "loaded ours", max_shard_size="30KB")
    for which in ("fresh", "loaded"):
        for theirs in (tmp_path / f"{which} theirs").glob("*.json"):
            mine = tmp_path / f"{which} ours" / theirs.name
            one, other = json.loads(mine.read_text()), json.loads(theirs.read_text())
            if theirs.name == "generation_config.json":
                other.pop("transformers_version", None)
                one.pop("transformers_version", None)
            assert one == other, mine
    again = reload(tmp_path / "loaded ours", kind)
    assert_same(again.state_dict(), original.state_dict())
    back = native.from_pretrained(tmp_path / "loaded ours")
    assert_same(dict(back.state_dict()), dict(ours.state_dict()))


# Ties


def test_shared_memory_with_an_untied_flag_is_written_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Config untied, storage shared: both names are there and a reload finds nothing missing."""
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    saving.save(model, tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= stored(tmp_path).keys()
    assert_same(reload(tmp_path).state_dict(), model.state_dict())
    assert "share memory" in caplog.text


def test_tied_names_with_different_values_untie_the_saved_config(tmp_path: Path) -> None:
    """Flag tied, values apart: both are saved, the file says untied, the live model is as it was."""
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn(ROWS, WIDTH))
    saving.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert model.config.tie_word_embeddings is True
    assert_same(reload(tmp_path).state_dict(), model.state_dict())


def test_a_diverged_head_writes_every_tied_name(tmp_path: Path) -> None:
    """Where one tie of a model is off, none is relied upon: T5's three embeddings are all there."""
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.randn(99, 32))
    saving.save(model, tmp_path)
    kind = transformers.T5ForConditionalGeneration
    assert_same(reload(tmp_path, kind).state_dict(), model.state_dict())


def test_copies_of_a_tied_weight_keep_the_flag(tmp_path: Path) -> None:
    """A gathered state dict holds equal values apart in memory: the model is still tied."""
    model = llama(tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saving.save(model, tmp_path, state_dict=state)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    assert_same(reload(tmp_path).state_dict(), model.state_dict())


def test_a_target_without_its_source_is_kept(tmp_path: Path) -> None:
    """A partial state dict with only the tied name keeps it."""
    model = llama(tie_word_embeddings=True)
    saving.save(model, tmp_path, state_dict={"lm_head.weight": model.lm_head.weight})
    assert list(stored(tmp_path)) == ["lm_head.weight"]


def test_undeclared_overlaps_are_written_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names that overlap in memory, which transformers refuses, keep their own values."""
    base = torch.arange(40.0)
    state = {"a": base[:20], "b": base[10:30], "c": base[30:], "d": base[30:], "e": base[::2]}
    saving.save(llama(), tmp_path, state_dict=state)
    assert_same(stored(tmp_path), {name: tensor.clone() for name, tensor in state.items()})
    assert "a, b, c, d, e share memory" in caplog.text or "share memory" in caplog.text


def test_disjoint_views_are_no_sharing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Views of one buffer that do not meet are written without a word."""
    base = torch.arange(40.0)
    state = {"a": base[:20], "b": base[20:]}
    saving.save(llama(), tmp_path, state_dict=state)
    assert_same(stored(tmp_path), state)
    assert not caplog.records


# Values


def test_every_kind_of_tensor_is_written_right(tmp_path: Path) -> None:
    """Strided, expanded, conjugated, empty and zero-dimensional tensors of many types."""
    grid = torch.arange(24, dtype=torch.int64).reshape(4, 6)
    state = {
        "transposed": grid.t(),
        "strided": grid[::2, 1::2],
        "expanded": torch.tensor([1.5, 2.5]).expand(3, 2),
        "conjugate": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj(),
        "negative": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
        "one": torch.tensor([[1.0, 2.0]])[:, 1:],
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(3, dtype=torch.bfloat16),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn).view(torch.uint8).view(torch.float8_e4m3fn),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    saving.save(llama(), tmp_path, state_dict=state)
    found = stored(tmp_path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape
        raw = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        raw = raw.reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), raw), name


@pytest.mark.parametrize("piece", [64, 1000, 4096])
def test_pieces_cover_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """However small a piece is, large and small, dense and strided tensors arrive whole."""
    monkeypatch.setattr(weight_bytes, "PIECE_BYTES", piece)
    state = {
        "large": torch.randn(37, 53),
        "turned": torch.randn(5, 41, 3).permute(2, 0, 1),
        "halves": torch.randn(41, 23).to(torch.float16).t(),
        "bytes": torch.randint(0, 255, (1, 333), dtype=torch.uint8)[:, ::2],
    }
    state |= {f"small.{i}": torch.randn(i % 5, 3) for i in range(700)}
    saving.save(llama(), tmp_path, state_dict=state)
    assert_same(stored(tmp_path), state)


def test_writes_that_the_kernel_shortens_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vectored write that takes only some bytes is continued where it stopped."""
    real = os.pwritev

    def short(fd: int, parts: list[memoryview], offset: int) -> int:
        return real(fd, [parts[0][: max(1, len(parts[0]) // 2)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    model = llama(num_hidden_layers=1)
    saving.save(model, tmp_path)
    assert_same(stored(tmp_path), dict(model.state_dict()))


def test_keys_to_ignore_on_save_and_other_objects_are_left_out(tmp_path: Path) -> None:
    """Names the class does not save, and entries that are no tensors, are not in the file."""
    model = llama()
    model._keys_to_ignore_on_save = [r"model\.layers\..*", "lm_head.weight"]
    state = dict(model.state_dict()) | {"note": "a text"}
    saving.save(model, tmp_path, state_dict=state)
    assert stored(tmp_path).keys() == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "not dense"),
    ],
)
def test_tensors_without_plain_bytes_are_refused(
    tmp_path: Path, tensor: torch.Tensor, what: str
) -> None:
    """What cannot be written without a guess is named, before anything is touched."""
    with pytest.raises(RuntimeError, match=rf"'x'.*{what}"):
        saving.save(llama(), tmp_path / "new", state_dict={"x": tensor})
    assert not (tmp_path / "new").exists()


# Configuration


def test_dtype_and_architecture_are_noted(tmp_path: Path) -> None:
    """The config says the first floating parameter's dtype and the class, without FSDP's prefix."""
    model = llama().to(torch.bfloat16)
    model.lm_head.to(torch.float32)
    model.__class__ = type("FSDPLlamaForCausalLM", (type(model),), {})
    saving.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_backed_model_keeps_the_architecture(tmp_path: Path) -> None:
    """What stands in for another class is saved under that class's name, and loads as it."""
    config = transformers.BloomConfig(vocab_size=99, n_layer=2, hidden_size=32, n_head=4)
    original = transformers.BloomForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    backed.BackedModel.from_pretrained(tmp_path / "theirs").save_pretrained(
        tmp_path / "ours", max_shard_size="20KB"
    )
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [
        "BloomForCausalLM"
    ]
    again = reload(tmp_path / "ours", transformers.BloomForCausalLM)
    assert_same(again.state_dict(), original.state_dict())


def test_only_models_that_generate_save_a_generation_config(tmp_path: Path) -> None:
    """The base model has none."""
    model = llama()
    saving.save(model, tmp_path / "head")
    saving.save(model.model, tmp_path / "base")
    assert "generation_config.json" in names(tmp_path / "head")
    assert "generation_config.json" not in names(tmp_path / "base")


def test_custom_code_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered class leaves its module, and what that imports beside itself, in the folder."""
    package = tmp_path / "custom_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "other.py").write_text("SIZE = 3\n")
    (package / "part.py").write_text("from .other import SIZE\n")
    (package / "configuration_custom.py").write_text(
        "from transformers import LlamaConfig\n"
        "class CustomConfig(LlamaConfig):\n    _auto_class = 'AutoConfig'\n"
    )
    (package / "modeling_custom.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .part import SIZE\n"
        "from .configuration_custom import CustomConfig\n"
        "class Custom(LlamaForCausalLM):\n    _auto_class = 'AutoModelForCausalLM'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from custom_package.modeling_custom import (  # type: ignore[import-not-found]
        Custom,
        CustomConfig,
    )

    saving.save(Custom(CustomConfig(**LLAMA)), tmp_path / "saved")
    code = {"modeling_custom.py", "configuration_custom.py", "part.py", "other.py"}
    assert code <= names(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.Custom",
    }
    for name in [name for name in sys.modules if name.startswith("custom_package")]:
        del sys.modules[name]


# The folder


def test_a_file_in_the_way_is_logged_and_nothing_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A path that is a file: an error in the log, None, the file as it was."""
    path = tmp_path / "file"
    path.write_text("mine")
    with caplog.at_level(logging.ERROR):
        saving.save(llama(), path)
    assert "is a file" in caplog.text
    assert path.read_text() == "mine"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    """`is_main_process=False` returns without a folder."""
    saving.save(llama(), tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_stale_weights_go_and_everything_else_stays(tmp_path: Path) -> None:
    """Three shards, then one file, then two: each save leaves exactly its own weight files."""
    model = llama()
    kept = {"notes.txt", "model.fp16.safetensors", "model.safetensors.index.fp16.json"}
    for name in kept:
        (tmp_path / name).write_text("{}")
    for size in ("60KB", "50GB", "120KB", "50GB"):
        saving.save(model, tmp_path / "fresh" / size, max_shard_size=size)
        saving.save(model, tmp_path, max_shard_size=size)
        assert names(tmp_path) - kept - {"fresh"} == names(tmp_path / "fresh" / size)
        assert_same(reload(tmp_path).state_dict(), model.state_dict())


def test_variants_live_side_by_side(tmp_path: Path) -> None:
    """Each variant has its names, and saving one leaves the other's files alone."""
    one, two = llama(), llama()
    saving.save(one, tmp_path)
    saving.save(two.half(), tmp_path, variant="fp16", max_shard_size="60KB")
    found = names(tmp_path)
    assert "model.safetensors" in found
    assert "model.safetensors.index.fp16.json" in found
    assert any(name.startswith("model.fp16-00001-of-") for name in found)
    saving.save(two, tmp_path, variant="fp16")
    assert not any(name.startswith("model.fp16-0") for name in names(tmp_path))
    assert "model.safetensors.index.fp16.json" not in names(tmp_path)
    again = reload(tmp_path, variant="fp16", dtype=torch.float16)
    assert_same(again.state_dict(), two.state_dict())


def test_nothing_to_write_is_no_weight_file(tmp_path: Path) -> None:
    """Zero tensors leave no weight file, also where an earlier save had some."""
    saving.save(llama(), tmp_path, max_shard_size="60KB")
    saving.save(llama(), tmp_path, state_dict={})
    assert names(tmp_path) == {"config.json", "generation_config.json"}


def test_modes_come_from_the_umask(tmp_path: Path) -> None:
    """No file is closed to others unless the umask says so."""
    before = os.umask(0o022)
    try:
        saving.save(llama(), tmp_path, max_shard_size="60KB")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("size", ["1 gib", "0.5GiB", "1.5MB", 10**6, "1000000", None])
def test_sizes_may_be_written_many_ways(tmp_path: Path, size: int | str | None) -> None:
    """Binary units and bare numbers, which the original refuses, are sizes."""
    saving.save(llama(num_hidden_layers=1), tmp_path, max_shard_size=size)
    assert "model.safetensors" in names(tmp_path)


@pytest.mark.parametrize("size", ["much", "5 parsecs", "-3GB", -1])
def test_what_is_no_size_is_refused(tmp_path: Path, size: int | str) -> None:
    """ValueError, and no folder."""
    with pytest.raises(ValueError, match="size"):
        saving.save(llama(), tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_saving_over_the_files_a_model_was_loaded_from(tmp_path: Path) -> None:
    """Tensors mapped from the very file that is replaced keep their values."""
    model = llama()
    saving.save(model, tmp_path)
    mapped = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    saving.save(mapped, tmp_path)
    assert_same(reload(tmp_path).state_dict(), model.state_dict())


# Killed half-way


class Killed(BaseException):
    """Stands for the process's end: nothing after it runs but what the test allows."""


def _deeds(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[str]:
    """Let the save die at its `limit`-th change of the folder, without cleaning up."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def deed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(done) >= limit:
                raise Killed
            done.append(name)
            return real(self, *args, **kwargs)

        return deed

    for name in ("finish", "sync", "open"):
        real = getattr(writer.ShardWriter, name)
        monkeypatch.setattr(writer.ShardWriter, name, counted(name, real))
    monkeypatch.setattr(Path, "unlink", counted("unlink", Path.unlink))
    monkeypatch.setattr(writer.ShardWriter, "abandon", lambda self: None)
    return done


@pytest.mark.parametrize(("old", "new"), [("30KB", "1GB"), ("1GB", "30KB"), ("30KB", "50KB")])
def test_a_kill_never_leaves_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    """Whenever it is killed, the folder holds the earlier save, the new one, or does not load."""
    first, second = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    states = [dict(model.state_dict()) for model in (first, second)]
    seen = set()
    for limit in range(1000):
        folder = tmp_path / str(limit)
        saving.save(first, folder, max_shard_size=old)
        with monkeypatch.context() as patch:
            _deeds(patch, limit)
            try:
                saving.save(second, folder, max_shard_size=new)
                killed = False
            except Killed:
                killed = True
        seen.add(_outcome(folder, states))
        saving.save(second, folder, max_shard_size=new)
        assert _outcome(folder, states) == 1
        assert not list(folder.glob(f"{writer.TEMPORARY_PREFIX}*"))
        if not killed:
            break
    assert seen == {0, 1, None}


def _outcome(folder: Path, states: list[dict[str, torch.Tensor]]) -> int | None:
    """Return which of `states` the folder holds for a loader; None when it does not load."""
    if (folder / "model.safetensors").exists():
        found = load_file(folder / "model.safetensors")
    elif (folder / "model.safetensors.index.json").exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        found = {}
        for name in sorted(set(index["weight_map"].values())):
            found |= load_file(folder / name)
    else:
        return None
    for number, state in enumerate(states):
        if found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state):
            return number
    raise AssertionError("a mixture")


def test_a_failure_leaves_the_earlier_save_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that refuses half-way: the earlier save is as it was, temporary files are gone."""
    saving.save(llama(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.pwritev

    def failing(fd: int, parts: list[memoryview], offset: int) -> int:
        if sum(map(len, parts)) > 50_000:
            raise OSError(28, "No space left on device")
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(OSError, match="no space"):
        saving.save(llama(num_hidden_layers=3), tmp_path, max_shard_size="60KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_are_reported_when_they_are_complete(tmp_path: Path) -> None:
    """In a fresh folder: configuration, each shard once it stands, the index last."""
    told: list[str] = []

    def listen(path: Path) -> None:
        if path.suffix == ".safetensors":
            header.read(path)
            later = json.loads(json.dumps(sorted(names(tmp_path) - set(told) - {path.name})))
            assert not [name for name in later if name.startswith("model-")]
        told.append(path.name)

    with saved_files.reported(listen):
        saving.save(llama(), tmp_path, max_shard_size="60KB")
    assert set(told) == names(tmp_path)
    assert told[-1] == "model.safetensors.index.json"
    assert told[0] == "config.json"


# Adapters


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_attached_adapter_is_saved_as_peft_loads_it(tmp_path: Path) -> None:
    """Only the adapter's tensors, under PEFT's names, with its configuration; PEFT loads them."""
    peft = pytest.importorskip("peft")
    base = llama(num_hidden_layers=2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, llama(num_hidden_layers=2))
    model.peft_config = {"default": config}
    model.active_adapters = lambda: ["default"]
    saving.save(model, tmp_path)
    assert names(tmp_path) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
    }
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in found)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    theirs = peft.get_peft_model_state_dict(loaded)
    assert_same(found, dict(theirs))
    saving.save(model, tmp_path, save_peft_format=False)
    plain = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in plain} == set(found)


def test_several_active_adapters_are_refused(tmp_path: Path) -> None:
    """A folder holds one adapter."""
    model = llama(num_hidden_layers=1)
    model.peft_config = {"a": object(), "b": object()}
    model.active_adapters = lambda: ["a", "b"]
    with pytest.raises(ValueError, match="2 adapters are active"):
        saving.save(model, tmp_path)


def test_names_sort_by_their_parts() -> None:
    """Numbers count as numbers and stand before words."""
    given = ["model.layers.10.a", "model.layers.2.a", "lm_head.weight", "model.w10", "model.w9"]
    names = [*given, "model.3", "model.w"]
    assert name_order.ordered(names, model_type="", is_loaded=True) == [
        "lm_head.weight",
        "model.3",
        "model.layers.2.a",
        "model.layers.10.a",
        "model.w",
        "model.w9",
        "model.w10",
    ]
    assert name_order.ordered(names, model_type="", is_loaded=False) == names


@pytest.fixture(autouse=True)
def restored_modes() -> Iterator[None]:
    """Leave transformers' verbosity as it was."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
