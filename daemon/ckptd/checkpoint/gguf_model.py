"""A GGUF model as a checkpoint: its files, its config, and what its blocks are.

Tensors keep their GGUF names, for what they are called elsewhere depends on the architecture and
belongs to the format in `quant`. The config says `quant_method: gguf`, so that everybody sees that
these are not plain weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import gguf_config, gguf_files, index
from ckptd.checkpoint.gguf import Array, GgufHeader, Value
from ckptd.checkpoint.header import Header

METHOD = "gguf"
_MAX_TEXT = 4096
"""Longer texts of the metadata (chat templates) are not passed on."""
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What an opened checkpoint takes from its GGUF files.

    `encodings` names the block type of each tensor that is not of a plain dtype.
    """

    headers: tuple[Header, ...]
    encodings: Mapping[str, str]
    notes: tuple[str, ...]
    facts: gguf_config.Facts

    def config(self, path: Path | None) -> dict[str, Any]:
        """Return the config in the file at `path`, or one made from the metadata.

        Raises:
            CheckpointUnsupported, CheckpointCorrupt: see `gguf_config.make`, `index.read_json`.
        """
        made = gguf_config.make(self.facts) if path is None else index.read_json(path)
        return made | {"quantization_config": {"quant_method": METHOD}}

    def advice(self, side_files: frozenset[str], *, has_config: bool) -> tuple[str, ...]:
        """Return what a person should know, given the names of the side files that travel."""
        notes = list(self.notes)
        first = self.headers[0].path.name
        if not has_config:
            notes.append(f"config.json is made from the metadata of {first}")
        if not side_files & _TOKENIZERS:
            notes.append(
                "no tokenizer travels: copy tokenizer.json, tokenizer_config.json and, where the "
                "model has them, tokenizer.model, chat_template.jinja and generation_config.json "
                "from the original model, or name its folder with --assets"
            )
        return tuple(notes)


def open_model(folder: Path, files: gguf_files.GgufFiles) -> GgufModel:
    """Return the model in `files` of `folder`; reads headers, and a few numbers of its rope.

    Raises:
        CheckpointCorrupt, CheckpointUnsupported: see `gguf_files.headers`.
        OSError: a file cannot be read.
    """
    headers = gguf_files.headers(folder, files)
    first = headers[0]
    tensors = {tensor.spec.name: tensor for header in headers for tensor in header.tensors}
    return GgufModel(
        headers=tuple(_as_header(header) for header in headers),
        encodings={name: kind for header in headers for name, kind in header.encodings.items()},
        notes=files.notes,
        facts=gguf_config.Facts(
            path=first.path,
            architecture=first.architecture,
            metadata=first.metadata,
            tensors=tensors,
        ),
    )


def _as_header(header: GgufHeader) -> Header:
    """Return a header as those of safetensors are: its metadata as texts, short ones alone."""
    told = {key: _as_text(value) for key, value in header.metadata.items()}
    return Header(
        path=header.path,
        stamp=header.stamp,
        data_offset=min((one.extent.offset for one in header.tensors), default=0),
        metadata={key: text for key, text in told.items() if text is not None},
        tensors=header.tensors,
    )


def _as_text(value: Value) -> str | None:
    if isinstance(value, Array):
        return None
    if isinstance(value, tuple):
        return ",".join(str(one) for one in value)
    text = str(value)
    return text if len(text) <= _MAX_TEXT else None
