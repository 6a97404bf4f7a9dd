"""A checkpoint as planning sees it: its config, its tensors with their extents, its side files.

Opening reads headers and JSON, never a tensor byte. The value is immutable and carries the stamp
of every weight file, so that whoever reads the bytes later can tell whether they are still those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ckptd.checkpoint import (
    adapter_files,
    gguf_files,
    gguf_model,
    header,
    index,
    layouts,
    sidefiles,
    weights,
)
from ckptd.checkpoint.consolidate import consolidate, pickled
from ckptd.checkpoint.header import FileStamp, StoredTensor
from ckptd.checkpoint.listing import Listing, list_files
from ckptd.checkpoint.pieces import Tensor
from ckptd.errors import (
    CheckpointCorrupt,
    CheckpointIncomplete,
    CheckpointRefused,
    CheckpointVanished,
    SourceChanged,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file that travels with the weights: its name in the repo and where it lies."""

    relpath: str
    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    `tensors` is in source order: shards by name, tensors by offset. `config` is config.json as it
    is, `config_path` where it lies. `side_files` leaves config and weights out; `left_out` names
    files that are neither weights, trainer state nor known to travel. `metadata` is each header's.
    An adapter's `config` is empty and its `config_path` adapter_config.json, a side file, too.
    `encodings` names the block type of tensors of GGUF files, which are `U8` here; without a
    config.json `config` is made from the metadata, and `config_path` is the GGUF file.
    `masters` names float32 copies of weights that the config says to be of fewer bits.
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
    if not path.is_dir() and not gguf_files.is_file(path) and not pickled.is_file(path):
        what = "a file; point at the folder that holds it" if path.exists() else "does not exist"
        raise CheckpointIncomplete(what, path=path, hint="check the path of the checkpoint")
    single = gguf_files.is_file(path)
    listing = gguf_files.beside(path) if single else list_files(path, within=within)
    chosen, reason = layouts.choose(named, listing, layout)
    if chosen is layouts.LAYOUTS["gguf"]:
        return _opened_gguf(path, named.name, listing, reason, assets)
    if chosen is layouts.LAYOUTS["peft"]:
        return _opened_adapter(path, named.name, listing, reason, assets)
    if chosen.name in layouts.FAMILIES:
        return _opened_pieces(path, named, listing, chosen.name, reason, assets)
    found = weights.find(path, listing)
    config_path = _config_path(path, listing, assets)
    headers = [header.read(path / shard) for shard in found.shards]
    tensors = tensors_of(path, headers, found.weight_map)
    side_files, left_out = _side_files(path, listing, assets)
    return Checkpoint(
        path=path,
        name=named.name,
        layout=chosen.name,
        layout_reason=reason,
        config=_read_config(config_path),
        config_path=config_path,
        tensors=tensors,
        stamps={shard.path: shard.stamp for shard in headers},
        metadata=tuple(shard.metadata for shard in headers),
        side_files=side_files,
        left_out=left_out,
        notes=found.notes,
        step=layouts.step_of(path, named.name),
    )


