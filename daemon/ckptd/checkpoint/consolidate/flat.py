"""Vectors that lie in several files, one part after the other, and cuts of them as extents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptd.checkpoint.header import Extent
from ckptd.checkpoint.inert import TensorRef
from ckptd.checkpoint.torch_file import TorchFile


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of a rank's vector: `numel` from the one `begin` of all."""

    tensor: TensorRef
    file: TorchFile
    begin: int
    numel: int


class Vector:
    """Flat tensors of files, taken one after the other as a single one."""

    def __init__(self, parts: Sequence[tuple[TorchFile, TensorRef]]) -> None:
        self.runs: list[Run] = []
        self.numel = 0
        for file, tensor in parts:
            numel = math.prod(tensor.shape)
            self.runs.append(Run(tensor, file, self.numel, numel))
            self.numel += numel
        self._first = 0

    def cut(self, begin: int, numel: int) -> Iterator[tuple[int, Extent]]:
        """Yield (elements, extent) of the elements from `begin` on; cuts are asked in order."""
        end = begin + numel
        while self._first < len(self.runs) and self._end(self._first) <= begin:
            self._first += 1
        place = self._first
        while place < len(self.runs) and self.runs[place].begin < end:
            run = self.runs[place]
            low, high = max(begin, run.begin), min(end, run.begin + run.numel)
            if low < high:
                part = TensorRef(
                    run.tensor.storage,
                    run.tensor.offset + low - run.begin,
                    (high - low,),
                    (1,),
                    run.tensor.dtype,
                )
                yield high - low, run.file.extent(part)
            place += 1

    def _end(self, place: int) -> int:
        return self.runs[place].begin + self.runs[place].numel


def trimmed(
    vectors: Sequence[Vector], begin: int, part: int, numel: int
) -> Iterator[tuple[int, Extent]]:
    """Yield the parts of one parameter, rank by rank, without the padding at its end."""
    for rank, vector in enumerate(vectors):
        yield from vector.cut(begin, max(0, min(part, numel - rank * part)))
