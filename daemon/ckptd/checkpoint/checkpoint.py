"""A checkpoint as planning sees it: its config, its tensors with their extents, its side files.

Opening reads headers and JSON, never a tensor byte. The value is immutable and carries the stamp
of every weight file, so that whoever reads the bytes later can tell whether they are still those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.checkpoint import (
    adapter_files,
    beside,
    gguf_files,
    gguf_model,
    header,
    layouts,
    parts,
    weights,
)
from ckptd.checkpoint.beside import SideFile
from ckptd.checkpoint.consolidate import assets as run_assets
from ckptd.checkpoint.consolidate import consolidate, pickled
from ckptd.checkpoint.consolidate.gathered import Gathered
from ckptd.checkpoint.header import FileStamp, StoredTensor
from ckptd.checkpoint.listing import Listing, list_files
from ckptd.checkpoint.parts import Part
from ckptd.checkpoint.pieces import Tensor
from ckptd.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointRefused,
    CheckpointVanished,
    SourceChanged,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    `tensors` is in source order: shards by name, tensors by offset. `config` is config.json as it
    is, `config_path` where it lies. `side_files` leaves config and weights out; `left_out` names
    files that are neither weights, trainer state nor known to travel. `metadata` is each header's.
    An adapter's `config` is empty and its `config_path` adapter_config.json, a side file, too.
    `encodings` names the block type of tensors of GGUF files, which are `U8` here; without a
    config.json `config` is made from the metadata, and `config_path` is the GGUF file.
    `masters` names float32 copies of weights that the config says to be of fewer bits. With `parts`
    the weights are no transformers model: tensors' names begin with the folder of their part, and
    `config` is empty.
    """

    path: Path
    name: str
    layout: str
    layout_reason: str
    config: Mapping[str, Any]
    config_path: Path
    tensors: Mapping[str, Tensor]
    stamps: Mapping[Path, FileStamp]
    metadata: tuple[Mapping[str, str], ...]
    side_files: tuple[SideFile, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    step: int | None
    encodings: Mapping[str, str] = field(default_factory=dict)
    masters: frozenset[str] = frozenset()
    parts: tuple[Part, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())


def open_checkpoint(
    path: Path,
    *,
    layout: str = "auto",
    assets: Path | None = None,
    name: str | None = None,
    folder: Path | None = None,
    within: Path | None = None,
) -> Checkpoint:
    """Return the checkpoint in the folder at `path`, or in the one file there.

    `assets` is a folder that gives config.json and side files where the checkpoint lacks them;
    `name` is the trainer's name of the folder where `path` is a pin of it, `folder` its place: the
    run's folder above may hold config and tokenizer of what is consolidated. Links are followed to
    targets inside `within`, by default the folder itself: only where a person named the folder
    may they lead further (a model cache, whose snapshot links to its blobs). A person has named
    `assets`, too: its links are followed.

    Raises:
        CheckpointIncomplete: no folder, no config, no weights, or shards are missing.
        CheckpointCorrupt: a header, an index or config.json is wrong; names file and tensor.
        CheckpointUnsupported: weights of a kind that is not read.
        CheckpointVanished: it was deleted while it was opened.
        CheckpointRefused: a file cannot be read.
    """
    try:
        named = path if name is None else path.with_name(name)
        named = named if folder is None else folder
        return _opened(path, layout=layout, assets=assets, named=named, within=within)
    except FileNotFoundError as error:
        raise CheckpointVanished(path=path) from error
    except OSError as error:
        raise CheckpointRefused(
            f"cannot be read: {error.strerror}",
            path=error.filename or path,
            hint="run ckptd as the user who trains, and check the disk",
        ) from error


def _opened(
    path: Path, *, layout: str, assets: Path | None, named: Path, within: Path | None
) -> Checkpoint:
    _require_openable(path, assets)
    single = gguf_files.is_file(path)
    listing = gguf_files.beside(path, within=within) if single else list_files(path, within=within)
    if parts.is_file(path):
        reason = "a safetensors file was named"
        return _opened_parts(path, named, listing, parts.FLAT, reason, assets)
    chosen, reason = layouts.choose(named, listing, layout)
    if chosen is layouts.LAYOUTS["gguf"]:
        return _opened_gguf(path, named.name, listing, reason, assets)
    if chosen is layouts.LAYOUTS["peft"]:
        inner = layouts.adapter_folder(listing) or ""
        return _opened_adapter(path / inner, named.name, listing.below(inner), reason, assets)
    if chosen.name in layouts.IN_PARTS:
        return _opened_parts(path, named, listing, chosen.name, reason, assets)
    if chosen.name in layouts.FAMILIES:
        return _opened_pieces(path, named, listing, chosen.name, reason, assets)
    return _opened_model(path, named, listing, chosen.name, reason, assets)


def _opened_model(
    path: Path, named: Path, listing: Listing, layout: str, reason: str, assets: Path | None
) -> Checkpoint:
    """Return a model as transformers saves it; its config may lie in the run's folder."""
    found = weights.find(path, listing)
    run = run_assets.run_folder(path, named.parent)
    config_path = beside.require_config(path, listing, assets, run=run)
    headers = [header.read(path / shard) for shard in found.shards]
    config = beside.read_config(config_path)
    stored = tensors_of(path, headers, found.weight_map)
    tensors, said = consolidate.unwrapped(stored, config, assets=assets, path=path)
    side_files, left_out = beside.side_files(path, listing, assets)
    more = run_assets.in_run(run)
    if config_path in more:
        side_files = beside.with_files(side_files, more)
    return Checkpoint(
        path=path,
        name=named.name,
        layout=layout,
        layout_reason=reason,
        config=config,
        config_path=config_path,
        tensors=tensors,
        stamps={shard.path: shard.stamp for shard in headers},
        metadata=tuple(shard.metadata for shard in headers),
        side_files=side_files,
        left_out=left_out,
        notes=(*found.notes, *said),
        step=layouts.step_of(path, named.name),
    )


def _require_openable(path: Path, assets: Path | None) -> None:
    """Refuse what is neither a folder nor a file that is a checkpoint by itself.

    Raises:
        CheckpointIncomplete: names what to point at instead.
    """
    if path.is_dir() or gguf_files.is_file(path) or pickled.is_file(path):
        return
    what = "a file; point at the folder that holds it" if path.exists() else "does not exist"
    if parts.is_file(path):
        refused = parts.refusal(path)
        if refused is None or (assets is not None and (assets / weights.CONFIG_NAME).is_file()):
            return
        what = refused
    raise CheckpointIncomplete(what, path=path, hint="check the path of the checkpoint")


def _opened_parts(
    path: Path, named: Path, listing: Listing, layout: str, reason: str, assets: Path | None
) -> Checkpoint:
    """Return a pipeline's components, or a single file; with a config in `assets` that is a model."""
    folder = path if path.is_dir() else path.parent
    found = parts.find(layout, folder, listing)
    config_path = beside.find_config(folder, listing, assets)
    is_model = layout == parts.FLAT and config_path is not None
    tensors: dict[str, Tensor] = {}
    headers: list[header.Header] = []
    made: list[Part] = []
    for one in found:
        read = [header.read(folder / name) for name in one.files]
        own = tensors_of(folder / one.part.folder, read, one.weight_map)
        tensors |= {
            one.part.folder + name: _renamed(tensor, one.part.folder + name)
            for name, tensor in own.items()
        }
        made.append(dataclasses.replace(one.part, metadata=read[0].metadata))
        headers += read
    side_files, left_out = beside.side_files(folder, listing, assets, with_config=not is_model)
    step = layouts.step_of(folder, named.name)
    return Checkpoint(
        path=path,
        name=named.name.removesuffix(parts.SUFFIX),
        layout=layout,
        layout_reason=reason,
        config=beside.read_config(config_path) if is_model and config_path is not None else {},
        config_path=config_path if is_model and config_path is not None else headers[0].path,
        tensors=tensors,
        stamps={one.path: one.stamp for one in headers},
        metadata=tuple(one.metadata for one in headers),
        side_files=side_files,
        left_out=left_out,
        notes=tuple(note for one in found for note in one.notes),
        step=parts.step(headers[0].metadata, named.name) or step,
        parts=() if is_model else tuple(made),
    )


def _renamed(tensor: StoredTensor, name: str) -> StoredTensor:
    return StoredTensor(dataclasses.replace(tensor.spec, name=name), tensor.extent)


def _opened_pieces(
    path: Path, named: Path, listing: Listing, layout: str, reason: str, assets: Path | None
) -> Checkpoint:
    """Return a checkpoint that is put together from pieces, or read from pickles."""
    folder = path if path.is_dir() else path.parent
    run = named.parent
    found = consolidate.read(layouts.FAMILIES[layout], folder, listing, assets=assets, run=run)
    gathered = found.gathered
    side_files, left_out = beside.side_files(folder, listing, assets, inner=gathered.assets)
    step = layouts.step_of(folder, named.name)
    return Checkpoint(
        path=path,
        name=named.name,
        layout=layout,
        layout_reason=reason,
        config=beside.checked_config(dict(found.config), found.config_path),
        config_path=found.config_path,
        tensors=gathered.tensors,
        stamps=gathered.stamps,
        metadata=gathered.metadata,
        side_files=beside.with_files(side_files, found.beside),
        left_out=left_out,
        notes=gathered.notes,
        step=gathered.step if step is None else step,
        masters=gathered.masters,
    )


def _opened_adapter(
    path: Path, name: str, listing: Listing, reason: str, assets: Path | None
) -> Checkpoint:
    """Return the adapter in the folder at `path`; its config is empty, for it has no model's."""
    weights_path = path / adapter_files.find(path, listing.by_name)
    said = adapter_files.read_config(path / adapter_files.CONFIG_NAME)
    found = _adapter_weights(weights_path)
    side_files, left_out = beside.side_files(path, listing, assets, is_adapter=True)
    return Checkpoint(
        path=path,
        name=name,
        layout="peft",
        layout_reason=reason,
        config={},
        config_path=path / adapter_files.CONFIG_NAME,
        tensors=found.tensors,
        stamps=found.stamps,
        metadata=found.metadata,
        side_files=side_files,
        left_out=left_out,
        notes=(adapter_files.describe(said), *found.notes),
        step=layouts.step_of(path, name),
    )


def _adapter_weights(path: Path) -> Gathered:
    """Return the tensors of an adapter's one file; a pickled one is read without running it."""
    if path.name == adapter_files.PICKLED_NAME:
        return pickled.of_file(path)
    read = header.read(path)
    return Gathered(
        tensors=tensors_of(path.parent, [read], None),
        stamps={read.path: read.stamp},
        metadata=(read.metadata,),
    )


def _opened_gguf(
    path: Path, name: str, listing: Listing, reason: str, assets: Path | None
) -> Checkpoint:
    """Return the model in the GGUF file at `path`, or in those of the folder there."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    files = gguf_files.find(folder, tuple(listing.by_name), wanted=wanted)
    model = gguf_model.open_model(folder, files)
    config_path = beside.find_config(folder, listing, assets)
    side_files, left_out = beside.side_files(folder, listing, assets)
    travelling = frozenset(file.relpath for file in side_files)
    return Checkpoint(
        path=path,
        name=name.removesuffix(gguf_files.SUFFIX),
        layout="gguf",
        layout_reason=reason,
        config=beside.checked_config(model.config(config_path), config_path or path),
        config_path=config_path or model.headers[0].path,
        tensors=tensors_of(folder, model.headers, None),
        stamps={part.path: part.stamp for part in model.headers},
        metadata=tuple(part.metadata for part in model.headers),
        side_files=side_files,
        left_out=left_out,
        notes=model.advice(travelling, has_config=config_path is not None),
        step=layouts.step_of(folder, name),
        encodings=model.encodings,
    )


def tensors_of(
    path: Path, headers: Sequence[header.Header], weight_map: Mapping[str, str] | None
) -> dict[str, StoredTensor]:
    """Return the tensors of all `headers` by name, in source order, as the index says they are.

    Raises:
        CheckpointCorrupt: a tensor stands twice, index and shards disagree, or there is none.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in headers:
        shard_name = shard.path.name
        for tensor in shard.tensors:
            name = tensor.spec.name
            if name in tensors:
                raise CheckpointCorrupt(
                    "stands in two shards",
                    path=path,
                    tensor=name,
                    expected=tensors[name].extent.path.name,
                    found=f"also {shard.path.name}",
                )
            if weight_map is not None and weight_map.get(name) != shard_name:
                raise CheckpointCorrupt(
                    "the index and the shard disagree",
                    path=shard.path,
                    tensor=name,
                    expected=f"in {weight_map.get(name, 'no shard')} as the index says",
                    found=f"in {shard.path.name}",
                )
            tensors[name] = tensor
    if weight_map is not None:
        for name, shard_name in weight_map.items():
            if name not in tensors:
                raise CheckpointCorrupt(
                    "the index names it, its shard does not hold it",
                    path=path / shard_name,
                    tensor=name,
                )
    if not tensors:
        raise CheckpointCorrupt("holds no tensors", path=path)
    return tensors


def identifying_files(source: Checkpoint) -> list[tuple[str, Path]]:
    """Return the files whose content identifies the checkpoint: weights, config, side files."""
    folder = source.path if source.path.is_dir() else source.path.parent
    files = [
        (path.relative_to(folder).as_posix() if source.parts else path.name, path)
        for path in source.stamps
    ]
    sides = {file.path for file in source.side_files}
    if source.config_path not in source.stamps and source.config_path not in sides:
        files.append((source.config_path.name, source.config_path))
    return files + [(file.relpath, file.path) for file in source.side_files]


def check_unchanged(stamps: Mapping[Path, FileStamp]) -> None:
    """Verify that every file of `stamps` is as it was.

    Raises:
        SourceChanged: names the first that is not.
    """
    for path, stamp in stamps.items():
        try:
            found = str(FileStamp.of(path.stat()))
        except OSError as error:
            found = error.strerror or "an error"
        if found != str(stamp):
            raise SourceChanged(path=path, expected=str(stamp), found=found)
