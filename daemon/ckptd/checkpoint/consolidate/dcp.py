"""Checkpoints of torch's distributed checkpoint (DCP): `.metadata` and `.distcp` files.

`.metadata` is a pickle of which tensor has which chunks, and where each chunk's archive lies: a
`torch.save` file at (offset, length) of a `.distcp` file. Read here are the model's tensors alone;
optimizer, scheduler and data loader are recognised by the first part of their names. What saves so:
FSDP2 and accelerate (`pytorch_model_fsdp_0`), torchtitan, prime-rl, Lightning's distributed folder.
Source: `torch.distributed.checkpoint` (metadata, filesystem).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import dtypes, inert, pieces, torch_file
from ckptd.checkpoint.consolidate.gathered import Gathered, has_plain_weights
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import FileStamp, TensorSpec
from ckptd.checkpoint.inert import TensorRef
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Box, Tensor
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

METADATA_NAME = ".metadata"
MAX_METADATA_BYTES = 128 << 20
"""Half a million chunks: more is refused before it is parsed."""
_FOLDERS = (
    "", "pytorch_model_fsdp_0/", "trainer/", "model/", "checkpoint/", "weights/", "policy/weights/",
    "policy/weights/model/",
)  # fmt: skip
"""Where below a checkpoint the model's `.metadata` may be."""
_ASSETS = (
    "huggingface", "model/.hf_metadata", "model/.hf_metadata/tokenizer", ".hf_metadata",
    "policy/weights/model/.hf_metadata", "policy/tokenizer",
)  # fmt: skip
"""Where below a checkpoint config and tokenizer may be."""
_STATE = re.compile(
    r"^(optim|optimizers?|optimizer_states?|optim_states?|lr_schedulers?|schedulers?|dataloader|"
    r"data_loader|train_state|trainer_state|progress|rng|rng_states?|random_states?|extra_state|"
    r"loss_scaler|scaler|metadata|callbacks|loops|ft_dataloader)(\.|$)"
)
_CONTAINERS = ("model", "state_dict", "module", "model_state_dict", "app", "app_state", "policy")
"""Keys of the saved dict that hold the model's state dict."""


@dataclass(frozen=True, slots=True)
class Dcp:
    """A folder with `.metadata`, itself or in the place where a trainer keeps the model's."""

    name: str = "dcp"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the metadata or the first shard."""
        if has_plain_weights(listing):
            return None
        for folder in _FOLDERS:
            if folder + METADATA_NAME in listing.by_name:
                return f"{folder}{METADATA_NAME} is there"
        shards = (n for n in listing.by_name if n.endswith(".distcp") and _folder_of(n) in _FOLDERS)
        return next((f"{name} is there" for name in shards), None)

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return meta.pt for Lightning, which writes it after the metadata; else the metadata."""
        folder = _folder(listing)
        is_lightning = folder_name.endswith(".ckpt") or "meta.pt" in listing.by_name
        return "meta.pt" if is_lightning and not folder else folder + METADATA_NAME

    def holds(self, relpath: str) -> bool:
        """Return whether it is a shard or the metadata of the model."""
        name = relpath.rpartition("/")[2]
        is_part = name.endswith((".distcp", METADATA_NAME))
        return is_part and _folder_of(relpath) in _FOLDERS

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the tensors that the metadata lists outside of the optimizer's state."""
        folder = _folder(listing)
        metadata_name = folder + METADATA_NAME
        if metadata_name not in listing.by_name:
            raise CheckpointIncomplete(
                "a distributed checkpoint without .metadata",
                path=path,
                hint="it is written last: wait for the save to end, or save again",
            )
        return _Reading(path, folder, listing).gathered()


def _folder(listing: Listing) -> str:
    held = [folder for folder in _FOLDERS if folder + METADATA_NAME in listing.by_name]
    return held[0] if held else ""


def _folder_of(relpath: str) -> str:
    folder, slash, _ = relpath.rpartition("/")
    return folder + slash


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor of the metadata: the keys that lead to it, dtype, shape and chunks."""

    keys: tuple[str, ...]
    dtype: Dtype
    shape: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the archive of a chunk lies."""

    relpath: str
    offset: int
    nbytes: int
    is_transformed: bool