def _opened_pieces(
    path: Path, named: Path, listing: Listing, layout: str, reason: str, assets: Path | None
) -> Checkpoint:
    """Return a checkpoint that is put together from pieces, or read from pickles."""
    folder = path if path.is_dir() else path.parent
    run = named.parent
    found = consolidate.read(layouts.FAMILIES[layout], folder, listing, assets=assets, run=run)
    gathered = found.gathered
    side_files, left_out = _side_files(folder, listing, assets)
    known = {file.relpath for file in side_files} | {weights.CONFIG_NAME}
    extra: dict[str, SideFile] = {}
    for file in found.beside:
        if file.name not in known and file.name not in extra:
            extra[file.name] = SideFile(relpath=file.name, path=file, nbytes=file.stat().st_size)
    step = layouts.step_of(folder, named.name.partition(".")[0])
    return Checkpoint(
        path=path,
        name=named.name,
        layout=layout,
        layout_reason=reason,
        config=_checked_config(dict(found.config), found.config_path),
        config_path=found.config_path,
        tensors=gathered.tensors,
        stamps=gathered.stamps,
        metadata=gathered.metadata,
        side_files=tuple(sorted((*side_files, *extra.values()), key=lambda one: one.relpath)),
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
    weight_file = header.read(weights_path)
    side_files, left_out = _side_files(path, listing, assets)
    return Checkpoint(
        path=path,
        name=name,
        layout="peft",
        layout_reason=reason,
        config={},
        config_path=path / adapter_files.CONFIG_NAME,
        tensors=tensors_of(path, [weight_file], None),
        stamps={weight_file.path: weight_file.stamp},
        metadata=(weight_file.metadata,),
        side_files=side_files,
        left_out=left_out,
        notes=(adapter_files.describe(said),),
        step=layouts.step_of(path, name),
    )


def _opened_gguf(
    path: Path, name: str, listing: Listing, reason: str, assets: Path | None
) -> Checkpoint:
    """Return the model in the GGUF file at `path`, or in those of the folder there."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    files = gguf_files.find(folder, tuple(listing.by_name), wanted=wanted)
    model = gguf_model.open_model(folder, files)
    config_path = _config_path(folder, listing, assets, required=False)
    side_files, left_out = _side_files(folder, listing, assets)
    travelling = frozenset(file.relpath for file in side_files)
    return Checkpoint(
        path=path,
        name=name.removesuffix(gguf_files.SUFFIX),
        layout="gguf",
        layout_reason=reason,
        config=_checked_config(model.config(config_path), config_path or path),
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
            if weight_map is not None and weight_map.get(name) != shard.path.name:
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
    files = [(path.name, path) for path in source.stamps]
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


@overload
def _config_path(path: Path, listing: Listing, assets: Path | None) -> Path: ...


@overload
def _config_path(
    path: Path, listing: Listing, assets: Path | None, *, required: bool
) -> Path | None: ...


def _config_path(
    path: Path, listing: Listing, assets: Path | None, *, required: bool = True
) -> Path | None:
    if weights.CONFIG_NAME in listing.by_name:
        return path / weights.CONFIG_NAME
    if assets is not None and (assets / weights.CONFIG_NAME).is_file():
        return assets / weights.CONFIG_NAME
    if not required:
        return None
    raise CheckpointIncomplete(
        f"{weights.CONFIG_NAME} is missing",
        path=path,
        hint="name a folder that has it with `assets:` in the definition (--assets on the "
        "command line)",
    )


def _read_config(path: Path) -> dict[str, Any]:
    return _checked_config(index.read_json(path), path)


def _checked_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str | None):
        raise CheckpointCorrupt(
            "model_type is not text", path=path, expected="a name", found=repr(model_type)[:120]
        )
    return config


def _side_files(
    path: Path, listing: Listing, assets: Path | None
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    chosen: dict[str, SideFile] = {}
    left_out = []
    for file in listing.files:
        fate = sidefiles.fate(file.relpath)
        if fate is sidefiles.Fate.UNKNOWN and not file.relpath.startswith("."):
            left_out.append(file.relpath.encode("utf-8", "backslashreplace").decode())
        if fate is sidefiles.Fate.TRAVELS and file.relpath != weights.CONFIG_NAME:
            chosen[file.relpath] = SideFile(
                relpath=file.relpath, path=path / file.relpath, nbytes=file.size
            )
    if assets is not None:
        for file in _list_assets(assets).files:
            if file.relpath in chosen or file.relpath == weights.CONFIG_NAME:
                continue
            if sidefiles.fate(file.relpath) is sidefiles.Fate.TRAVELS:
                chosen[file.relpath] = SideFile(
                    relpath=file.relpath, path=assets / file.relpath, nbytes=file.size
                )
    return tuple(chosen[name] for name in sorted(chosen)), tuple(sorted(left_out))


def _list_assets(assets: Path) -> Listing:
    if not assets.is_dir():
        raise CheckpointIncomplete(
            "the assets folder does not exist",
            path=assets,
            hint="correct `assets:` in the definition (--assets on the command line)",
        )
    return list_files(assets, within=Path("/"))
