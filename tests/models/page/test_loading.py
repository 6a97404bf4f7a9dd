"""`from_pretrained`, one row an argument and an edge, beside transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.page.sides import Side, agree, facts, files, info_of, saved, side

MODELS = ("user", "untied", "parts", "llama", "llama tied", "bert", "gpt2", "t5")
LLAMAS = ("llama", "llama tied")
FEW = ("user", "llama tied", "bert")
Prepare = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One call of `from_pretrained` on a folder that transformers saved and `prepare` changed.

    `call` takes the class, the folder and the side. `kinds` are tried. `better` is the exception that
    is documented here where transformers has none, or another.
    """

    call: Callable[[Any, Path, Side], Any] = lambda cls, folder, _: cls.from_pretrained(folder)
    kinds: tuple[str, ...] = FEW
    config: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] = field(default_factory=dict)
    prepare: Prepare = lambda _: None
    better: type[Exception] | None = None


def with_(**options: Any) -> Callable[[Any, Path, Side], Any]:
    """Return a call with these arguments."""
    return lambda cls, folder, _: cls.from_pretrained(folder, **options)


def info(**options: Any) -> Callable[[Any, Path, Side], Any]:
    """Return a call that gives the loading information, too."""
    return lambda cls, folder, _: cls.from_pretrained(folder, output_loading_info=True, **options)


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Prepare:
    """Return a preparation that changes the tensors of a single weight file."""

    def prepare(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return prepare


def config_file(**values: Any) -> Prepare:
    """Return a preparation that sets values of config.json; None removes one."""

    def prepare(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return prepare


def other_name(folder: Path) -> None:
    """Rename the weights, and say their name in the config."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    config_file(transformers_weights="other.safetensors")(folder)


def first(tensors: dict[str, torch.Tensor]) -> str:
    """Return the name of the first tensor with two dimensions."""
    return next(name for name, tensor in sorted(tensors.items()) if tensor.dim() == 2)


def drop_first(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first(tensors)]


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.not.there"] = torch.ones(3)


def shrink_first(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors)
    tensors[name] = tensors[name][:-1].clone()


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def halve(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


def truncate(name: str) -> Prepare:
    """Return a preparation that cuts the end off a file."""

    def prepare(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:-40])

    return prepare


def remove(name: str) -> Prepare:
    """Return a preparation that removes a file."""
    return lambda folder: [path.unlink() for path in folder.glob(name)].clear()


def into(subfolder: str) -> Prepare:
    """Return a preparation that moves all files into a sub-folder."""

    def prepare(folder: Path) -> None:
        inner = folder / subfolder
        inner.mkdir()
        for path in list(folder.iterdir()):
            if path.is_file():
                path.rename(inner / path.name)

    return prepare


def from_state(change: Callable[[dict[str, torch.Tensor]], None], **options: Any) -> Any:
    """Return a call with a state dictionary and a configuration instead of a name."""

    def call(cls: Any, folder: Path, this: Side) -> Any:
        state = load_file(folder / "model.safetensors")
        change(state)
        config = cls.config_class.from_pretrained(folder)
        return cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **options
        )

    return call


SHARDED = {"max_shard_size": "1KB"}
ROWS: dict[str, Row] = {
    "name: folder": Row(kinds=MODELS, call=info()),
    "name: text": Row(call=lambda cls, folder, _: cls.from_pretrained(str(folder))),
    "name: trailing slash": Row(call=lambda cls, folder, _: cls.from_pretrained(f"{folder}/")),
    "name: nowhere": Row(call=lambda cls, folder, _: cls.from_pretrained(folder / "nowhere")),
    # Only a class whose defaults are small: transformers takes them where there is no config.json.
    "name: no config": Row(kinds=("user",), prepare=remove("config.json"), better=OSError),
    "name: no weights": Row(prepare=remove("model.safetensors")),
    "name: none": Row(
        call=lambda cls, _, __: cls.from_pretrained(None, local_files_only=True), better=ValueError
    ),
    "name: sharded": Row(kinds=MODELS, save=SHARDED, call=info()),
    "name: missing shard": Row(save=SHARDED, prepare=remove("model-00001-of-*.safetensors")),
    "name: cut off": Row(prepare=truncate("model.safetensors"), better=OSError),
    "name: cut off shard": Row(
        save=SHARDED, prepare=truncate("model-00001-of-*.safetensors"), better=OSError
    ),
    "name: no weight file at all": Row(prepare=weights(empty), better=OSError),
    "name: a tensor is missing": Row(
        kinds=("untied", "llama"),
        prepare=weights(drop_first),
        call=lambda cls, folder, _: info_of(cls.from_pretrained(folder, output_loading_info=True)),
    ),
    "name: config.json is no JSON": Row(
        prepare=lambda folder: (
            (folder / "config.json").write_text("{")  # type: ignore[arg-type]
            and None
        )
    ),
    "model_args: positional": Row(
        kinds=("user",), call=lambda cls, folder, _: cls.from_pretrained(folder, 3.0)
    ),
    "kwargs: for the constructor": Row(kinds=("user",), call=with_(gain=2.0)),
    "kwargs: of the configuration": Row(kinds=("user", "bert"), call=with_(num_labels=5)),
    "kwargs: of nothing": Row(call=with_(nonsense=1)),
    "config: object": Row(
        call=lambda cls, folder, _: cls.from_pretrained(
            folder, config=cls.config_class.from_pretrained(folder, num_labels=7)
        )
    ),
    "config: folder": Row(
        call=lambda cls, folder, _: cls.from_pretrained(folder, config=str(folder))
    ),
    "config: file": Row(
        call=lambda cls, folder, _: cls.from_pretrained(folder, config=folder / "config.json")
    ),
    "config: object and a value": Row(
        kinds=("user",),
        call=lambda cls, folder, _: cls.from_pretrained(
            folder, config=cls.config_class.from_pretrained(folder), gain=2.0
        ),
    ),
    "config: nowhere": Row(call=with_(config="/nowhere/at/all")),
    "cache_dir: beside a folder": Row(call=with_(cache_dir="/nowhere")),
    "ignore_mismatched_sizes: false": Row(prepare=weights(shrink_first)),
    "ignore_mismatched_sizes: true": Row(
        kinds=("user", "llama", "llama tied", "bert"),
        prepare=weights(shrink_first),
        call=lambda cls, folder, _: info_of(
            cls.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
        ),
    ),
    "ignore_mismatched_sizes: shrunk": Row(
        kinds=("llama", "bert"),
        prepare=config_file(vocab_size=20),
        call=lambda cls, folder, _: info_of(
            cls.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
        ),
    ),
    "force_download: true": Row(call=with_(force_download=True)),
    "local_files_only: true": Row(call=with_(local_files_only=True)),
    "local_files_only: nowhere": Row(
        call=lambda cls, folder, _: cls.from_pretrained(
            "no-one/nothing", local_files_only=True, cache_dir=folder / "cache"
        )
    ),
    "token: text": Row(call=with_(token="hf_x")),
    "token: false": Row(call=with_(token=False)),
    "revision: pull request": Row(call=with_(revision="refs/pr/3")),
    "revision: commit": Row(call=with_(revision="a" * 40)),
    "use_safetensors: true": Row(call=with_(use_safetensors=True)),
    "use_safetensors: false": Row(call=with_(use_safetensors=False)),
    "use_safetensors: true without": Row(
        prepare=remove("model.safetensors"), call=with_(use_safetensors=True)
    ),
    "weights_only: false": Row(call=with_(weights_only=False)),
    "output_loading_info: false": Row(call=with_(output_loading_info=False)),
    "output_loading_info: unexpected": Row(kinds=MODELS, prepare=weights(add_one), call=info()),
    "output_loading_info: base model": Row(
        kinds=("user", "llama", "gpt2"),
        call=lambda cls, folder, this: (
            type(this.model("llama").model)
            and type(cls(cls.config_class.from_pretrained(folder)).base_model).from_pretrained(
                folder, output_loading_info=True
            )
        ),
    ),
    "dtype: none": Row(kinds=MODELS, prepare=weights(halve), call=with_(dtype=None)),
    "dtype: auto": Row(kinds=MODELS, config={"dtype": "float16"}, call=with_(dtype="auto")),
    "dtype: auto without": Row(
        kinds=("user", "llama", "bert"),
        prepare=lambda folder: (
            [step(folder) for step in (weights(halve), config_file(dtype=None))]  # type: ignore[arg-type]
            and None
        ),
        call=with_(dtype="auto"),
    ),
    "dtype: torch.bfloat16": Row(kinds=MODELS, call=with_(dtype=torch.bfloat16)),
    "dtype: float16": Row(kinds=MODELS, call=with_(dtype="float16")),
    "dtype: float64": Row(call=with_(dtype=torch.float64)),
    "dtype: nonsense": Row(call=with_(dtype="nonsense")),
    "dtype: torch_dtype": Row(call=with_(torch_dtype=torch.float16)),
    "attn_implementation: eager": Row(kinds=MODELS, call=with_(attn_implementation="eager")),
    "attn_implementation: sdpa": Row(kinds=MODELS, call=with_(attn_implementation="sdpa")),
    "attn_implementation: nonsense": Row(call=with_(attn_implementation="nonsense")),
    "attn_implementation: flash_attention_2": Row(
        kinds=LLAMAS, call=with_(attn_implementation="flash_attention_2")
    ),
    "attn_implementation: flash_attention_3": Row(
        kinds=LLAMAS, call=with_(attn_implementation="flash_attention_3")
    ),
    "variant: fp16": Row(kinds=MODELS, save={"variant": "fp16"}, call=info(variant="fp16")),
    "variant: sharded": Row(save=SHARDED | {"variant": "fp16"}, call=info(variant="fp16")),
    "variant: not there": Row(call=with_(variant="fp16")),
    "variant: only that is there": Row(save={"variant": "fp16"}),
    "subfolder: inner": Row(prepare=into("inner"), call=info(subfolder="inner")),
    "subfolder: not there": Row(call=with_(subfolder="inner")),
    "state_dict: whole": Row(kinds=MODELS, call=from_state(lambda _: None)),
    "state_dict: missing": Row(
        kinds=("untied", "llama"),
        call=lambda cls, folder, this: info_of(from_state(drop_first)(cls, folder, this)),
    ),
    "state_dict: unexpected": Row(call=from_state(add_one)),
    "state_dict: mismatched": Row(call=from_state(shrink_first)),
    "state_dict: mismatched, ignored": Row(
        kinds=("user", "llama", "bert"),
        call=lambda cls, folder, this: info_of(
            from_state(shrink_first, ignore_mismatched_sizes=True)(cls, folder, this)
        ),
    ),
    "state_dict: half": Row(call=from_state(halve)),
    "state_dict: and a name": Row(call=with_(state_dict={})),
    "state_dict: without config": Row(
        call=lambda cls, _, __: cls.from_pretrained(None, state_dict={}, local_files_only=True),
        better=ValueError,
    ),
    "key_mapping: renames": Row(
        kinds=("llama",),
        prepare=weights(lambda t: t.update({f"old.{name}": t.pop(name) for name in list(t)})),
        call=info(key_mapping={"^old.": ""}),
    ),
    "trust_remote_code: true": Row(kinds=LLAMAS, call=with_(trust_remote_code=True)),
    "transformers_weights: named": Row(
        kinds=("llama",),
        prepare=other_name,
    ),
    "transformers_weights: outside": Row(
        kinds=("llama",), prepare=config_file(transformers_weights="../other.safetensors")
    ),
}


def comparable(result: Any) -> Any:
    """Return what can be compared of what a call gave."""
    if isinstance(result, tuple):
        return facts(result[0]), info_of(result)
    found = result if isinstance(result, dict) else facts(result)
    # Never saved; transformers takes it away at the next save, ours when it is described.
    found.get("config", {}).pop("transformers_weights", None)
    return found


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, row in ROWS.items() for kind in row.kinds]
)
def test_loading(name: str, kind: str, tmp_path: Path) -> None:
    """A call gives the same model, information or exception as in transformers."""
    row = ROWS[name]
    folder = saved(kind, tmp_path / "saved", row.config, **row.save)
    row.prepare(folder)
    agree(lambda this: comparable(row.call(this.cls(kind), folder, this)), better=row.better)


def test_a_call_changes_no_file(tmp_path: Path) -> None:
    """Loading leaves the folder as it was, to the byte."""
    folder = saved("llama", tmp_path / "saved")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    content = files(folder)
    side("ckptd").cls("llama").from_pretrained(folder, dtype="float16")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert files(folder).keys() == content.keys()
