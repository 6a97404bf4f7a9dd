"""The weight files that a name means: in a folder, or in a repository through the Hub's cache.

Owns: which files are fetched, their headers, and turning every failure into the documented OSError
with our text. Does not own: which of two sets in a folder is the current one (checkpoint.weights),
how one file is fetched (config_source), what the tensors mean. No tensor byte is read here, and no
pickle ever.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ckptd.checkpoint import checkpoint, header, index, weights
from ckptd.checkpoint.header import FileStamp, StoredTensor
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.weights import WeightFiles
from ckptd.errors import (
    CheckFailed,
    CheckpointIncomplete,
    CheckpointRefused,
    CheckpointVanished,
    SourceChanged,
)
from ckptd.models.config import config_source
from ckptd.models.config.config_source import Source

_ANYWHERE = Path("/")
"""A person named the folder: links in it (of a model cache to its blobs) are followed."""
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which set of weights is asked for, where there could be several.

    `explicit` is the file that config.json names itself (`transformers_weights`).
    """

    variant: str | None = None
    use_safetensors: bool | None = None
    explicit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint by name, in source order, and the state of their files.

    `metadata` is that of each header. `document` returns a JSON file that lies beside the weights,
    in the folder or in the repository, or None; it is fetched when it is asked for.
    """

    origin: str
    folder: Path = Path()
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)
    metadata: tuple[Mapping[str, str], ...] = ()
    document: Callable[[str], Mapping[str, Any] | None] = lambda _name: None
    notes: tuple[str, ...] = ()


def pinned(name: str | os.PathLike[str], source: Source) -> Source:
    """Return `source` with its revision resolved to a commit, so that all files are of one state.

    Where it cannot be resolved (a local path, no connection, no such repo) `source` comes back as
    it is: fetching the first file says what is wrong.
    """
    if Path(name).expanduser().exists():
        return source
    try:
        commit = huggingface_hub.HfApi().resolve_revision(
            os.fspath(name),
            revision=source.revision or "main",
            cache_dir=None if source.cache_dir is None else Path(source.cache_dir),
            local_files_only=source.local_files_only or huggingface_hub.is_offline_mode(),
            token=source.token,
        )
    except (OSError, ValueError, hub_errors.HfHubHTTPError, hub_errors.RevisionResolutionError):
        return source
    return replace(source, revision=commit)


def read(name: str | os.PathLike[str], source: Source, wanted: Wanted) -> Weights:
    """Return the tensors of the weights that `name` means; on the Hub they are fetched first.

    Raises:
        OSError: no such folder, repo or file, only pickled weights, or files that are not whole;
            the text names the file, the tensor where one is at fault, and what to do.
        ValueError: the configuration names a weight file that is none, or outside the folder.
    """
    path = Path(name).expanduser()
    if wanted.explicit is not None:
        _check_explicit(wanted.explicit)
    if wanted.use_safetensors is False:
        raise OSError(
            f"{os.fspath(name)}: use_safetensors=False asks for pickled weights, which are never "
            "read: leave it out, and convert a checkpoint that has only those to safetensors"
        )
    with documented_errors():
        if path.is_file():
            found, folder = WeightFiles(shards=(path.name,), weight_map=None), path.parent
        elif path.is_dir():
            folder = path / source.subfolder
            found = _in_folder(folder, wanted)
        else:
            found, folder = _from_hub(os.fspath(name), source, wanted)
        headers = [header.read(folder / shard) for shard in found.shards]
        is_here = path.exists()
        return Weights(
            origin=os.fspath(name),
            folder=folder,
            document=functools.partial(_beside, folder if is_here else os.fspath(name), source),
            metadata=tuple(shard.metadata for shard in headers),
            tensors=checkpoint.tensors_of(folder, headers, found.weight_map),
            stamps={shard.path: shard.stamp for shard in headers},
            notes=found.notes,
        )


@contextlib.contextmanager
def documented_errors() -> Iterator[None]:
    """Turn our refusals of a checkpoint into the OSError that callers of transformers expect.

    Values that the dtype asked for cannot hold are a ValueError: the checkpoint is well.
    """
    try:
        yield
    except CheckFailed as error:
        raise ValueError(str(error)) from error
    except CheckpointIncomplete as error:
        raise FileNotFoundError(str(error)) from error
    except (CheckpointRefused, CheckpointVanished, SourceChanged) as error:
        raise OSError(str(error)) from error


def _beside(where: Path | str, source: Source, name: str) -> Mapping[str, Any] | None:
    """Return the JSON file `name` of a folder or a repository, or None where there is none."""
    if isinstance(where, Path):
        path = where / name
        return index.read_json(path) if path.is_file() else None
    fetched = _fetched(where, name, source)
    return None if fetched is None else index.read_json(fetched)


def _check_explicit(name: str) -> None:
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"config.json: transformers_weights is {name!r}, expected a *.safetensors file or a "
            "*.safetensors.index.json"
        )
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts:
        raise ValueError(
            f"config.json: transformers_weights is {name!r}, which leads outside the model's folder"
        )


def _in_folder(folder: Path, wanted: Wanted) -> WeightFiles:
    if wanted.explicit is not None:
        return _explicit(folder, wanted.explicit)
    return weights.find(folder, list_files(folder, within=_ANYWHERE), variant=wanted.variant)


def _explicit(folder: Path, name: str) -> WeightFiles:
    """Return the set of the file `name`; an index speaks of files beside itself."""
    if not name.endswith(".json"):
        return WeightFiles(shards=(name,), weight_map=None)
    weight_map = index.read_weight_map(folder / name)
    beside = Path(name).parent
    shards = sorted(set(weight_map.values()))
    return WeightFiles(shards=tuple(str(beside / shard) for shard in shards), weight_map=weight_map)


def _from_hub(name: str, source: Source, wanted: Wanted) -> tuple[WeightFiles, Path]:
    """Fetch the set into the cache; return it and the folder of the snapshot it is in."""
    names = weights.Names.of(wanted.variant)
    if wanted.explicit is not None:
        candidates: tuple[str, ...] = (wanted.explicit,)
    else:
        candidates = (names.single, names.index)
    for candidate in candidates:
        path = _fetched(name, candidate, source)
        if path is None:
            continue
        folder = path.parents[len(Path(candidate).parts) - 1]
        found = _explicit(folder, candidate)
        for shard in found.shards:
            config_source.find(name, shard, source)
        return found, folder
    raise _nothing_there(name, source, candidates)


def _fetched(name: str, file_name: str, source: Source) -> Path | None:
    """Return a file of the repository, or None where it has no such file (or the cache has not)."""
    try:
        return config_source.find(name, file_name, source)
    except OSError as error:
        if isinstance(error.__cause__, hub_errors.EntryNotFoundError):
            return None
        raise


def _nothing_there(name: str, source: Source, candidates: tuple[str, ...]) -> OSError:
    where = f"{name!r} at revision {str(source.revision or 'main')!r}"
    looked_for = " or ".join(candidates)
    if source.local_files_only or huggingface_hub.is_offline_mode():
        return OSError(
            f"{where}: {looked_for} is not in the cache, and nothing may be fetched "
            "(local_files_only, or HF_HUB_OFFLINE): load it once with a connection"
        )
    pickled = next((file for file in _PICKLES if _fetchable(name, file, source)), None)
    if pickled is not None:
        return OSError(
            f"{where} has no {looked_for}, only {pickled}: pickled weights are never read; convert "
            "them to safetensors (https://huggingface.co/spaces/safetensors/convert), or look for "
            "a revision that has them"
        )
    return OSError(f"{where} has no file named {looked_for}; see its page for the files it has")


def _fetchable(name: str, file_name: str, source: Source) -> bool:
    """Whether the repository has the file; nothing is downloaded."""
    inside = f"{source.subfolder}/{file_name}" if source.subfolder else file_name
    try:
        return huggingface_hub.HfApi(token=source.token).file_exists(
            name, inside, revision=source.revision
        )
    except (OSError, hub_errors.HfHubHTTPError):
        return False
