"""The parameters that compressed-tensors' config gives, and which of them are a module's.

A config has groups; each names its targets (modules by name, `re:` patterns at the beginning of a
name, classes) and how their weights are quantized. Source: the config files of compressed-tensors
0.4 to 0.20 and the precedence that its documentation gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant.group import Stored

_PATTERN = "re:"
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_EMBEDDINGS = ("embed_tokens", "embed", "embeddings", "word_embeddings", "wte", "tok_embeddings")
"""Last parts of the names of modules of the class Embedding; every other one is a Linear."""
_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the weights of a group of modules are quantized; `strategy` says what shares a scale."""

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    layout: str | None
    """The name of the format that the weights are stored in, where the config says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigGroup:
    """A group of the config: the modules it is for, and their scheme, None without weights."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme | None


def read(stored: Stored) -> tuple[ConfigGroup, ...]:
    """Return the groups of the config, in its order.

    Raises:
        CheckpointCorrupt: something in them is not what it should be; names the group.
        CheckpointUnsupported: a strategy or type that no weight has, or a preset by name.
    """
    declared = stored.quantization.get("config_groups")
    if declared is None:
        return ()
    if not isinstance(declared, Mapping):
        raise _corrupt(stored.path, "config_groups", "groups by name", declared)
    layout = _text(stored.path, "format", stored.quantization.get("format"))
    return tuple(_group(stored.path, str(name), value, layout) for name, value in declared.items())


def of_module(groups: Sequence[ConfigGroup], module: str) -> tuple[Scheme, ...]:
    """Return the scheme of a module, or all that may be its own where no target decides.

    As the library has it, a name decides before a pattern, a pattern before a class; of several
    the first in alphabetical order.
    """
    with_weights = [group for group in groups if group.scheme is not None]
    named = [(target, group) for group in with_weights for target in group.targets]
    named.sort(key=lambda pair: (_PATTERN in pair[0], pair[0]))
    of_class = "Embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "Linear"
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: matches(target, module),
        lambda target: target == of_class,
    )
    for test in tests:
        for target, group in named:
            if group.scheme is not None and test(target):
                return (group.scheme,)
    return tuple(dict.fromkeys(group.scheme for group in with_weights if group.scheme is not None))


def matches(target: str, module: str) -> bool:
    """Return whether a target means the module of this name."""
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), module) is not None
    return target == module


def _group(path: Path, name: str, value: Any, layout: str | None) -> ConfigGroup:
    field = f"config_groups.{name}"
    if isinstance(value, list):
        raise CheckpointUnsupported(
            f"{field} is a preset by name, without its parameters",
            path=path,
            expected="a group with targets and weights",
            hint="load it with compressed-tensors and save it, which writes them out",
        )
    if not isinstance(value, Mapping):
        raise _corrupt(path, field, "a group with targets and weights", value)
    targets = value.get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise _corrupt(path, f"{field}.targets", "a list of names", targets)
    for target in targets:
        _check_pattern(path, f"{field}.targets", target)
    weights = value.get("weights")
    scheme = None
    if weights is not None:
        if not isinstance(weights, Mapping):
            raise _corrupt(path, f"{field}.weights", "parameters by name", weights)
        own = _text(path, f"{field}.format", value.get("format"))
        scheme = _scheme(path, f"{field}.weights", weights, own or layout)
    return ConfigGroup(name=name, targets=tuple(targets), scheme=scheme)


def _scheme(path: Path, field: str, weights: Mapping[str, Any], layout: str | None) -> Scheme:
    bits = _number(path, f"{field}.num_bits", weights.get("num_bits", 8), lowest=1)
    kind = (_text(path, f"{field}.type", weights.get("type")) or "int").lower()
    if kind not in ("int", "float"):
        _unsupported(path, f"{field}.type", "int or float", kind)
    group_size = weights.get("group_size")
    if group_size is not None:
        group_size = _number(path, f"{field}.group_size", group_size, lowest=-1)
    strategy = (_text(path, f"{field}.strategy", weights.get("strategy")) or "").lower()
    if not strategy:  # what the library takes for granted without one
        strategy = "tensor" if group_size is None else "group" if group_size > 0 else "channel"
    if strategy not in _STRATEGIES:
        _unsupported(path, f"{field}.strategy", f"one of {', '.join(_STRATEGIES)}", strategy)
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise _corrupt(path, f"{field}.symmetric", "true or false", symmetric)
    return Scheme(
        bits=bits,
        kind=kind,
        strategy=strategy,
        group_size=group_size if group_size is not None and group_size > 0 else None,
        block=_block(path, f"{field}.block_structure", weights.get("block_structure")),
        symmetric=symmetric,
        layout=layout,
    )


def _block(path: Path, field: str, value: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block: a pair, or text like 128x128 in old files."""
    if value is None:
        return None
    pair = value.split("x") if isinstance(value, str) else value
    if isinstance(value, str) and all(one.isascii() and one.isdigit() for one in pair):
        pair = [int(one) for one in pair if len(one) < 10]
    if not isinstance(pair, list) or len(pair) != 2:
        raise _corrupt(path, field, "rows and columns", value)
    rows, columns = (_number(path, field, one, lowest=1) for one in pair)
    return rows, columns


def _number(path: Path, field: str, value: Any, *, lowest: int) -> int:
    if type(value) is not int or not lowest <= value < _LIMIT:
        raise _corrupt(path, field, f"a whole number from {lowest} on", value)
    return value


def _text(path: Path, field: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _corrupt(path, field, "a name", value)
    return value


def _check_pattern(path: Path, field: str, target: str) -> None:
    try:
        if target.startswith(_PATTERN):
            re.compile(target.removeprefix(_PATTERN))
    except (re.error, RecursionError, OverflowError):
        raise _corrupt(path, field, "a regular expression", target) from None


def _corrupt(path: Path, field: str, expected: str, found: Any) -> CheckpointCorrupt:
    return CheckpointCorrupt(
        f"quantization config: {field} is wrong",
        path=path,
        expected=expected,
        found=repr(found)[:80],
    )


def _unsupported(path: Path, field: str, expected: str, found: str) -> NoReturn:
    raise CheckpointUnsupported(
        f"quantization config: {field} is not decoded",
        path=path,
        expected=expected,
        found=found[:80],
        hint="dequantize it with compressed-tensors, and save that",
    )
