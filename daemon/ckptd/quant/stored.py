"""A checkpoint as formats see it: the small reads that planning may make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptd.checkpoint import index
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt
from ckptd.quant import configuration
from ckptd.quant.group import Stored

MAX_PEEK_BYTES = 1 << 16
"""A descriptor (a shape, a JSON of settings) is far smaller; anything larger is weights."""


def of_checkpoint(source: Checkpoint) -> Stored:
    """Return what formats may look at of an opened checkpoint; reads nothing yet.

    A tensor in several pieces is not among it: no format divides its codes among devices.
    """
    documents = {file.relpath: file.path for file in source.side_files}

    def document(name: str) -> Mapping[str, Any] | None:
        return index.read_json(documents[name]) if name in documents else None

    return Stored(
        path=source.path,
        config=source.config,
        quantization=configuration.declared(source.config),
        tensors={
            name: tensor
            for name, tensor in source.tensors.items()
            if isinstance(tensor, StoredTensor)
        },
        metadata=source.metadata,
        document=document,
        peek=peek,
        encodings=source.encodings,
    )


def peek(tensor: StoredTensor) -> bytes:
    """Return the bytes of a small descriptor tensor.

    Raises:
        CheckpointCorrupt: it is not small, or its file ended early.
    """
    extent = tensor.extent
    if extent.nbytes > MAX_PEEK_BYTES:
        raise CheckpointCorrupt(
            "is too large for a descriptor",
            path=extent.path,
            tensor=tensor.spec.name,
            expected=f"at most {MAX_PEEK_BYTES} bytes",
            found=f"{extent.nbytes}",
        )
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        data = file.read(extent.nbytes)
    if len(data) != extent.nbytes:
        raise CheckpointCorrupt(
            "ends early",
            path=extent.path,
            tensor=tensor.spec.name,
            expected=f"{extent.nbytes} bytes",
            found=f"{len(data)}",
        )
    return data