class _Reading:
    """One pass over a checkpoint's metadata and the heads of its archives."""

    def __init__(self, path: Path, folder: str, listing: Listing) -> None:
        self.path = path
        self.folder = folder
        self.listing = listing
        self.metadata_path = path / folder / METADATA_NAME
        self.stamps: dict[Path, FileStamp] = {}

    def gathered(self) -> Gathered:
        """Return the tensors."""
        metadata = self._metadata()
        entries = self._entries(metadata)
        places = self._places(metadata)
        tensors = {
            name: self._tensor(name, fqn, entry, places) for name, (fqn, entry) in entries.items()
        }
        return Gathered(tensors=tensors, stamps=self.stamps, assets=_ASSETS)

    def _metadata(self) -> Mapping[str, Any]:
        with self.metadata_path.open("rb") as file:
            stamp = FileStamp.of(os.fstat(file.fileno()))
            if stamp.nbytes > MAX_METADATA_BYTES:
                raise self._corrupt("the metadata is too large", found=f"{stamp.nbytes} bytes")
            raw = file.read(stamp.nbytes)
        self.stamps[self.metadata_path] = stamp
        metadata = inert.fields(inert.loads(raw, path=self.metadata_path))
        for key in ("state_dict_metadata", "storage_data"):
            if not isinstance(metadata.get(key), Mapping):
                raise self._corrupt(f"the metadata has no {key}", found=", ".join(metadata)[:120])
        return metadata

    def _entries(self, metadata: Mapping[str, Any]) -> dict[str, tuple[str, _Entry]]:
        """Return the model's tensors by their names in its state dict.

        Raises:
            CheckpointUnsupported: none, or several state dicts that could be the model's.
        """
        data = metadata.get("planner_data")
        paths: Mapping[Any, Any] = data if isinstance(data, Mapping) else {}
        groups: dict[tuple[str, ...], dict[str, tuple[str, _Entry]]] = {}
        for fqn, described in metadata["state_dict_metadata"].items():
            if not isinstance(fqn, str) or not inert.fields(described).get("chunks"):
                continue  # bytes, not a tensor
            keys = _keys(fqn, paths.get(fqn))
            if any(_STATE.match(key) for key in keys[:-1]) or _STATE.match(keys[-1]):
                continue
            entry = self._entry(fqn, keys, inert.fields(described))
            groups.setdefault(keys[:-1], {})[keys[-1]] = (fqn, entry)
        # A step or a count beside the model is a state dict of its own, and no model.
        groups = {k: v for k, v in groups.items() if any(e.shape for _, e in v.values())} or groups
        models = {k: v for k, v in groups.items() if all(key in _CONTAINERS for key in k)}
        chosen = models or groups
        if len(chosen) != 1:
            raise CheckpointUnsupported(
                "which state dict is the model is not clear" if chosen else "holds no model",
                path=self.metadata_path,
                found=", ".join(".".join(key) or "the top level" for key in chosen) or "no tensors",
                hint="save the model's state dict under the key 'model', or alone",
            )
        return next(iter(chosen.values()))

    def _entry(self, fqn: str, keys: tuple[str, ...], described: Mapping[str, Any]) -> _Entry:
        properties = described.get("properties")
        state = properties.state if isinstance(properties, inert.Inert) else None
        kind = state[0] if isinstance(state, tuple) and state else inert.fields(state).get("dtype")
        try:
            dtype = dtypes.from_torch_name(inert.name_of(kind))
        except ValueError as error:
            raise CheckpointUnsupported(str(error), path=self.metadata_path, tensor=fqn) from None
        shape = self._sizes(fqn, described.get("size"))
        chunks = []
        for chunk in described["chunks"]:
            values = inert.fields(chunk)
            offsets, sizes = (self._sizes(fqn, values.get(key)) for key in ("offsets", "sizes"))
            if not len(offsets) == len(sizes) == len(shape):
                raise self._corrupt("a chunk has other axes than its tensor", tensor=fqn)
            chunks.append((offsets, sizes))
        return _Entry(keys=keys, dtype=dtype, shape=shape, chunks=tuple(chunks))

    def _sizes(self, fqn: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, tuple) or not all(
            type(size) is int and 0 <= size < 1 << 62 for size in value
        ):
            raise self._corrupt("a size is not one", tensor=fqn, found=repr(type(value)))
        return value

    def _places(self, metadata: Mapping[str, Any]) -> dict[tuple[str, Any], _Place]:
        """Return where the archive of each (fqn, offsets) lies; every place must be in its file.

        Raises:
            CheckpointIncomplete: a file is missing, even one that only the optimizer needs.
            CheckpointCorrupt: a place is none, or reaches out of its file.
        """
        places: dict[tuple[str, Any], _Place] = {}
        for index, info in metadata["storage_data"].items():
            key = inert.fields(index)
            fqn, offsets = key.get("fqn"), key.get("offset")
            place = self._place(str(fqn), inert.fields(info))
            if isinstance(fqn, str) and (offsets is None or _is_flat(offsets)):
                places[fqn, offsets] = place
        return places

    def _place(self, fqn: str, info: Mapping[str, Any]) -> _Place:
        name, offset, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if (
            not isinstance(name, str) or "/" in name or "\0" in name
            or type(offset) is not int or type(length) is not int or min(offset, length) < 0
        ):  # fmt: skip
            raise self._corrupt("its place is not one", tensor=fqn)
        file = self.listing.by_name.get(self.folder + name)
        if file is None:
            raise CheckpointIncomplete(
                "the metadata names a file that is not there",
                path=self.path / self.folder / name,
                tensor=fqn,
                hint="wait for the save to end, or copy the missing file",
            )
        if offset + length > file.size:
            raise CheckpointCorrupt(
                "the file is truncated",
                path=self.path / file.relpath,
                tensor=fqn,
                expected=f"at least {offset + length} bytes",
                found=f"{file.size}",
                hint="copy it again, or save again",
            )
        transforms = bool(info.get("transform_descriptors"))
        return _Place(file.relpath, offset, length, transforms)

    def _tensor(
        self,
        name: str,
        fqn: str,
        entry: _Entry,
        places: Mapping[tuple[str, Any], _Place],
    ) -> Tensor:
        boxes: list[Box] = []
        for offsets, sizes in entry.chunks:
            place = places.get((fqn, offsets))
            if place is None and len(entry.chunks) == 1:
                place = places.get((fqn, None))
            if place is None:
                if 0 in sizes:
                    continue
                raise self._corrupt("a chunk is in no file", tensor=fqn, found=f"at {offsets}")
            boxes += self._chunk(fqn, entry, offsets, sizes, place)
        spec = TensorSpec(name, entry.dtype, entry.shape)
        return pieces.assemble(spec, boxes, path=self.metadata_path)

    def _chunk(
        self,
        fqn: str,
        entry: _Entry,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        place: _Place,
    ) -> Sequence[Box]:
        if place.is_transformed:
            raise CheckpointUnsupported(
                "its chunks are compressed or otherwise transformed",
                path=self.metadata_path,
                tensor=fqn,
                hint="save without stream transforms",
            )
        path = self.path / place.relpath
        file = torch_file.read(path, offset=place.offset, nbytes=place.nbytes)
        if self.stamps.setdefault(path, file.stamp) != file.stamp:
            raise self._corrupt(
                "a shard changed while it was read", tensor=fqn, found=place.relpath
            )
        tensor = file.value
        if (
            not isinstance(tensor, TensorRef)
            or tensor.shape != sizes
            or tensor.dtype is not entry.dtype
        ):
            what = tensor if isinstance(tensor, TensorRef) else type(tensor).__name__
            raise CheckpointCorrupt(
                "a chunk is not what the metadata says",
                path=path,
                tensor=fqn,
                expected=f"{entry.dtype} {list(sizes)}",
                found=f"{what.dtype} {list(what.shape)}"
                if isinstance(what, TensorRef)
                else str(what),
            )
        return pieces.boxes_of(file, tensor, name=fqn, at=offsets)

    def _corrupt(
        self, what: str, *, tensor: str | None = None, found: str | None = None
    ) -> CheckpointCorrupt:
        return CheckpointCorrupt(what, path=self.metadata_path, tensor=tensor, found=found)


def _keys(fqn: str, path: Any) -> tuple[str, ...]:
    """Return the keys that lead to a tensor; without the planner's record, its name alone."""
    if isinstance(path, tuple) and path and all(isinstance(key, str | int) for key in path):
        return tuple(str(key) for key in path)
    return (fqn,)


def _is_flat(offsets: Any) -> bool:
    return isinstance(offsets, tuple) and all(type(at) is int for at in offsets)


DCP = Dcp()
