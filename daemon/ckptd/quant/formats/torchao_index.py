"""torchao's index: what the metadata of safetensors headers says of each tensor of a state dict.

For every tensor the metadata has a JSON object of its class (`_type`), its attributes (`_data`)
and the names of the tensors inside (`_tensor_data_names`). These are stored as `MODULE._PARAM_x`,
by torchao 0.14 as `MODULE.PARAM:x`; a plain tensor is stored under its name, by 0.14 as
`NAME:_data`. Each file may describe all tensors or its own, so that the metadata of all is merged.
Modules may have been renamed in the files alone.
Source: flatten_tensor_state_dict of torchao 0.14 to 0.18.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant.group import Stored

PLAIN = "Tensor"
_NAMES_KEY = "tensor_names"
_OLD_FIELDS = ("qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale")
"""The inner tensors that torchao 0.14 could save; it does not list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of the state dict: its class, attributes and the stored tensors inside it."""

    path: Path
    name: str
    kind: str
    attributes: Mapping[str, Any]
    inner: Mapping[str, StoredTensor]

    def tensor(self, field: str) -> StoredTensor:
        """Return an inner tensor that the class cannot do without.

        Raises:
            CheckpointCorrupt: it is not listed.
        """
        if field not in self.inner:
            self.corrupt("an inner tensor is missing", expected=field, found=", ".join(self.inner))
        return self.inner[field]

    def dtype(self, key: str) -> Dtype:
        """Return the plain float that the attribute `key` names.

        Raises:
            CheckpointCorrupt: it is not the name of one.
        """
        found = _dtype_name(self.attributes.get(key))
        try:
            dtype = dtypes.from_torch_name(found)
        except ValueError:
            dtype = None
        if dtype is None or not dtype.is_plain_float:
            shown = repr(self.attributes.get(key))[:80]
            self.corrupt(f"{key} is not a dtype of weights", expected="bfloat16...", found=shown)
        return dtype

    def dtype_name(self, key: str) -> str:
        """Return the name of a dtype, which torch need not be able to compute in; "" if none."""
        return _dtype_name(self.attributes.get(key))

    def sizes(self, key: str, count: int) -> tuple[int, ...]:
        """Return an attribute of `count` positive whole numbers.

        Raises:
            CheckpointCorrupt: it is something else.
        """
        found = self.attributes.get(key)
        whole = isinstance(found, list) and all(type(one) is int and one >= 0 for one in found)
        if not isinstance(found, list) or not whole or len(found) != count:
            self.corrupt(
                f"{key} is wrong", expected=f"{count} whole numbers", found=repr(found)[:80]
            )
        return tuple(found)

    def size(self, key: str) -> int:
        """Return an attribute that is one positive whole number.

        Raises:
            CheckpointCorrupt: it is something else.
        """
        found = self.attributes.get(key)
        if type(found) is not int or found < 1:
            self.corrupt(f"{key} is wrong", expected="a whole number", found=repr(found)[:80])
        return found

    def flag(self, key: str) -> bool:
        """Return an attribute that is true or false; false where it is missing.

        Raises:
            CheckpointCorrupt: it is something else.
        """
        found = self.attributes.get(key, False)
        if not isinstance(found, bool):
            self.corrupt(f"{key} is wrong", expected="true or false", found=repr(found)[:80])
        return found

    def check(self, field: str, shape: tuple[int, ...], allowed: tuple[Dtype, ...]) -> StoredTensor:
        """Return an inner tensor after a look at its shape and dtype.

        Raises:
            CheckpointCorrupt: it is missing, or not of that shape or one of those dtypes.
        """
        tensor = self.tensor(field)
        if tensor.spec.shape != shape or tensor.spec.dtype not in allowed:
            self.mismatch(tensor, f"{' or '.join(allowed)} {list(shape)}")
        return tensor

    def mismatch(self, tensor: StoredTensor, expected: str) -> NoReturn:
        """Raise CheckpointCorrupt for an inner tensor of a wrong shape or dtype."""
        raise CheckpointCorrupt(
            f"does not fit {self.name}, a {self.kind}",
            path=tensor.extent.path,
            tensor=tensor.spec.name,
            expected=expected,
            found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
            hint="save the model again with torchao",
        )

    def corrupt(self, what: str, *, expected: str, found: str) -> NoReturn:
        """Raise CheckpointCorrupt for the entry."""
        raise CheckpointCorrupt(
            f"{self.kind}: {what}",
            path=self.path,
            tensor=self.name,
            expected=expected,
            found=found or "none",
            hint="save the model again with torchao",
        )

    def unsupported(self, what: str, *, expected: str, found: str) -> NoReturn:
        """Raise CheckpointUnsupported for a variant that is not decoded."""
        raise CheckpointUnsupported(
            f"{self.kind}: {what}",
            path=self.path,
            tensor=self.name,
            expected=expected,
            found=found,
            hint="dequantize it with torchao and save that",
        )


def classes(stored: Stored) -> dict[str, str]:
    """Return the class of every tensor that the metadata describes, by name."""
    return {name: str(said["_type"]) for name, said in _described(stored)}


def entries(stored: Stored) -> Iterator[Entry]:
    """Yield every tensor that is not plain, in the order of names.

    Raises:
        CheckpointCorrupt: files contradict each other, a description is not one, or an inner tensor
            that it lists is in no file.
    """
    said_of: dict[str, Mapping[str, Any]] = {}
    for name, said in _described(stored):
        if said_of.setdefault(name, said) != said:
            raise CheckpointCorrupt(
                "two files describe it differently", path=stored.path, tensor=name
            )
    _require_all(stored, said_of)
    moved = _moved(stored, said_of)
    for name, said in sorted(said_of.items()):
        if said["_type"] != PLAIN:
            yield _entry(stored, moved.get(name, name), said)


def renamed(stored: Stored) -> tuple[tuple[str, str], ...]:
    """Return plain tensors that are stored under another name, with their own."""
    suffix = ":_data"
    return tuple(
        (name + suffix, name)
        for name, kind in sorted(classes(stored).items())
        if kind == PLAIN and name + suffix in stored.tensors
    )


def _described(stored: Stored) -> Iterator[tuple[str, Mapping[str, Any]]]:
    seen: set[tuple[str, str]] = set()  # every shard may describe every tensor
    for metadata in stored.metadata:
        for name, text in metadata.items():
            if name == _NAMES_KEY or not text.startswith("{") or (name, text) in seen:
                continue
            seen.add((name, text))
            try:
                said = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(said, dict) and isinstance(said.get("_type"), str):
                yield name, said


def _require_all(stored: Stored, said_of: Mapping[str, Mapping[str, Any]]) -> None:
    for metadata in stored.metadata:
        try:
            names = json.loads(metadata.get(_NAMES_KEY, "[]"))
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointCorrupt(
                f"{_NAMES_KEY} in the metadata of safetensors is not a list of names",
                path=stored.path,
            )
        for name in names:
            if name not in said_of:
                raise CheckpointCorrupt(
                    "the metadata of safetensors lists it and does not describe it",
                    path=stored.path,
                    tensor=name,
                )


def _moved(stored: Stored, said_of: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the names that entries have in the files, where these are not those of the metadata.

    transformers renames the modules of some architectures as it saves (a vision model's beside a
    language model's), in the files alone. What ends alike and has the same numbers is one tensor,
    the longest endings first; an ending that two share says nothing.
    """
    fields = {name: field for name, said in said_of.items() if (field := _first_field(said))}
    lost = {name for name, field in fields.items() if _place(name, field) not in stored.tensors}
    if not lost:
        return {}
    taken = {_place(name, field) for name, field in fields.items() if name not in lost}
    parameters = {name: name.rpartition(".")[2] for name in lost}
    ends = {_place(parameter, fields[name]): parameter for name, parameter in parameters.items()}
    free = set()
    for key in stored.tensors:
        module, dot, leaf = key.rpartition(".")
        if dot + leaf in ends and key not in taken:
            free.add(f"{module}.{ends[dot + leaf]}")
    return _paired(lost, free)


