# ruff: noqa: BLE001, E402 (whatever a class does wrong becomes a remark)
"""Write `daemon/ckptd/models/architectures.json` from the installed transformers.

A developer script, run by hand after transformers moved:

    python tests/tools/generate_architectures.py [--jobs 2] [--only LlamaForCausalLM ...]

It takes some ten minutes. With pillow, timm and torchvision installed beside transformers the
models with a timm vision tower are built too; without them they fall back to what their class says.

Every model class is built on the meta device from a shrunk default configuration. Nothing is read
from the source text: a tensor has vocabulary rows exactly if its shape moves when a `vocab_size` of
the configuration moves; a tie is what the built model expands; a flag's default and its quirks
(forced, forwarded from a sub-configuration) are found by trying the values; a name on disk is what
`save_pretrained` would write, checked by the renaming that `from_pretrained` would do.
The result is deterministic. A class that cannot be built is recorded with its static tie map.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
warnings.filterwarnings("ignore")

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)
from transformers.models.auto import modeling_auto

TARGET = Path(__file__).parents[2] / "daemon" / "ckptd" / "models" / "architectures.json"
FORMAT = 1
TIMEOUT_S = 150
SHARED_SIZES = {
    "marian": ["vocab_size", "decoder_vocab_size"],  # one where its embeddings are shared
    "gemma3n": ["text_config.vocab_size", "text_config.vocab_size_per_layer_input"],
    "gemma3n_text": ["vocab_size", "vocab_size_per_layer_input"],
    "gemma4": ["text_config.vocab_size", "text_config.vocab_size_per_layer_input"],
    "gemma4_text": ["vocab_size", "vocab_size_per_layer_input"],
    "ovis2": ["text_config.vocab_size", "vocab_size"],
    "t5gemma": ["encoder.vocab_size", "decoder.vocab_size"],
    "t5gemma2": ["encoder.text_config.vocab_size", "decoder.vocab_size", "vocab_size"],
    "canary": ["vocab_size", "decoder_config.vocab_size"],
}
"""Keys that hold the size of one and the same vocabulary, by model_type."""
MOVED_TOGETHER = ("canary", "t5gemma2")
"""Types that refuse to be built while those sizes differ."""
VARIANTS: dict[str, tuple[str, Any]] = {
    "marian": ("share_encoder_decoder_embeddings", False),
    "deberta": ("legacy", False),
    "deberta-v2": ("legacy", False),
}
"""A key whose other value gives the class other tensors; each gets an entry of its own."""
STEP = 64  # how far a vocabulary size is moved
VOCABULARY = 40_009  # a prime nothing else uses; the tests move it by STEP
FLAG = "tie_word_embeddings"
FLAG_ALIASES = ("tie_embedding", "tie_codebooks_embeddings")
LAYER_KEYS = re.compile(
    r"^(num_hidden_layers|num_layers|n_layers?|(encoder|decoder)_layers|num_(encoder|decoder)_layers"
    r"|depth|num_decoder_hidden_layers|num_encoder_hidden_layers|num_experts|num_local_experts"
    r"|n_routed_experts)$"
)
GAPS: dict[str, Any] = {
    "head_dim": 64,
    "vocab_size": 1000,
    "vocabulary_map": {"<image>": 8, "<|extra_200|>": 9},
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "intermediate_size": 128,
    "top_k_experts": 2,
    "deepstack_layer_map": [[0, 0]],
    "indexer_compress_ratio": 4,
    "indexer_budget": 64,
    "indexer_head_dim": 64,
    "indexer_n_heads": 2,
    "indexer_num_heads": 2,
    "topk_method": "greedy",
    "n_shared_experts": 1,
    "index_head_dim": 64,
    "downsample_rate": "1/2",
}
"""What a default configuration leaves None although its model cannot be built so."""
LACKS: dict[str, dict[str, Any]] = {
    "bridgetower": {"contrastive_hidden_size": 64},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"embed_dim": 192, "img_size": [224, 224], "depth": 2},
        }
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "reformer": {"is_decoder": True},
    "seamless_m4t_v2": {"variance_predictor_embed_dim": 64},
    "siglip_vision_model": {"num_attention_heads": 16},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma": {"is_encoder_decoder": False},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0}},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
}
"""What a default configuration lacks altogether, or has wrong, by model_type."""
UNSHRUNK = ("zamba", "zamba2")
"""Types whose layers far apart share weights: two layers would hide it."""
IGNORED_VOCABULARY = re.compile(r"(^|_)type_vocab_size$|task_type_vocab_size|max_2d|modality_type")
HEAD_MAPS = (
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("multimodal", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("speech", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
    ("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("pretraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
    ("base", "MODEL_MAPPING_NAMES"),
)


# --- the classes ---------------------------------------------------------------------------------


def model_classes() -> dict[str, type[PreTrainedModel]]:
    """Return every concrete model class by its name; the exported one where two share a name."""
    found: dict[str, list[type[PreTrainedModel]]] = {}
    package = importlib.import_module("transformers.models")
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        folder = Path(package.__path__[0]) / info.name
        for file in sorted(folder.glob("modeling_*.py")):
            try:
                module = importlib.import_module(f"transformers.models.{info.name}.{file.stem}")
            except Exception as exc:
                print(f"not importable: {file.stem}: {exc}", file=sys.stderr)
                continue
            for name, value in inspect.getmembers(module, inspect.isclass):
                if (
                    issubclass(value, PreTrainedModel)
                    and value.__module__ == module.__name__
                    and not name.endswith("PreTrainedModel")
                    and value.config_class is not None
                ):
                    found.setdefault(name, []).append(value)
    result = {}
    for name, classes in sorted(found.items()):
        exported = getattr(transformers, name, None)
        result[name] = exported if exported in classes else classes[0]
    return result


# --- configurations ------------------------------------------------------------------------------


def default_config(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return the class's default configuration; composites without one get BERT, ViT or Wav2Vec2."""
    kind = cls.config_class.model_type
    if kind in ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder"):
        first = {"e": "BertConfig", "v": "ViTConfig", "s": "Wav2Vec2Config"}[kind[0]]
        decoder = transformers.BertConfig(is_decoder=True, add_cross_attention=True)
        return cls.config_class.from_encoder_decoder_configs(
            getattr(transformers, first)(), decoder
        )
    if kind == "vision-text-dual-encoder":
        return cls.config_class.from_vision_text_configs(
            transformers.CLIPVisionConfig(), transformers.BertConfig()
        )
    if kind == "rag":
        return cls.config_class.from_question_encoder_generator_configs(
            transformers.DPRConfig(), transformers.BartConfig()
        )
    if kind == "musicgen":
        return (
            cls.config_class(
                text_encoder=transformers.T5Config().to_dict(),
                audio_encoder=transformers.EncodecConfig().to_dict(),
                decoder={"model_type": "musicgen_decoder"},
            )
            if "decoder" in cls.config_class.sub_configs
            else cls.config_class()
        )
    if kind == "musicgen_melody":
        return (
            cls.config_class(
                text_encoder=transformers.T5Config().to_dict(),
                audio_encoder=transformers.EncodecConfig().to_dict(),
                decoder={"model_type": "musicgen_melody_decoder"},
            )
            if "decoder" in cls.config_class.sub_configs
            else cls.config_class()
        )
    return cls.config_class()


