"""Reading windows of source files: every range, whatever lies between."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, FileStamp
from ckptd.errors import SourceChanged
from ckptd.plan.sources import Sources
from ckptd.quant.parts import Part

ROW_BYTES = 40_000


def matrix(path: Path, num_rows: int, *, cut: int = 0) -> Part:
    """Write random bytes, `cut` of them missing at the end; return all as a part."""
    raw = random.Random(num_rows).randbytes(num_rows * ROW_BYTES)
    path.write_bytes(raw[: len(raw) - cut])
    return Part("matrix", Extent(path, 0, len(raw)), Dtype.U8, num_rows, ROW_BYTES)


@pytest.mark.parametrize("columns", [range(300, 340), range(100, 39_000), range(ROW_BYTES)])
@pytest.mark.parametrize("num_rows", [1, 3, 1200])
def test_a_window_has_its_columns_of_every_row(
    tmp_path: Path, columns: range, num_rows: int
) -> None:
    """Narrow columns far apart, wide ones close together and whole rows are all read exactly."""
    part = matrix(tmp_path / "source", num_rows)
    window = part.window(columns=columns)
    buffer = bytearray(window.nbytes)
    with Sources({part.extent.path: FileStamp.of(part.extent.path.stat())}) as sources:
        sources.gather(memoryview(buffer), window)
    raw = part.extent.path.read_bytes()
    cut = slice(columns.start, columns.stop)
    wanted = [raw[row * ROW_BYTES : (row + 1) * ROW_BYTES][cut] for row in range(num_rows)]
    assert bytes(buffer) == b"".join(wanted)


@pytest.mark.parametrize("columns", [range(300, 340), range(100, 39_000)])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, columns: range) -> None:
    """A window whose last range is not all there says that the source changed."""
    part = matrix(tmp_path / "source", 4, cut=ROW_BYTES - columns.stop + 1)
    window = part.window(columns=columns)
    stamps = {part.extent.path: FileStamp.of(part.extent.path.stat())}
    with Sources(stamps) as sources, pytest.raises(SourceChanged):
        sources.gather(memoryview(bytearray(window.nbytes)), window)
