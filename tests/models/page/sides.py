"""The two libraries side by side: the same classes, weights and calls, and what came of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
import types
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from ckptd import models

THEIRS, OURS = "transformers", "ckptd"
_CODE = Path(__file__).with_name("user_code.py")
_IMPORTS = {
    "from transformers.modeling_outputs import": "from ckptd.models.layers.outputs import",
    "from transformers import": "from ckptd.models import",
}
"""All that has to be changed in code that was written for transformers."""
SMALL: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "user": ("NoteForCausalLM", "NoteConfig", {}),
    "untied": ("NoteForCausalLM", "NoteConfig", {"tie_word_embeddings": False, "head_bias": True}),
    "parts": ("Folio", "FolioConfig", {"text_config": {"vocab_size": 11, "hidden_size": 8}}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 1}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 29, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        SMALL
        | {
            "num_key_value_heads": 1,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        },
    ),
}
"""Models that rows are tried on: class, class of the configuration, its values.

Of text only: ViT has other names at run time there, which is compared by its files elsewhere.
"""


@dataclass(frozen=True, slots=True)
class Side:
    """One library, and the user's code as written for it."""

    name: str
    code: types.ModuleType

    def get(self, name: str) -> Any:
        """Return a class of the user's code or of the library."""
        library = models if self.name == OURS else transformers
        return getattr(self.code, name, None) or getattr(library, name)

    def cls(self, kind: str) -> Any:
        """Return the model class of a kind."""
        return self.get(KINDS[kind][0])

    def config(self, kind: str, **values: Any) -> Any:
        """Return the configuration of a kind; `values` override."""
        return self.get(KINDS[kind][1])(**(KINDS[kind][2] | values))

    def model(self, kind: str, **values: Any) -> Any:
        """Return a fresh model of a kind whose weights only hang on their names."""
        return filled(self.cls(kind)(self.config(kind, **values)))


@functools.cache
def side(name: str) -> Side:
    """Return one side; its code is read once."""
    text = _CODE.read_text()
    if name == OURS:
        for old, new in _IMPORTS.items():
            assert old in text
            text = text.replace(old, new)
    module = types.ModuleType(f"user_code_{name}")
    module.__file__ = str(_CODE)
    sys.modules[module.__name__] = module
    exec(compile(text, str(_CODE), "exec"), vars(module))  # our own file
    return Side(name, module)


def filled(model: Any) -> Any:
    """Give every parameter values that only hang on its name; return the model, for evaluation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=seed) * 0.3)
    return model.eval()


def inputs(kind: str, *, labels: bool = False) -> dict[str, Any]:
    """Return inputs of a model of a kind."""
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 3, 4]])
    given: dict[str, Any] = {"input_ids": ids}
    return given | ({"labels": ids} if labels or kind == "t5" else {})


def saved(kind: str, folder: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Let transformers save a model of a kind; return the folder."""
    side(THEIRS).model(kind, **(config or {})).save_pretrained(folder, **options)
    return folder


def outcome(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what an action gave, or the exception it ended with."""
    try:
        return act(), None
    except Exception as error:  # noqa: BLE001 - which one is what is compared
        return None, error


def agree(
    act: Callable[[Side], Any], *, better: type[Exception] | None = None, at_all: bool = True
) -> Any:
    """Do the same with both libraries; values must be equal, and kinds of exceptions.

    `better` is the documented exception that ours raises where transformers has another or none.
    With `at_all` False values are not compared. Returns what ours gave.
    """
    theirs, their_error = outcome(lambda: act(side(THEIRS)))
    ours, our_error = outcome(lambda: act(side(OURS)))
    if better is not None:
        assert isinstance(our_error, better), f"ours: {our_error!r}; theirs: {their_error!r}"
        assert type(their_error) is not type(our_error), "nothing differs here any more"
        return None
    if our_error is not None and their_error is None:
        raise our_error
    assert isinstance(our_error, type(their_error)), f"{our_error!r}, theirs {their_error!r}"
    if at_all:
        same(ours, theirs)
    return ours


def same(ours: Any, theirs: Any, where: str = "") -> None:
    """Check that two results, nested in any way, are equal to the bit."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), where
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), where
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, Mapping):
        assert set(ours) == set(theirs), f"{where}: {set(ours) ^ set(theirs)}"
        for key, value in theirs.items():
            same(ours[key], value, f"{where}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), f"{where}: {ours} {theirs}"
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            same(one, other, f"{where}[{place}]")
    else:
        assert ours == theirs, f"{where}: {ours!r}, theirs {theirs!r}"


def facts(model: Any) -> dict[str, Any]:
    """Return what can be said of a model: weights, which are one, what trains, configuration."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        "weights": dict(model.state_dict()),
        "shared": sorted(names for names in groups.values() if len(names) > 1),
        "frozen": sorted(n for n, p in model.named_parameters() if not p.requires_grad),
        "buffers": dict(model.named_buffers()),
        "training": model.training,
        "dtype": model.dtype,
        "config": described(model.config),
    }


def described(config: Any) -> dict[str, Any]:
    """Return the content of a configuration, without who wrote it and where it came from."""
    content = json.loads(config.to_json_string(use_diff=False))
    return _without(content)


def _without(content: Any) -> Any:
    if isinstance(content, dict):
        left_out = {"transformers_version", "_name_or_path"}
        return {k: _without(v) for k, v in content.items() if k not in left_out}
    return content


def files(folder: Path) -> dict[str, Any]:
    """Return the files of a folder by name: JSON as it is, tensors and metadata of weights."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = _without(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                found[name] = {"metadata": opened.metadata(), "tensors": tensors}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def info_of(loaded: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    """Return the loading information in a form that can be compared."""
    _, info = loaded
    plain = {"mismatched_keys": [(n, tuple(a), tuple(b)) for n, a, b in info["mismatched_keys"]]}
    return {key: sorted(map(str, value)) for key, value in {**info, **plain}.items()}


def place(model: Any, part: Any) -> str | None:
    """Return the name of a module in a model."""
    return next((name for name, module in model.named_modules() if module is part), None)


def native(model_type: str) -> types.ModuleType:
    """Return a module of this package's architectures."""
    return importlib.import_module(f"ckptd.models.native.{model_type}")


def fields(output: Any) -> dict[str, Any]:
    """Return the fields of a model's output that are there."""
    return {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