def as_file(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration as config.json holds it, every default written out."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def shrink(node: Any, *, layers: int = 2) -> Any:
    """Return `node` with fewer layers and experts, lists as long as the layers cut with them."""
    if not isinstance(node, dict):
        return node
    lengths = {value for key, value in node.items() if LAYER_KEYS.match(key) and _int(value)}
    result = {}
    for key, value in node.items():
        if LAYER_KEYS.match(key) and _int(value) and value > layers:
            result[key] = layers
        elif isinstance(value, list) and len(value) in lengths and len(value) > layers:
            result[key] = value[:layers]
        else:
            result[key] = shrink(value, layers=layers)
    return result


def filled(node: Any) -> Any:
    """Return `node` with what its model needs and its default leaves out."""
    if not isinstance(node, dict):
        return node
    result = {key: filled(value) for key, value in node.items()}
    layers = next((v for k, v in node.items() if LAYER_KEYS.match(k) and _int(v)), 2)
    for key, value in node.items():
        if value is not None:
            continue
        if key == "num_key_value_heads":
            result[key] = node.get("num_attention_heads", 4)
        elif key == "mlp_layer_types":
            result[key] = ["dense"] * layers
        elif key == "layer_types":
            result[key] = ["full_attention"] * layers
        elif key in GAPS:
            result[key] = GAPS[key]
    return result | LACKS.get(node.get("model_type", ""), {})


def _int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def sub_configs(config: PreTrainedConfig, path: str = "") -> list[tuple[str, PreTrainedConfig]]:
    """Return (path, configuration) of this configuration and all it holds, outermost first."""
    found = [(path, config)]
    for key, value in sorted(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            found += sub_configs(value, f"{path}.{key}" if path else key)
    return found


def get(node: dict[str, Any], path: str) -> dict[str, Any] | None:
    for part in path.split(".") if path else ():
        node = node.get(part)
        if not isinstance(node, dict):
            return None
    return node


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def with_value(file: dict[str, Any], key_path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `file` with the value written (or removed: Ellipsis) at the dotted key."""
    result = copy.deepcopy(file)
    path, _, key = key_path.rpartition(".")
    node = get(result, path)
    if node is None:
        raise KeyError(key_path)
    if value is ...:
        node.pop(key, None)
    else:
        node[key] = value
    return result


# --- building ------------------------------------------------------------------------------------


def build(cls: type[PreTrainedModel], file: dict[str, Any]) -> PreTrainedModel:
    """Return the model on the meta device."""
    config = cls.config_class.from_dict(copy.deepcopy(file))
    if not isinstance(config, cls.config_class):
        raise TypeError("not a configuration")
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return cls(config)


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all that a checkpoint of the model can hold (shared names included)."""
    ignored = set(model._keys_to_ignore_on_save or ())
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and name not in ignored
    }


def vocabulary_keys(file: dict[str, Any], path: str = "") -> list[str]:
    """Return the dotted keys that may be sizes of a vocabulary."""
    found = []
    for key, value in sorted(file.items()):
        if isinstance(value, dict):
            found += vocabulary_keys(value, join(path, key))
        elif "vocab" in key and _int(value) and value > 1 and not IGNORED_VOCABULARY.search(key):
            found.append(join(path, key))
    return found


def moved(
    before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]
) -> list[tuple[str, int, int, int]]:
    """Return (name, axis, rows before, rows after) of the tensors one dimension of which moved."""
    found = []
    for name, shape in before.items():
        other = after.get(name)
        if other is None or len(other) != len(shape) or other == shape:
            continue
        axes = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
        if len(axes) == 1:
            found.append((name, axes[0], shape[axes[0]], other[axes[0]]))
    return found


class Derivation:
    """The facts of one class, in the order in which they are found."""

    def __init__(self, cls: type[PreTrainedModel], **other: Any) -> None:
        self.cls = cls
        self.other = other
        self.odd: list[str] = []
        self._mapping: list[Any] = []
        self._build()
        kind = cls.config_class.model_type
        self.together = SHARED_SIZES[kind] if kind in MOVED_TOGETHER else []
        self._place_vocabulary()
        self.paths = sub_configs(self.model.config)

    def _build(self) -> None:
        """Build the model: shrunk, else by its default, else with what the default lacks."""
        file = as_file(default_config(self.cls)) | self.other
        attempts = {
            "shrunk": lambda: file if file.get("model_type") in UNSHRUNK else shrink(file),
            "default": lambda: file,
            "filled": lambda: filled(shrink(file)),
            "filled default": lambda: filled(file),
        }
        failure: Exception | None = None
        for self.how, attempt in attempts.items():
            self.file = attempt()
            try:
                self.model = build(self.cls, self.file)
            except Exception as exc:
                failure = exc
            else:
                return
        raise failure or RuntimeError("unreachable")

    def _place_vocabulary(self) -> None:
        """Give every vocabulary its own size, so that no other dimension equals it."""
        file = self.file
        for offset, key in enumerate(vocabulary_keys(file)):
            size = VOCABULARY if key in self.together else VOCABULARY + 211 * offset
            file = with_value(file, key, size)
        for key in self._flag_keys(file):  # untied, so that every matrix shows its own size
            file = with_value(file, key, False)
        try:
            self.untied = build(self.cls, file)
            self.sized = file
        except Exception:
            self.untied = self.model
            self.sized = self.file
            self.how += ", own sizes"

    def _flag_keys(self, file: dict[str, Any], *, declared: bool = True) -> list[str]:
        found = []
        for path, config in sub_configs(self.model.config):
            node = get(file, path)
            if node is not None and (not declared or hasattr(config, FLAG)):
                found.append(join(path, FLAG))
        return found

    # vocabulary

    def vocabulary(self) -> list[list[Any]]:
        """Return [name, axis, size key, rows - size] of every tensor with vocabulary rows."""
        before = shapes(self.untied)
        found = []
        for key in vocabulary_keys(self.sized):
            path, _, leaf = key.rpartition(".")
            size = get(self.sized, path)[leaf]
            if key in self.together[1:]:
                continue
            file = self.sized
            for other in self.together if key in self.together else [key]:
                file = with_value(file, other, size + STEP)
            try:
                after = shapes(build(self.cls, file))
            except Exception:
                continue
            for name, axis, rows, rows_after in moved(before, after):
                if rows_after - rows != STEP:
                    self.odd.append(f"{name} moves by {rows_after - rows} with {key}")
                found.append([name, axis, key, rows - size, rows_after - rows == STEP])
        return found

    def roles(self) -> dict[str, str]:
        """Return the role of each tensor the model itself calls input embedding or head."""
        found: dict[str, str] = {}
        names: dict[int, str] = {}
        for name, module in self.untied.named_modules(remove_duplicate=False):
            names.setdefault(id(module), name)
        known = self.untied.state_dict()
        for role, getter in (
            ("input", self.untied.get_input_embeddings),
            ("head", self.untied.get_output_embeddings),
        ):
            try:
                module = getter()
            except Exception:
                continue
            modules = list(module) if isinstance(module, torch.nn.ModuleList) else [module]
            for one in modules:
                prefix = names.get(id(one))
                if prefix is None:
                    continue
                if (weight := join(prefix, "weight")) in known:
                    found.setdefault(weight, role)
                if role == "head" and (bias := join(prefix, "bias")) in known:
                    found.setdefault(bias, "bias")
        return found

    # ties

    def config_path(self, module: PreTrainedModel) -> str | None:
        for path, config in self.paths:
            if module.config is config:
                return path
        same = [path for path, config in self.paths if type(config) is type(module.config)]
        return same[0] if same else None

    def ties(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Return (target, source, configuration paths of the flag) of every tie, in tie order."""
        found: dict[tuple[str, str], tuple[str, ...]] = {}
        known = set(self.model.state_dict())
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            if not isinstance(module, PreTrainedModel) or not module._tied_weights_keys:
                continue
            path = self.config_path(module)
            if path is None:
                self.odd.append(f"no configuration path for {prefix or 'the model'}")
                continue
            was = getattr(module.config, FLAG, None)
            try:
                setattr(module.config, FLAG, True)
                pairs = module.get_expanded_tied_weights_keys(all_submodels=False)
            except Exception as exc:
                self.odd.append(f"ties of {prefix or 'the model'}: {exc}"[:160])
                continue
            finally:
                if was is not None:
                    setattr(module.config, FLAG, was)
            for target, source in pairs.items():
                pair = (join(prefix, target), join(prefix, source))
                if pair[0] in known and pair[1] in known:
                    found[pair] = tuple(dict.fromkeys((*found.get(pair, ()), path)))
        return [(target, source, path) for (target, source), path in found.items()]

    def flags(self, paths: tuple[str, ...]) -> dict[str, Any]:
        """Return what decides a tie that modules at several paths make: any of them is enough."""
        found = [self.flag(path) for path in paths]
        result = found[0]
        for other in found[1:]:
            for key, default in zip(other["keys"], other["defaults"], strict=True):
                if key not in result["keys"]:
                    result["keys"].append(key)
                    result["defaults"].append(default)
        return result

    def flag(self, path: str) -> dict[str, Any]:
        """Return what decides the flag that modules with the configuration at `path` read."""
        keys = list(dict.fromkeys([join(path, FLAG), *self._flag_keys(self.file, declared=False)]))
        near = [key for key in keys if _related(path, key.rpartition(".")[0])]
        aliases = [join(key.rpartition(".")[0], alias) for key in near for alias in FLAG_ALIASES]

        def effective(values: dict[str, Any]) -> bool | None:
            file = self.file
            try:
                for key in near + aliases:
                    file = with_value(file, key, values.get(key, ...))
                config = self.cls.config_class.from_dict(copy.deepcopy(file))
                for part in path.split(".") if path else ():
                    config = getattr(config, part)
                return bool(getattr(config, FLAG, False))
            except Exception:
                return None

        off = dict.fromkeys(near, False)
        result: dict[str, Any] = {"path": path}
        forward = getattr(self.cls, "forward", None)
        if forward is not None and f"config.{FLAG}" in inspect.getsource(inspect.unwrap(forward)):
            result["computes"] = True
        default = effective({})
        if effective(off) and default is not False:
            return result | {"keys": [join(path, FLAG)], "defaults": [True], "forced": True}
        if not effective(dict.fromkeys(near, True)) and default is not None:
            return result | {"keys": [join(path, FLAG)], "defaults": [False], "forced": False}
        deciding = [key for key in near if effective(off | {key: True})]
        overriding = [
            alias
            for alias in aliases
            if effective(dict.fromkeys(near, True) | {alias: False}) is False
            and effective(off | {alias: True})
        ]
        if not deciding:
            self.odd.append(f"nothing decides the flag at {path!r}")
            deciding = [join(path, FLAG)]
        defaults = [bool(effective({k: v for k, v in off.items() if k != key})) for key in deciding]
        result |= {"keys": deciding, "defaults": defaults}
        if overriding:
            result["aliases"] = overriding
        if bool(default) != any(defaults):
            self.odd.append(f"flag at {path!r}: default {default}, parts {defaults}")
            result["default"] = bool(default)
        return result

    # names

    def disk_names(self, names: list[str]) -> dict[str, list[str]]:
        """Return the names on disk of each run-time name that has others than itself."""
        try:
            mapping = self._mapping = self._mapping or get_model_conversion_mapping(self.model)
            plain = get_model_conversion_mapping(self.model, add_legacy=False)
        except Exception as exc:
            self.odd.append(f"conversion: {exc}"[:120])
            return {}
        known = dict.fromkeys(self.model.state_dict(), True)
        result = {}
        for name in names:
            spellings = [
                _reverse(name, [entry for entry in plain if not isinstance(entry, PrefixChange)]),
                _reverse(name, plain),
                name,
            ]
            good = [
                spelling
                for spelling in dict.fromkeys(spellings)
                if self._forward(spelling, mapping, known) == name
            ]
            if good and good != [name]:
                result[name] = good
        return result

    def _forward(self, name: str, mapping: list[Any], known: dict[str, bool]) -> str:
        return rename_source_key(
            name,
            [entry for entry in mapping if isinstance(entry, WeightRenaming)],
            [entry for entry in mapping if isinstance(entry, WeightConverter)],
            self.model.base_model_prefix or None,
            known,
        )[0]

    # parts

    def parts(self) -> list[list[Any]]:
        """Return [module, configuration path, model_type, class] of parts another class may fill."""
        free = []
        for path, config in self.paths:
            for key, kind in (config.sub_configs or {}).items():
                if kind is transformers.AutoConfig:
                    free.append(join(path, key))
        found = []
        taken: list[str] = []
        for name, module in self.model.named_modules():
            if name == "" or not isinstance(module, PreTrainedModel):
                continue
            if any(name.startswith(f"{other}.") for other in taken):
                continue
            path = self.config_path(module)
            if path in free:
                taken.append(name)
                found.append([name, path, module.config.model_type, type(module).__name__])
        return found

    # resizing, as the library does it

    def library_resize(self) -> tuple[set[str], list[str]] | str:
        """Return (names whose shape moves, keys written) of resize_token_embeddings, or why not."""
        try:
            model = build(self.cls, self.sized)
            rows = model.get_input_embeddings().weight.shape[0]
            before, config = shapes(model), as_file(model.config)
            with torch.device("meta"):
                model.resize_token_embeddings(rows + STEP, mean_resizing=False)
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}".splitlines()[0][:160]
        names = {name for name, _, _, _ in moved(before, shapes(model))}
        after = as_file(model.config)
        keys = [
            key
            for key in vocabulary_keys(after)
            if (node := get(config, key.rpartition(".")[0])) is not None
            and node.get(key.rpartition(".")[2])
            != get(after, key.rpartition(".")[0])[key.rpartition(".")[2]]
        ]
        return names, keys


def _related(path: str, other: str) -> bool:
    return (
        path == other
        or not path
        or not other
        or path.startswith(f"{other}.")
        or other.startswith(f"{path}.")
    )


def _reverse(name: str, mapping: list[Any]) -> str:
    """Return the name `save_pretrained` writes for a run-time name."""
    reverse = []
    for entry in mapping[::-1]:
        try:
            reverse.append(entry.reverse_transform())
        except Exception:
            continue
    _, pattern = apply_converters(
        name, [entry for entry in reverse if isinstance(entry, WeightConverter)]
    )
    if pattern is not None:
        return name
    return apply_renamings(name, [entry for entry in reverse if isinstance(entry, WeightRenaming)])


def describe(cls: type[PreTrainedModel], **other: Any) -> tuple[dict[str, Any], list[str], str]:
    """Return the table entry of a class, remarks, and how it was derived."""
    derived = Derivation(cls, **other)
    vocabulary = derived.vocabulary()
    roles = derived.roles()
    ties = derived.ties()
    entry: dict[str, Any] = {"type": cls.config_class.model_type}
    if cls.base_model_prefix and cls.base_model_prefix in dict(derived.model.named_children()):
        entry["prefix"] = cls.base_model_prefix
    elif cls.base_model_prefix:
        entry["below"] = cls.base_model_prefix
    if not vocabulary and not ties:
        return {"type": entry["type"]}, derived.odd, derived.how
    rows = _rows(vocabulary, roles, ties, derived)
    if rows:
        entry["vocabulary"] = rows
    if ties:
        flags = {paths: derived.flags(paths) for paths in dict.fromkeys(tie[2] for tie in ties)}
        entry["flags"] = [{k: v for k, v in flag.items() if k != "path"} for flag in flags.values()]
        order = list(flags)
        mine = {row[0] for row in rows}
        for target, source, paths in ties:
            if mine.isdisjoint((target, source)):
                entry["flags"][order.index(paths)].setdefault("binds", target)
        ties = [tie for tie in ties if not mine.isdisjoint(tie[:2])]
        entry["ties"] = [[target, source, order.index(paths)] for target, source, paths in ties]
        if not ties:
            del entry["ties"], entry["flags"]
    _resizing(entry, rows, derived)
    for row in rows:
        row[1] = "other" if row[1] == "odd" else row[1]
    names = sorted({row[0] for row in rows} | {n for t in ties for n in t[:2]})
    if disk := derived.disk_names(names):
        entry["disk"] = disk
    parts = [
        part for part in derived.parts() if any(row[0].startswith(f"{part[0]}.") for row in rows)
    ]
    if parts:
        for part in parts:
            inside = [n for n in derived.model.state_dict() if n.startswith(f"{part[0]}.")]
            part.append(_prefixes(part[0], inside, derived))
        entry["parts"] = parts
    return entry, derived.odd, derived.how


def _rows(
    vocabulary: list[list[Any]],
    roles: dict[str, str],
    ties: list[tuple[str, str, tuple[str, ...]]],
    derived: Derivation,
) -> list[list[Any]]:
    """Return [name, role, axis, size key, offset]; the role is guessed only from ties and shape."""
    before = shapes(derived.untied)
    parameters = {name for name, _ in derived.untied.named_parameters(remove_duplicate=False)}
    kinds = {name: type(module).__name__ for name, module in derived.untied.named_modules()}
    kinds |= {n: type(m).__name__ for n, m in derived.untied.named_modules(remove_duplicate=False)}
    inputs = {name for name, role in roles.items() if role == "input"}
    matrices = {name for name in before if "Embedding" in kinds.get(name.rpartition(".")[0], "")}
    for _ in range(2):  # a module's own copy of the input embedding, named by a tie with it
        for target, source, _path in ties:
            if {target, source} & inputs and {target, source} <= matrices:
                inputs |= {target, source}
    keys = {key for name, _, key, _, _ in vocabulary if name in inputs}
    result = []
    for name, axis, key, offset, plain in vocabulary:
        shape, module = before[name], name.rpartition(".")[0]
        if name in inputs:
            role = "input"
        elif name in roles:
            role = roles[name]
        elif len(shape) == 2 and shape[0] == 1 and axis == 1:
            role = "logits_bias"
        elif name.endswith("bias") and len(shape) == 1:
            role = "bias"
        elif name not in parameters:
            role = "odd"
        elif name in matrices and axis == 0:
            role = "other"
        elif kinds.get(module) == "Linear" and axis == 0:
            role = "head" if key in keys else "other"
        else:
            role = "odd"
        result.append([name, role, axis, key, offset if plain else None])
    order = list(before)
    result.sort(key=lambda row: (order.index(row[0]), row[3]))
    return result


def _prefixes(module: str, inside: list[str], derived: Derivation) -> list[str]:
    """Return the spellings on disk of the prefix of a part."""
    found: Counter[str] = Counter()
    for runtime, names in derived.disk_names(inside[:40]).items():
        tail = runtime.removeprefix(f"{module}.")
        for name in names:
            if name.endswith(f".{tail}"):
                found[name.removesuffix(f".{tail}")] += 1
    ranked = [prefix for prefix, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))]
    return ranked[:3] or [module]


def _resizing(entry: dict[str, Any], rows: list[list[Any]], derived: Derivation) -> None:
    """Record which keys a resize writes, or why the class cannot be resized."""
    inputs = [row for row in rows if row[1] == "input"]
    if not inputs:
        if any(row[1] == "head" for row in rows):
            entry["fixed"] = "its input embedding is not one table of text tokens"
        return
    done = derived.library_resize()
    sizes = list(dict.fromkeys(row[3] for row in inputs))
    keys = SHARED_SIZES.get(entry["type"], sizes)
    keys = [key for key in keys if get(derived.file, key.rpartition(".")[0]) is not None]
    mine = [row for row in rows if row[3] in keys]
    heads = [row for row in rows if row[1] == "head" and row[3] not in keys]
    beyond = [row for row in mine if row[4] != 0 and row[1] in ("input", "head")]
    odd = [row for row in mine if row[1] == "odd"]
    ties = {name for tie in entry.get("ties", ()) for name in tie[:2]}
    tables = [row[0] for row in inputs if row[0] not in ties]
    if isinstance(done, str) and done.startswith("NotImplementedError"):
        entry["fixed"] = "it holds separate models, each with its own vocabulary"
    elif len(keys) > 1 and entry["type"] not in SHARED_SIZES:
        entry["fixed"] = f"its embeddings have separate vocabularies ({', '.join(keys)})"
    elif heads:
        entry["fixed"] = f"its head {heads[0][0]} has a vocabulary of its own ({heads[0][3]})"
    elif beyond:
        row = beyond[0]
        known = row[4] is not None and abs(row[4]) < VOCABULARY
        than = "more than" if known and row[4] > 0 else "fewer than"
        rows = f"{abs(row[4])} rows {than}" if known else "another number of rows than"
        entry["fixed"] = f"{row[0]} has {rows} {row[3]}"
    elif odd:
        entry["fixed"] = f"{odd[0][0]} depends on the vocabulary in a way of its own"
    elif (
        len(tables) > 1
        and len({name.rpartition(".")[0].rstrip("0123456789") for name in tables}) == 1
    ):
        entry["fixed"] = f"it has a table for each codebook ({tables[0]} ...)"
    else:
        entry["resize"] = keys
    if isinstance(done, str):
        derived.odd.append(f"resize of the library: {done}")
        return
    names, written = done
    if "resize" in entry:
        ours = {row[0] for row in mine}
        if names != ours:
            only = sorted(names - ours)[:3], sorted(ours - names)[:3]
            derived.odd.append(f"resize: library only {only[0]}, ours only {only[1]}")
        if set(written) - set(keys):
            derived.odd.append(f"resize: library writes {written}, ours {keys}")


# --- the whole table -----------------------------------------------------------------------------

_CLASSES: dict[str, type[PreTrainedModel]] = {}


def work(name: str) -> tuple[str, dict[str, Any], list[str], str]:
    """Describe one class (`Name` or `Name?variant`) under a deadline; a failure is a remark."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"more than {TIMEOUT_S} s")

    cls = _CLASSES[name.partition("?")[0]]
    key, value = VARIANTS.get(cls.config_class.model_type, ("", None))
    other = {key: value} if "?" in name else {}
    signal.signal(signal.SIGALRM, expired)
    signal.alarm(TIMEOUT_S)
    try:
        return (name, *describe(cls, **other))
    except Exception as exc:
        signal.alarm(0)
        return name, static(cls), [f"{type(exc).__name__}: {exc}".splitlines()[0][:200]], "static"
    finally:
        signal.alarm(0)


def work_list() -> list[str]:
    """Return the names of everything to describe, variants after their class."""
    names = []
    for name, cls in sorted(_CLASSES.items()):
        names.append(name)
        if cls.config_class.model_type in VARIANTS:
            names.append(f"{name}?{VARIANTS[cls.config_class.model_type][0]}")
    return names


def static(cls: type[PreTrainedModel]) -> dict[str, Any]:
    """Return what the class says without being built."""
    entry: dict[str, Any] = {"type": cls.config_class.model_type, "static": True}
    if cls.base_model_prefix:
        entry["prefix"] = cls.base_model_prefix
    keys = getattr(cls, "_tied_weights_keys", None)
    if isinstance(keys, dict) and keys:
        plain = {t: s for t, s in keys.items() if re.fullmatch(r"[\w.]+", t + s)}
        if plain:
            entry["ties"] = [[target, source, 0] for target, source in plain.items()]
            default = bool(getattr(cls.config_class, FLAG, False))
            entry["flags"] = [{"keys": [FLAG], "defaults": [default]}]
            nested = "text_config" in (cls.config_class.sub_configs or {})
            size = "text_config.vocab_size" if nested else "vocab_size"
            rows = [[source, "input", 0, size, 0] for source in dict.fromkeys(plain.values())]
            rows += [[target, "head", 0, size, 0] for target in plain]
            if all(row[0].endswith(".weight") for row in rows):
                entry["vocabulary"], entry["resize"] = rows, [size]
    return entry


def type_defaults() -> dict[str, bool]:
    """Return the flag's default by model_type, for parts whose class the checkpoint chooses."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = {}
    for kind in sorted(CONFIG_MAPPING.keys()):
        try:
            found[kind] = bool(getattr(CONFIG_MAPPING[kind](), FLAG, False))
        except Exception:
            found[kind] = bool(getattr(CONFIG_MAPPING[kind], FLAG, False))
    return found


def auto_classes() -> dict[str, dict[str, str]]:
    """Return the class by model_type for each kind of automatic model."""
    result = {}
    for kind, attribute in HEAD_MAPS:
        names = getattr(modeling_auto, attribute, {})
        result[kind] = {
            model_type: value if isinstance(value, str) else value[0]
            for model_type, value in sorted(names.items())
            if (value if isinstance(value, str) else value[0]) in _CLASSES
        }
    return result


def write(entries: dict[str, dict[str, Any]]) -> None:
    """Write the table, one architecture per line."""

    def compact(value: object) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    lines = ["{", f'"format":{FORMAT},', f'"transformers":{compact(transformers.__version__)},']
    lines.append('"auto":{')
    kinds = auto_classes()
    lines.append(",\n".join(f"{compact(kind)}:{compact(names)}" for kind, names in kinds.items()))
    lines.append("},")
    lines.append(f'"tied_by_default":{compact(type_defaults())},')
    lines.append('"architectures":{')
    lines.append(
        ",\n".join(f"{compact(name)}:{compact(entry)}" for name, entry in sorted(entries.items()))
    )
    lines.append("}\n}\n")
    TARGET.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Generate, write and summarise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="print these instead of writing the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _CLASSES.update(model_classes())
    if options.only:
        for name in options.only:
            print(json.dumps(work(name), indent=1))
        return
    entries, how, remarks = {}, Counter(), []
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=100) as pool:
        results = pool.imap_unordered(work, work_list(), chunksize=4)
        for done, (name, entry, odd, kind) in enumerate(results, 1):
            entries[name] = entry
            how[kind] += 1
            remarks += [f"{name}: {kind}: {remark}" for remark in odd]
            if done % 100 == 0:
                print(f"{done}/{len(work_list())}", file=sys.stderr, flush=True)
    for name in [name for name in entries if "?" in name]:
        key, value = VARIANTS[entries[name]["type"]]
        entries[name.partition("?")[0]].setdefault("variants", []).append([key, value, name])
    write(entries)
    for remark in sorted(remarks):
        print(remark)
    print(f"{len(entries)} architectures: {dict(sorted(how.items()))}")


if __name__ == "__main__":
    main()
