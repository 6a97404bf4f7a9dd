"""Tensor bytes into a file: from their own memory where they lie there ready, else in pieces.

Dense CPU tensors are written from where they are, without a copy, many small ones with one call.
Others (strided views, other devices) go piece by piece through one buffer a thread, pinned where
the tensors are on CUDA, so that memory stays bounded however large the tensor is. Two threads write
at planned offsets: one copies while the other is in the kernel.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from ckptd.checkpoint.header import TensorSpec
from ckptd.models.saving.weight_plan import WeightFile

THREADS = 2
"""One cannot keep a fast disk busy, more only wait for each other (measured on two cores)."""
PIECE_BYTES = 32 * 1024**2
"""The most that one write takes, and the size of a thread's buffer."""
_MOST_BLOCKS = 512
"""Blocks in one vectored write; Linux takes 1024."""


@dataclass(slots=True)
class _Piece:
    """Consecutive blocks of the file, written by one call."""

    offset: int
    nbytes: int
    blocks: list[torch.Tensor]

    def has_room(self, nbytes: int) -> bool:
        """Whether a block of `nbytes` may join."""
        return self.nbytes + nbytes <= PIECE_BYTES and len(self.blocks) < _MOST_BLOCKS


class Buffers:
    """One buffer a thread, made on first use; keep it for a whole save."""

    def __init__(self, *, pinned: bool) -> None:
        self._own = threading.local()
        self._pinned = pinned

    def take(self) -> torch.Tensor:
        """Return this thread's buffer: uint8, `PIECE_BYTES` long, on the CPU."""
        found: torch.Tensor | None = getattr(self._own, "buffer", None)
        if found is None:
            found = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
            self._own.buffer = found
        return found


def write(file: WeightFile, fd: int, *, pool: Executor, buffers: Buffers) -> None:
    """Write the header and every tensor of `file` to `fd`; blocks until all is handed over.

    The tensors must not change meanwhile. Work queued on their devices' current streams is waited
    for. After a failure the pieces already begun may still be running in `pool`.

    Raises:
        OSError: the file system refused.
    """
    _await_devices(tensor for _, tensor in file.tensors)
    _write_all(fd, [memoryview(file.head)], 0)
    pieces = _pieces(file.tensors, len(file.head))
    for _ in pool.map(lambda piece: _write_piece(fd, piece, buffers), pieces):
        pass


def blocks(tensor: torch.Tensor, limit_bytes: int) -> Iterator[torch.Tensor]:
    """Yield parts of `tensor` in the order of its elements, each of at most `limit_bytes`.

    All are views; those of a contiguous tensor are contiguous.
    """
    if tensor.numel() == 0:
        return
    if tensor.nbytes <= limit_bytes:
        yield tensor
        return
    if tensor.is_contiguous():
        flat = tensor.reshape(-1)
        yield from _runs(flat, max(1, limit_bytes // tensor.element_size()))
        return
    row_bytes = tensor.nbytes // len(tensor)
    if row_bytes > limit_bytes:
        for row in tensor:
            yield from blocks(row, limit_bytes)
        return
    yield from _runs(tensor, limit_bytes // row_bytes)


def _runs(tensor: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """Yield views of `rows` rows each, the last one shorter."""
    for begin in range(0, len(tensor), rows):
        yield tensor[begin : begin + rows]


def _pieces(
    tensors: tuple[tuple[TensorSpec, torch.Tensor], ...], data_offset: int
) -> Iterator[_Piece]:
    piece = _Piece(data_offset, 0, [])
    for _, stored in tensors:
        tensor = stored
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        for block in blocks(tensor, PIECE_BYTES):
            if piece.blocks and not piece.has_room(block.nbytes):
                yield piece
                piece = _Piece(piece.offset + piece.nbytes, 0, [])
            piece.blocks.append(block)
            piece.nbytes += block.nbytes
    if piece.blocks:
        yield piece


def _write_piece(fd: int, piece: _Piece, buffers: Buffers) -> None:
    if all(block.device.type == "cpu" and block.is_contiguous() for block in piece.blocks):
        _write_all(fd, [_bytes_of(block) for block in piece.blocks], piece.offset)
        return
    buffer = buffers.take()
    done = 0
    for block in piece.blocks:
        # Alignment falls within a file, so every block begins at a multiple of its element size.
        place = buffer[done : done + block.nbytes].view(block.dtype).view(block.shape)
        place.copy_(block, non_blocking=True)
        done += block.nbytes
    _await_devices(piece.blocks)
    _write_all(fd, [_bytes_of(buffer[:done])], piece.offset)


def _bytes_of(block: torch.Tensor) -> memoryview:
    flat = block.as_strided((block.numel(),), (1,))  # a single element may have any stride
    return flat.view(torch.uint8).numpy().data


def _write_all(fd: int, parts: list[memoryview], offset: int) -> None:
    """Write all of `parts` from `offset` on, however little the kernel takes at a time."""
    missing = sum(len(part) for part in parts)
    while True:
        taken = os.pwritev(fd, parts, offset)
        offset += taken
        missing -= taken
        if not missing:
            return
        while taken >= len(parts[0]):
            taken -= len(parts[0])
            parts = parts[1:]
        parts = [parts[0][taken:], *parts[1:]]


def _await_devices(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
    """Wait for the current stream of each device that is not the CPU."""
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        else:
            torch.accelerator.synchronize(device)
