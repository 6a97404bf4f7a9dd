"""`save_pretrained`, `add_model_tags` and `register_for_auto_class`, beside transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.page.sides import OURS, THEIRS, Side, agree, facts, files, filled, saved, side

MODELS = ("user", "untied", "parts", "llama", "llama tied", "bert", "gpt2", "t5")
FEW = ("user", "llama tied", "bert")


def nothing(model: Any) -> None:
    """Leave the model as it is."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One save of a model that `prepare` changed; `load` first takes it from a folder."""

    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = FEW
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = nothing
    loaded: bool = False
    better: type[Exception] | None = None


def halve(model: Any) -> None:
    model.half()


def mix(model: Any) -> None:
    """Give all but the first floating parameter another dtype."""
    for parameter in list(model.parameters())[1:]:
        parameter.data = parameter.data.to(torch.bfloat16)


def grow(model: Any) -> None:
    model.resize_token_embeddings(40)
    filled(model)


def shrink(model: Any) -> None:
    model.resize_token_embeddings(5)


def pad(model: Any) -> None:
    model.resize_token_embeddings(pad_to_multiple_of=16)
    filled(model)


def retie(model: Any) -> None:
    model.tie_weights()


ROWS: dict[str, Row] = {
    "save_directory: fresh": Row(kinds=MODELS),
    "save_directory: loaded": Row(kinds=MODELS, loaded=True),
    "is_main_process: false": Row(options={"is_main_process": False}),
    "max_shard_size: 1KB": Row(kinds=MODELS, options={"max_shard_size": "1KB"}),
    "max_shard_size: loaded": Row(kinds=MODELS, options={"max_shard_size": "2KB"}, loaded=True),
    "max_shard_size: 1.5 kb": Row(options={"max_shard_size": "1.5 kb"}),
    "max_shard_size: 0.001MB": Row(options={"max_shard_size": "0.001MB"}),
    "max_shard_size: 900": Row(options={"max_shard_size": 900}),
    "max_shard_size: one": Row(options={"max_shard_size": 1}),
    "max_shard_size: nonsense": Row(options={"max_shard_size": "many"}),
    "variant: fp16": Row(kinds=MODELS, options={"variant": "fp16"}),
    "variant: sharded": Row(options={"variant": "fp16", "max_shard_size": "1KB"}),
    "token: text": Row(options={"token": "hf_x"}),
    "save_peft_format: false": Row(options={"save_peft_format": False}),
    "save_original_format: false": Row(kinds=FEW, options={"save_original_format": False}),
    "push_to_hub: false": Row(options={"push_to_hub": False}),
    "dtype: half": Row(kinds=MODELS, prepare=halve),
    "dtype: mixed": Row(prepare=mix),
    "vocabulary: grown": Row(kinds=("user", "llama", "llama tied", "bert", "t5"), prepare=grow),
    "vocabulary: shrunk": Row(kinds=("user", "llama", "llama tied", "bert"), prepare=shrink),
    "vocabulary: padded": Row(kinds=("user", "llama", "llama tied", "bert"), prepare=pad),
    "ties: again": Row(kinds=MODELS, prepare=retie),
    "keys to ignore": Row(kinds=("regression",)),
}


def made(this: Side, kind: str, config: dict[str, Any]) -> Any:
    """Return the model of a row, also of the kind that has no entry in the table."""
    if kind == "regression":
        return filled(this.get("NoteForRegression")(this.get("NoteConfig")(num_labels=3)))
    return this.model(kind, **config)


def comparable(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out who wrote a file, and what is default in a part of a configuration.

    Of the parts of a user's configuration transformers saves the defaults as well, but not always.
    """
    content.get("generation_config.json", {}).pop("_from_model_config", None)
    default = json.loads(transformers.PreTrainedConfig().to_json_string(use_diff=False))
    for part in content.get("config.json", {}).values():
        if isinstance(part, dict) and "model_type" in part:
            for key in [key for key in part if key in default and part[key] == default[key]]:
                del part[key]
    return content


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, row in ROWS.items() for kind in row.kinds]
)
def test_saving(name: str, kind: str, tmp_path: Path) -> None:
    """A save gives the same files with the same content, or the same exception."""
    row = ROWS[name]
    source = saved(kind, tmp_path / "source", row.config) if row.loaded else None

    def act(this: Side) -> dict[str, Any]:
        if source is not None:
            model = this.cls(kind).from_pretrained(source)
        else:
            model = made(this, kind, row.config)
        row.prepare(model)
        folder = tmp_path / this.name
        answer = model.save_pretrained(folder, **row.options)
        return {"answer": answer, "files": comparable(files(folder))}

    agree(act, better=row.better)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("writer", [THEIRS, OURS])
def test_each_loads_what_the_other_saved(kind: str, writer: str, tmp_path: Path) -> None:
    """What one library saves, sharded, the other loads whole, with the same facts."""
    model = side(writer).model(kind)
    model.save_pretrained(tmp_path, max_shard_size="2KB")

    def act(this: Side) -> Any:
        loaded, info = this.cls(kind).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        return facts(loaded)

    agree(act)


@pytest.mark.parametrize("kind", FEW)
def test_parts_of_a_state_can_be_saved(kind: str, tmp_path: Path) -> None:
    """`state_dict` takes the place of the model's own, also where it is a part or empty."""
    for count in (0, 1, 3):

        def act(this: Side, count: int = count) -> dict[str, Any]:
            model = this.model(kind)
            state = {n: t * 2 for n, t in list(model.state_dict().items())[:count]}
            folder = tmp_path / f"{this.name}-{count}"
            model.save_pretrained(folder, state_dict=state)
            return comparable(files(folder))

        agree(act)


def test_a_file_in_the_way_saves_nothing(tmp_path: Path) -> None:
    """A path that is a file is left alone, and nothing is raised."""
    path = tmp_path / "file"
    path.write_text("mine")
    agree(lambda this: this.model("user").save_pretrained(path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("tags", [["a", "b", "a"], "one", [], ("x", "y")])
def test_tags(tags: Any) -> None:
    """Tags are kept in order, none twice, on the object alone."""

    def act(this: Side) -> Any:
        model = this.model("user")
        model.add_model_tags(tags)
        model.add_model_tags(["b", "c"])
        return model.model_tags, type(model).model_tags if hasattr(type(model), "model_tags") else 0

    ours = agree(act, at_all=False)
    theirs = act(side(THEIRS))
    assert ours[0] == theirs[0]


@pytest.mark.parametrize(
    "name",
    ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForNothing", ""],
)
def test_auto_class(name: str) -> None:
    """A known name is kept on the class, an unknown one refused."""

    def act(this: Side) -> Any:
        fresh = type("Fresh", (this.cls("user"),), {})
        fresh.register_for_auto_class(name) if name else fresh.register_for_auto_class()
        return fresh._auto_class

    agree(act)


def test_auto_class_may_be_the_class() -> None:
    """The auto class may be given itself."""

    def act(this: Side) -> Any:
        fresh = type("Fresh", (this.cls("user"),), {})
        fresh.register_for_auto_class(this.get("AutoModelForMaskedLM"))
        return fresh._auto_class

    agree(act)
