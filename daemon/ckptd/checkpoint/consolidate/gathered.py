"""What every family gathers, and the protocol that makes it one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ckptd.checkpoint.header import FileStamp
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The tensors of a checkpoint by the names they have there, and the files they are in.

    `stamps` covers exactly the files read. `masters` names the float32 copies that an optimizer
    keeps of weights of fewer bits. `assets` are folders below the checkpoint that hold config.json
    and the tokenizer; `step` is the training step where files say it. `has_own_names` says that
    the names are transformers' own, unless a wrapper has left its mark on them.
    """

    tensors: Mapping[str, Tensor]
    stamps: Mapping[Path, FileStamp]
    masters: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    assets: tuple[str, ...] = ()
    step: int | None = None
    metadata: tuple[Mapping[str, str], ...] = field(default=())
    has_own_names: bool = False


class Family(Protocol):
    """A layout (see `layouts.Layout`) whose weights are gathered."""

    @property
    def name(self) -> str:
        """The name in a definition's `layout`."""

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return why the folder is of this family, or None if it is not."""

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return the name of the file that is written last, there or not; None without one."""

    def holds(self, relpath: str) -> bool:
        """Return whether a file holds weights, or says where they are."""

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the tensors of the folder at `path`; reads no tensor byte.

        Raises:
            CheckpointIncomplete: a file is missing.
            CheckpointCorrupt: files contradict themselves or each other.
            CheckpointUnsupported: something that is not gathered; says what converts it.
            OSError: a file cannot be read.
        """


def has_plain_weights(listing: Listing) -> bool:
    """Return whether the folder itself holds weights as `save_pretrained` writes them."""
    names = listing.by_name
    return "model.safetensors" in names or "model.safetensors.index.json" in names
