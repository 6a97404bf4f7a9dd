"""The files beside the weights: where config.json is found, and which files travel with it.

A config and a tokenizer lie in the checkpoint, in the folder that a person named with `assets`, or
in the run's folder above the checkpoint, in this order. `sidefiles` says what becomes of a file by
its name; here the files are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ckptd.checkpoint import adapter_files, index, sidefiles, weights
from ckptd.checkpoint.consolidate import assets as run_assets
from ckptd.checkpoint.listing import Listing, list_files
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete

_NOT_OF_ASSETS = frozenset({weights.CONFIG_NAME, adapter_files.CONFIG_NAME})


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file that travels with the weights: its name in the repo and where it lies."""

    relpath: str
    path: Path
    nbytes: int


def find_config(
    path: Path,
    listing: Listing,
    assets: Path | None,
    *,
    run: Path | None = None,
    inner: Sequence[str] = (),
) -> Path | None:
    """Return where config.json is, or None.

    `run` is the run's folder, where that is looked into; `inner` are folders of the checkpoint.
    """
    for place in ("", *(f"{folder}/" for folder in inner)):
        if place + weights.CONFIG_NAME in listing.by_name:
            return path / place / weights.CONFIG_NAME
    if assets is not None and (assets / weights.CONFIG_NAME).is_file():
        return assets / weights.CONFIG_NAME
    return None if run is None else run_assets.of_run(run, weights.CONFIG_NAME)


def require_config(
    path: Path, listing: Listing, assets: Path | None, *, run: Path, inner: Sequence[str] = ()
) -> Path:
    """Return where config.json is, as `find_config` does.

    Raises:
        CheckpointIncomplete: nowhere; says which option names a folder that has it.
    """
    found = find_config(path, listing, assets, run=run, inner=inner)
    if found is not None:
        return found
    raise CheckpointIncomplete(
        f"{weights.CONFIG_NAME} is missing",
        path=path,
        found="none here, nor in the run's folder above",
        hint="name a folder that has it (the base model) with `assets:` in the definition "
        "(--assets on the command line)",
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the config in the file at `path`.

    Raises:
        CheckpointCorrupt: no JSON object, or model_type is not text.
    """
    return checked_config(index.read_json(path), path)


def checked_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return `config`, which lies at `path`.

    Raises:
        CheckpointCorrupt: its model_type is not text.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str | None):
        raise CheckpointCorrupt(
            "model_type is not text", path=path, expected="a name", found=repr(model_type)[:120]
        )
    return config


def side_files(
    path: Path,
    listing: Listing,
    assets: Path | None,
    *,
    with_config: bool = False,
    is_adapter: bool = False,
    inner: Sequence[str] = (),
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """Return the files that travel, and the names of those left out because nobody knows them.

    config.json is none of them, unless `with_config`: that of a pipeline's component is like any.
    What lies in folders `inner` of the checkpoint travels as if it lay at the top. adapter_config.json
    goes with an adapter alone: beside a whole model it would make loaders look for the adapter.

    Raises:
        CheckpointIncomplete: the folder `assets` does not exist.
    """
    chosen: dict[str, SideFile] = {}
    left_out = []
    for file in listing.files:
        fate = sidefiles.fate(file.relpath)
        if fate is sidefiles.Fate.UNKNOWN and not file.relpath.startswith("."):
            left_out.append(file.relpath.encode("utf-8", "backslashreplace").decode())
        folder = next((f"{one}/" for one in inner if file.relpath.startswith(f"{one}/")), "")
        name = file.relpath.removeprefix(folder)
        is_config = name == weights.CONFIG_NAME and not with_config
        if PurePosixPath(name).name == adapter_files.CONFIG_NAME and not (
            is_adapter and name == adapter_files.CONFIG_NAME
        ):
            left_out.append(file.relpath)
            continue
        if fate is sidefiles.Fate.TRAVELS and not is_config and (folder or name not in chosen):
            chosen[name] = SideFile(relpath=name, path=path / file.relpath, nbytes=file.size)
    if assets is not None:
        for file in _list_assets(assets).files:
            if file.relpath in chosen or file.relpath in _NOT_OF_ASSETS:
                continue
            if sidefiles.fate(file.relpath) is sidefiles.Fate.TRAVELS:
                chosen[file.relpath] = SideFile(
                    relpath=file.relpath, path=assets / file.relpath, nbytes=file.size
                )
    return tuple(chosen[name] for name in sorted(chosen)), tuple(sorted(left_out))


def with_files(chosen: tuple[SideFile, ...], more: tuple[Path, ...]) -> tuple[SideFile, ...]:
    """Return `chosen` and the files of `more` whose names are not among them, config.json apart."""
    found = {file.relpath: file for file in chosen}
    for path in more:
        if path.name != weights.CONFIG_NAME and path.name not in found:
            found[path.name] = SideFile(relpath=path.name, path=path, nbytes=path.stat().st_size)
    return tuple(found[name] for name in sorted(found))


def _list_assets(assets: Path) -> Listing:
    if not assets.is_dir():
        raise CheckpointIncomplete(
            "the assets folder does not exist",
            path=assets,
            hint="correct `assets:` in the definition (--assets on the command line)",
        )
    return list_files(assets, within=Path("/"))
