"""torchao: tensor subclasses, flattened into safetensors with an index in the header metadata.

The index decides, config.json gives nothing that is needed. A class that cannot be decoded is
refused by name; plain tensors stay as they are. Checkpoints of torchao before safetensors are
pickles, which are never opened.
Source: torchao 0.14 to 0.18 (`prototype/safetensors`), transformers' quantizer for torchao.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptd.errors import CheckpointCorrupt
from ckptd.quant.formats import torchao_index, torchao_packed, torchao_weights
from ckptd.quant.formats.torchao_index import Entry
from ckptd.quant.group import Found, Group, Stored

_CLASSES: dict[str, Callable[[Entry], Group]] = {
    "Int8Tensor": torchao_weights.integers,
    "IntxUnpackedToInt8Tensor": torchao_weights.integers,
    "Float8Tensor": torchao_weights.float8,
    "Int4Tensor": torchao_packed.nibbles,
    "Int4PlainInt32Tensor": torchao_packed.words,
    "Int4TilePackedTo4dTensor": torchao_packed.tiles,
    "NVFP4Tensor": torchao_packed.nvfp4,
    "MXTensor": torchao_packed.mx,
}
"""Every class that torchao itself can write to safetensors."""


@dataclass(frozen=True, slots=True)
class Torchao:
    """torchao's int4, int8, intx, float8, NVFP4 and MX weights."""

    name: str = "torchao"
    methods: tuple[str, ...] = ("torchao",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = None
    """Its loaders go by the metadata of the files, which are written anew."""

    def recognise(self, stored: Stored) -> str | None:
        """Return the first tensor that the metadata of a file calls one of torchao's."""
        for name, kind in torchao_index.classes(stored).items():
            if kind in _CLASSES:
                return f"the metadata of safetensors calls {name} a {kind}"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every weight that the index describes; see `ckptd.quant.group.Format.find`.

        Raises:
            CheckpointCorrupt: also where there is no index at all.
        """
        if not torchao_index.classes(stored):
            raise CheckpointCorrupt(
                "is said to be torchao's, but no file describes its tensors",
                path=stored.path,
                expected="the classes of tensors in the metadata of safetensors",
                found="none",
                hint="whoever copied the files lost their metadata: save the model again",
            )
        groups: list[Group] = []
        dropped: list[str] = []
        for entry in torchao_index.entries(stored):
            make = _CLASSES.get(entry.kind)
            if make is None:
                entry.unsupported(
                    "this class is not decoded",
                    expected=f"one of {', '.join(_CLASSES)}",
                    found=entry.kind,
                )
            groups.append(make(entry))
            dropped += torchao_weights.dropped(entry)
        return Found(
            groups=tuple(groups),
            dropped=tuple(dropped),
            renamed=torchao_index.renamed(stored),
        )


FORMAT = Torchao()
