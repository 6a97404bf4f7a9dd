"""Which GGUF files are the model: one file, or the parts of a split one.

Folders often hold the same model in several types, and a vision projector beside it. Which one is
meant is a person's choice: several models are refused with advice, a projector is left alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import gguf, listing
from ckptd.checkpoint.gguf import GgufHeader
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

SUFFIX = ".gguf"
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_PROJECTOR = re.compile(r"mmproj", re.IGNORECASE)
_NOT_MODELS = {
    "clip": "the vision part of a model, without its language model",
    "mmproj": "the vision part of a model, without its language model",
    "adapter": "an adapter without its base model",
    "imatrix": "an importance matrix, which has no weights",
    "vocab": "a vocabulary, which has no weights",
}
"""Values of `general.architecture` and `general.type` that no model has."""
_BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What belongs to a single file that a person named: its folder may hold anything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFiles:
    """The file names of a model, first part first, and what was left alone beside it."""

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_file(path: Path) -> bool:
    """Return whether `path` is a GGUF file by name, and no folder."""
    return path.name.endswith(SUFFIX) and path.is_file()


def beside(path: Path, *, within: Path | None = None) -> Listing:
    """Return the file at `path`, its other parts, and the files of a model with known names.

    Raises:
        CheckpointVanished, CheckpointRefused: see `listing.list_files`.
    """
    names = {path.name, *_parts(path.name), *_BESIDE}
    files = [
        dataclasses.replace(listing.list_files(path.parent / name).files[0], relpath=name)
        for name in sorted(names)
        if (path.parent / name).is_file()
        and (name == path.name or _stays(path.parent / name, within))
    ]
    return Listing(path=path.parent, base_path=path.parent, files=tuple(files))


def _stays(path: Path, within: Path | None) -> bool:
    """Whether what is at `path` lies in the same folder, or in `within`: a link leads anywhere."""
    target = path.resolve()
    if within is not None:
        return target.is_relative_to(within.resolve())
    return target.parent == path.parent.resolve()


def are_in(names: Sequence[str]) -> bool:
    """Return whether any of the file names `names`, relative to a folder, is of such a file."""
    return any(name.endswith(SUFFIX) and "/" not in name for name in names)


def find(folder: Path, names: Sequence[str], *, wanted: str | None = None) -> GgufFiles:
    """Return the files of the model in `folder`, whose files are `names`.

    `wanted` is the file that a person named: then only that one, with its other parts.

    Raises:
        CheckpointIncomplete: there is none, or parts are missing.
        CheckpointUnsupported: several models, or nothing that is one.
    """
    models = _models([name for name in names if name.endswith(SUFFIX) and "/" not in name])
    if wanted is not None:
        stem = _stem(wanted)
        return _whole(folder, models.get(stem, (wanted,)))
    projectors = [stem for stem in models if _PROJECTOR.search(stem)]
    notes = tuple(f"{models[stem][0]} (vision) was left alone" for stem in projectors)
    candidates = [stem for stem in models if stem not in projectors]
    if not candidates:
        raise CheckpointIncomplete(
            "no GGUF model in the folder itself",
            path=folder,
            found=", ".join(models[stem][0] for stem in projectors) or None,
            hint="name the folder or the file that holds the model",
        )
    if len(candidates) > 1:
        raise CheckpointUnsupported(
            f"holds {len(candidates)} GGUF models",
            path=folder,
            found=", ".join(models[stem][0] for stem in candidates[:6]),
            hint="name one of these files instead of the folder",
        )
    found = _whole(folder, models[candidates[0]])
    return GgufFiles(names=found.names, notes=notes)


def headers(folder: Path, files: GgufFiles) -> tuple[GgufHeader, ...]:
    """Return the header of each file of a model.

    Raises:
        CheckpointCorrupt: a header is wrong, or the parts do not belong together.
        CheckpointUnsupported: something else than a model.
        OSError: a file cannot be read.
    """
    read = tuple(gguf.read(folder / name) for name in files.names)
    first = read[0]
    for value in (first.architecture, first.metadata.get("general.type")):
        if isinstance(value, str) and value in _NOT_MODELS:
            raise CheckpointUnsupported(
                f"is {_NOT_MODELS[value]}", path=first.path, hint="name the file of the model"
            )
    if not first.architecture:
        raise CheckpointCorrupt(
            "the metadata has no general.architecture", path=first.path, hint="convert it again"
        )
    for place, header in enumerate(read):
        number = header.metadata.get("split.no", place)
        count = header.metadata.get("split.count", len(read))
        if number != place or count != len(read):
            raise CheckpointCorrupt(
                "is another part than its name says",
                path=header.path,
                expected=f"part {place} of {len(read)}",
                found=f"part {number} of {count}",
                hint="all parts must come from one split: download them again",
            )
    return read


def _models(names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the files of each model by the stem of their names, parts in order."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        models.setdefault(_stem(name), []).append(name)
    return {stem: tuple(files) for stem, files in models.items()}


def _stem(name: str) -> str:
    part = _PART.match(name)
    return f"{part['stem']}-of-{part['count']}" if part else name.removesuffix(SUFFIX)


def _parts(name: str) -> tuple[str, ...]:
    """Return the names of all parts of a split model by that of one; nothing for a single file."""
    part = _PART.match(name)
    if part is None:
        return ()
    numbers = range(1, int(part["count"]) + 1)
    return tuple(f"{part['stem']}-{number:05d}-of-{part['count']}.gguf" for number in numbers)


def _whole(folder: Path, names: tuple[str, ...]) -> GgufFiles:
    expected = _parts(names[0])
    if not expected:
        return GgufFiles(names=names)
    missing = [name for name in expected if name not in names]
    if missing:
        raise CheckpointIncomplete(
            f"parts of the split file are missing: {', '.join(missing[:5])}",
            path=folder / names[0],
            expected=f"{len(expected)} parts",
            found=f"{len(names)}",
            hint="copy or download the missing parts",
        )
    return GgufFiles(names=expected)
