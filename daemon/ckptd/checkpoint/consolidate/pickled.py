"""Weights in files of `torch.save`: pytorch_model.bin, state dicts, Lightning's single file.

A file holds a state dict, or a dict that has one under a known key beside the optimizer's state.
Tensors that share a storage are one parameter under two names: both get the same bytes here.
Sources: `transformers` before safetensors, `accelerate` (full state dict), Lightning, Composer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import index, pieces, sidefiles, torch_file
from ckptd.checkpoint.consolidate import foreign
from ckptd.checkpoint.consolidate.gathered import Gathered, has_plain_weights
from ckptd.checkpoint.header import FileStamp
from ckptd.checkpoint.inert import Inert, TensorRef
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Tensor
from ckptd.checkpoint.torch_file import TorchFile
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

INDEX_NAME = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth", ".pth.tar", ".ckpt")
"""What a person may name as a single file."""
_KNOWN = ("pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model/pytorch_model_fsdp.bin")
_CONTAINERS = (
    ("state_dict",), ("model_state_dict",), ("model",), ("module",), ("state", "model"),
    ("net",), ("app", "model"),
)  # fmt: skip
"""Where trainers put the state dict beside their own state."""
_NOT_WEIGHTS = (
    "meta.pt", "data.pt", "*_states.pt", "*world_size_*", "*_rank[0-9]*.bin", "model_optim_rng.pt",
    "common.pt", "adapter_model.bin", "value_head.bin", "random_states*", "recipe_state.pt",
    "train_state.pt",
)  # fmt: skip


def is_file(path: Path) -> bool:
    """Return whether `path` is a file of pickled weights by name, and no folder."""
    return path.name.endswith(SUFFIXES) and path.is_file()


@dataclass(frozen=True, slots=True)
class Pickled:
    """A folder (or a single file) of files of `torch.save`; `suffixes` are those of this layout."""

    name: str
    suffixes: tuple[str, ...]

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file of weights, where no safetensors are beside it."""
        if has_plain_weights(listing):
            return None
        found = self._candidates(listing)
        return f"{found[0]} is there" if found else None

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return the index, which is the last file of a sharded save."""
        return INDEX_NAME if INDEX_NAME in listing.by_name else None

    def holds(self, relpath: str) -> bool:
        """Return whether it is such a file."""
        return relpath.endswith(SUFFIXES) and _may_hold(relpath)

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the tensors of the index's shards, or of the one file."""
        if INDEX_NAME in listing.by_name:
            return _indexed(path, listing)
        found = self._candidates(listing)
        if not found:
            raise CheckpointIncomplete(
                "no pickled weights", path=path, expected=_KNOWN[0], hint="wait for the save to end"
            )
        if len(found) > 1:
            raise CheckpointUnsupported(
                f"holds {len(found)} files of pickled weights",
                path=path,
                found=", ".join(found[:6]),
                hint="name one of these files instead of the folder",
            )
        return of_file(path / found[0])

    def _candidates(self, listing: Listing) -> list[str]:
        names = listing.by_name
        if self.name == "pickled":
            for known in (INDEX_NAME, *_KNOWN):
                if known in names:
                    return [known]
        found = [name for name in names if name.endswith(self.suffixes) and _may_hold(name)]
        # A link to another of them is a name for the newest (Composer's latest-rank0.pt).
        real = {(names[n].dev, names[n].ino) for n in found if not names[n].is_link}
        return [
            n for n in found if not names[n].is_link or (names[n].dev, names[n].ino) not in real
        ]


PICKLED = Pickled("pickled", (".bin", ".pt", ".pth", ".pth.tar"))
LIGHTNING = Pickled("lightning", (".ckpt",))


def of_file(path: Path) -> Gathered:
    """Return the tensors of the state dict in the file at `path`.

    Raises:
        CheckpointUnsupported: it holds none, or what is no plain tensor.
        CheckpointCorrupt: it is cut short, or no file of `torch.save`.
    """
    file = torch_file.read(path)
    state, step = _state_dict(file)
    tensors, notes = _tensors(file, state)
    return Gathered(tensors=tensors, stamps={file.path: file.stamp}, notes=tuple(notes), step=step)


def _may_hold(relpath: str) -> bool:
    if relpath in _KNOWN:
        return True
    if "/" in relpath or sidefiles.fate(relpath) is not sidefiles.Fate.WEIGHTS:
        return False
    return not any(fnmatch.fnmatchcase(relpath, pattern) for pattern in _NOT_WEIGHTS)


def _indexed(path: Path, listing: Listing) -> Gathered:
    weight_map = index.read_weight_map(path / INDEX_NAME, suffix=".bin")
    stamps: dict[Path, FileStamp] = {}
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if shard not in listing.by_name:
            raise CheckpointIncomplete(
                f"the index names a shard that is not there: {shard}",
                path=path / INDEX_NAME,
                hint="wait for the save to end, or copy the missing shard",
            )
        file = torch_file.read(path / shard)
        found, said = _tensors(file, _state_dict(file)[0])
        for name, tensor in found.items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
            else:
                said.append(f"{name} of {shard} is not in the index and was left out")
        notes += said
        stamps[file.path] = file.stamp
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointCorrupt(
                "the index names it, its shard does not hold it", path=path / shard, tensor=name
            )
    return Gathered(tensors=tensors, stamps=stamps, notes=tuple(notes))


def _state_dict(file: TorchFile) -> tuple[Mapping[Any, Any], int | None]:
    """Return the state dict of a file, and the training step beside it, if any.

    Raises:
        CheckpointUnsupported: there is none; says what is there instead.
    """
    value = file.value
    if not isinstance(value, Mapping):
        kind = value.name if isinstance(value, Inert) else type(value).__name__
        raise CheckpointUnsupported(
            f"holds a {kind}, not a state dict",
            path=file.path,
            hint="save model.state_dict(), not the model: reading a class would run its code",
        )
    foreign.require_known_file(value, file.path)
    step = value.get("global_step")
    step = step if type(step) is int else None
    if _is_state_dict(value):
        return value, step
    for keys in _CONTAINERS:
        inner: Any = value
        for key in keys:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and _is_state_dict(inner):
            return inner, step
        if isinstance(inner, Inert):
            raise CheckpointUnsupported(
                f"a whole {inner.name} was pickled under {keys[-1]!r}, not its state dict",
                path=file.path,
                hint="save its state_dict(): reading a class would run its code",
            )
    raise CheckpointUnsupported(
        "holds no state dict",
        path=file.path,
        found=", ".join(str(key)[:40] for key in list(value)[:8]) or "an empty dict",
        hint="a state dict maps names to tensors, itself or under state_dict or model",
    )


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    named = [v for k, v in value.items() if isinstance(k, str) and "." in k]
    return any(isinstance(v, TensorRef | Inert) for v in named) or (
        bool(value) and all(isinstance(v, TensorRef) for v in value.values())
    )


def _tensors(file: TorchFile, state: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    tensors: dict[str, Tensor] = {}
    left_out = []
    for name, value in state.items():
        if isinstance(value, TensorRef) and isinstance(name, str):
            tensors[name] = pieces.stored(file, value, name)
        elif isinstance(value, Inert) and not str(name).endswith("_extra_state"):
            raise CheckpointUnsupported(
                f"is a {value.of}, which is not a plain tensor",
                path=file.path,
                tensor=str(name),
                hint="save the full, plain state dict",
            )
        else:
            left_out.append(str(name))
    notes = [f"{file.path.name}: no tensors, left out: {', '.join(left_out[:5])}"]
    return tensors, notes if left_out else []
