"""What a format finds in a checkpoint: groups of tensors that are one weight each.

Groups go by the tensors that are there, over all files; what config.json says is used for
parameters alone, because files and configs disagree in the wild about which modules are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.quant.formula import Formula


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a format may look at.

    `quantization` is the quantization config wherever config.json keeps it, empty without one.
    `metadata` is that of each header; `encodings` the block types of GGUF tensors, by name.
    `document` returns a JSON file of the folder by name, or None; `peek` the bytes of a small
    descriptor tensor (shapes, settings; at most 64 KiB).
    """

    path: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    metadata: tuple[Mapping[str, str], ...]
    document: Callable[[str], Mapping[str, Any] | None]
    peek: Callable[[StoredTensor], bytes]
    encodings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One weight: `consumed` stored tensors become the tensor `name` of `shape`.

    `formulas` are one after the other along the first axis: a single one, or one an expert. Their
    dtype is the library's own result dtype, their arith `FLOAT32`. `scheme` tells people bits and
    grouping ("4-bit nf4, blocks of 64, nested").
    """

    name: str
    shape: tuple[int, ...]
    formulas: tuple[Formula, ...]
    consumed: tuple[str, ...]
    scheme: str

    @property
    def dtype(self) -> Dtype:
        """The dtype that the library dequantizes to."""
        return self.formulas[0].dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All groups of a checkpoint; `dropped` are tensors that only quantized inference needs.

    `renamed` gives tensors that stay as they are their plain name, where the format changed it.
    `divided` are plain tensors that hold several (experts): each piece with its plain name.
    """

    groups: tuple[Group, ...]
    dropped: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    divided: tuple[tuple[str, tuple[StoredTensor, ...]], ...] = ()


class Format(Protocol):
    """One family of writers. Implementations are stateless; `registry.FORMATS` names them all."""

    @property
    def name(self) -> str:
        """How people call it."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The values of `quant_method` that it answers to."""

    @property
    def side_files(self) -> tuple[str, ...]:
        """Files of the folder that describe the quantization and go with it."""

    @property
    def skip_key(self) -> str | None:
        """The key of the quantization config that lists modules left plain, if that is enough."""

    def recognise(self, stored: Stored) -> str | None:
        """Return why the checkpoint is of this format where config.json does not say, or None."""

    def find(self, stored: Stored) -> Found:
        """Return every group, from names, shapes and small descriptors alone.

        Raises:
            CheckpointCorrupt: a partner is missing or of the wrong shape or dtype; names it.
            CheckpointUnsupported: a variant that is not decoded; names it and the tensors.
        """