def _paired(lost: set[str], free: set[str]) -> dict[str, str]:
    """Return which of `free` each of `lost` is called now, as far as their endings tell."""
    pairs: dict[str, str] = {}
    longest = max((name.count(".") + 1 for name in lost), default=0)
    for length in range(longest, 1, -1):
        here, there = (_by_ending(names, length) for names in (lost, free))
        for ending, names in here.items():
            places = there.get(ending, [])
            if len(names) == len(places) == 1:
                pairs[names[0]] = places[0]
        lost, free = lost - pairs.keys(), free - set(pairs.values())
    return pairs


def _by_ending(names: set[str], length: int) -> dict[tuple[str, ...], list[str]]:
    """Return the names by their last parts and all their numbers."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parts = name.split(".")
        ending = (*parts[-length:], "", *filter(str.isdecimal, parts))
        found.setdefault(ending, []).append(name)
    return found


def _first_field(said: Mapping[str, Any]) -> str | None:
    fields = said.get("_tensor_data_names")
    return fields[0] if isinstance(fields, list) and fields and isinstance(fields[0], str) else None


def _place(name: str, field: str) -> str:
    """Return the name in a file of an inner tensor of `name`."""
    module, _, parameter = name.rpartition(".")
    return f"{module}._{parameter}_{field}"


def _entry(stored: Stored, name: str, said: Mapping[str, Any]) -> Entry:
    attributes = said.get("_data")
    prefixes = (_place(name, ""), f"{name}:")
    fields = said.get("_tensor_data_names")
    if fields is None:
        fields = [field for field in _OLD_FIELDS if f"{name}:{field}" in stored.tensors]
    entry = Entry(path=stored.path, name=name, kind=said["_type"], attributes={}, inner={})
    if not isinstance(attributes, dict):
        entry.corrupt("_data is wrong", expected="an object", found=repr(attributes)[:80])
    if not isinstance(fields, list) or not all(isinstance(field, str) for field in fields):
        entry.corrupt("_tensor_data_names is wrong", expected="names", found=repr(fields)[:80])
    inner = {}
    for field in fields:
        places = [prefix + field for prefix in prefixes if prefix + field in stored.tensors]
        if not places:
            entry.corrupt(
                "an inner tensor is in no file", expected=prefixes[0] + field, found="none"
            )
        inner[field] = stored.tensors[places[0]]
    return Entry(
        path=stored.path, name=name, kind=said["_type"], attributes=attributes, inner=inner
    )


def _dtype_name(value: Any) -> str:
    if isinstance(value, dict) and value.get("_type") == "torch.dtype":
        value = value.get("_data")
    return value if isinstance(value, str) else ""
