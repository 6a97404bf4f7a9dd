"""The content of a configuration: as one dict, as what must be saved, and its text part.

Owns: which keys go into config.json. A key stays out only if every reader, transformers included,
finds the same value without it. Pure functions of a configuration; they change nothing.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ckptd.models.config import config_values

if TYPE_CHECKING:
    from ckptd.models.config.config import PreTrainedConfig

FORMAT_VERSION = "5.24.0"
"""The transformers release whose config.json we write; goes out as `transformers_version`."""

_DECODER_PARTS = ("decoder", "generator", "text_config")
_ENCODER_PARTS = ("text_encoder",)
_ALWAYS = frozenset({"model_type", "architectures", "dtype"})


def full(config: PreTrainedConfig) -> dict[str, Any]:
    """Return every value of `config`, as JSON can hold it; `_name_or_path` included."""
    result = {
        key: config_values.plain(value)
        for key, value in vars(config).items()
        if key not in config_values.RUNTIME_KEYS
        and (not key.startswith("_") or key == "_name_or_path" or key in config._given)
    }
    result["output_attentions"] = config.output_attentions
    result["model_type"] = config.model_type
    result["transformers_version"] = FORMAT_VERSION
    return result


def difference(
    config: PreTrainedConfig, *, base: dict[str, Any], keep: frozenset[str]
) -> dict[str, Any]:
    """Return what a file must say: all but values that are the default of base class and class.

    `base` is the content of an empty configuration, `keep` names keys that stay in any case.
    """
    result = {}
    for key, value in config.to_dict().items():
        part = vars(config).get(key)
        if key == "_name_or_path" or (key == "quantization_config" and value is None):
            continue
        if part is not None and hasattr(part, "to_diff_dict"):
            result[key] = part.to_diff_dict()
            del result[key]["transformers_version"]
        elif _must_be_said(key, value, base, type(config)) or key in keep:
            result[key] = value
    return result


def _must_be_said(key: str, value: Any, base: dict[str, Any], config_class: type) -> bool:
    if key == "transformers_version" or key not in base or value != base[key]:
        return True
    if key in _ALWAYS:
        return bool(value)
    default = getattr(config_class, key, None)
    return key in config_class.__dict__ and default is not None and value != default


def text_part(
    config: PreTrainedConfig, *, decoder: bool | None, encoder: bool | None
) -> PreTrainedConfig:
    """Return the nested configuration of the text model; `config` itself where there is none.

    Asked for one side of a flat encoder-decoder, it is a copy in which `decoder_layers` (or
    `encoder_layers`) is `num_hidden_layers`, and so on for that side's keys.

    Raises:
        ValueError: more than one nested configuration could be meant.
    """
    both = decoder == encoder
    names = (
        _ENCODER_PARTS + _DECODER_PARTS if both else _DECODER_PARTS if decoder else _ENCODER_PARTS
    )
    found = [name for name in names if getattr(config, name, None) is not None]
    if len(found) > 1:
        raise ValueError(
            f"{type(config).__name__} has several text configurations ({', '.join(found)}): "
            f"take the one that is meant, such as config.{found[0]}"
        )
    if found:
        part: PreTrainedConfig = getattr(config, found[0])
        return part
    if both or not config.is_encoder_decoder:
        return config
    return _one_side(config, "decoder" if decoder else "encoder")


def _one_side(config: PreTrainedConfig, side: str) -> PreTrainedConfig:
    """Return a copy of a flat encoder-decoder's configuration as that of one of its sides."""
    result = copy.deepcopy(config)
    short = {
        f"{side}_layers": "num_hidden_layers",
        f"{side}_attention_heads": "num_attention_heads",
    }
    for key in [key for key in vars(result) if key.startswith(side)]:
        name = short.get(key, key.removeprefix(f"{side}_"))
        name = result.attribute_map.get(name, name)
        vars(result)[name] = vars(result).pop(key)
    return result
