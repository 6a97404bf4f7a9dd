"""The names of an adapter's tensors, taken apart.

PEFT writes `base_model.model.<module>.lora_A.weight`; others leave the prefix out or wrap more
around it, or keep the adapter's name (`lora_A.default.weight`). Whole modules that were trained
come as `<module>.weight`, from some trainers as `<module>.modules_to_save.default.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_PREFIXES = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")
_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PART = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>.+?))?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(
    r"(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?"
)
_SAVED = re.compile(
    r"(?P<module>.+?)\.(?:modules_to_save|ln_tuning_layers)\."
    r"(?:(?P<adapter>[^.]+)\.)?(?P<leaf>weight|bias)"
)
_OTHER = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<kind>lora_E|ia3_l|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|vera_lambda_[bd]"
    r"|oft_R|boft_[Rs]|fourierft_spectrum|c3a_kernel|hra_u)"
    r"(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?"
)
_SHARED = re.compile(r"(?:base_model\.)?(?P<kind>vera_[AB])(?:\.(?P<adapter>[^.]+))?")
_ORIGINAL = re.compile(r".+\.original_module\..+")
_KINDS = {"lora_A": "down", "lora_B": "up", "lora_embedding_A": "down", "lora_embedding_B": "up"}


@dataclass(slots=True)
class Factors:
    """The names of the tensors that belong to one adapted module; absent ones are None."""

    down: str | None = None
    up: str | None = None
    bias: str | None = None
    magnitude: str | None = None
    embedding: bool = False


@dataclass(slots=True)
class Keys:
    """An adapter's tensors by what they are for.

    `factors` by module, `others` the parts of methods besides LoRA, by module and kind (those that
    all modules share stand under the module ""), `tokens` by embedding, `values` by the tensor of the model that they
    replace. `saved` are those of `values` that were trained, as their names say themselves.
    `originals` are copies of the base's own weights, which nobody needs.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    others: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    saved: set[str] = field(default_factory=set)
    originals: list[str] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)
    repeated: list[str] = field(default_factory=list)


def parse(names: Iterable[str]) -> Keys:
    """Return the tensors `names` taken apart; every name is somewhere in the result."""
    keys = Keys()
    for name in names:
        key = plain(name)
        if _ORIGINAL.fullmatch(key):
            keys.originals.append(name)
        elif match := _PART.fullmatch(key):
            _take_part(keys, match, name)
        elif match := _OTHER.fullmatch(key):
            _note_adapter(keys, match)
            _put(keys, keys.others.setdefault(match["module"], {}), match["kind"], name)
        elif match := _SHARED.fullmatch(key):
            _put(keys, keys.others.setdefault("", {}), match["kind"], name)
        elif match := _TOKENS.fullmatch(key):
            _note_adapter(keys, match)
            _put(keys, keys.tokens, match["module"], name)
        elif match := _SAVED.fullmatch(key):
            _note_adapter(keys, match)
            target = f"{match['module']}.{match['leaf']}"
            keys.saved.add(target)
            _put(keys, keys.values, target, name)
        else:
            _put(
                keys,
                keys.values,
                key.replace("token_adapter.", "").replace("base_layer.", ""),
                name,
            )
    return keys


def plain(name: str) -> str:
    """Return a tensor's name without what wrappers of the model put around it."""
    while (found := next((p for p in _PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(found)
    for infix in _INFIXES:
        name = name.replace(infix, "")
    return name


def _take_part(keys: Keys, match: re.Match[str], name: str) -> None:
    _note_adapter(keys, match)
    factors = keys.factors.setdefault(match["module"], Factors())
    part = _KINDS.get(match["kind"], "magnitude")
    if match["leaf"] == "bias":
        part = "bias" if match["kind"] == "lora_B" else "nothing"
    factors.embedding |= match["kind"].startswith("lora_embedding")
    if getattr(factors, part, name) is not None:
        keys.repeated.append(name)
    else:
        setattr(factors, part, name)


def _note_adapter(keys: Keys, match: re.Match[str]) -> None:
    if match["adapter"] is not None:
        keys.adapters.add(match["adapter"])


def _put(keys: Keys, where: dict[str, str], key: str, name: str) -> None:
    if key in where:
        keys.repeated.append(name)
    else:
        where[key] = name
