"""Tensors put together from parts of files: flat pieces, boxes, and adapters merged in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import FileStamp
from ckptd.plan import blocks, evaluate, expression, plan
from ckptd.plan.nodes import Cast, Columns, Concat, Expression, Load, LowRank, Tile, Tiles, View
from ckptd.plan.plan import Computed, Run
from ckptd.plan.sources import Sources

SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class Files:
    """Tensors in one file, as loads, and the values of expressions over them."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
        self.path = path
        self.loads = {t.spec.name: expression.load(t) for t in header.read(path).tensors}

    def value(self, wanted: Expression) -> torch.Tensor:
        """Return the value as the stream makes it: runs copied, the rest computed in blocks."""
        raw = bytearray()
        stamp = FileStamp.of(self.path.stat())
        with Sources({self.path: stamp}) as sources:
            evaluator = evaluate.Evaluator(device="cpu", sources=sources)
            for segment in plan.segments_of([("t", wanted)]):
                for batch in blocks.batches([segment]):
                    staged = evaluator.read(batch)
                    raw += b"".join(evaluator.compute(staged))
                    evaluator.release(staged)
        dtype = evaluate._torch_dtype(wanted.dtype)
        return torch.frombuffer(raw or bytearray(8), dtype=dtype)[: expression.numel(wanted)].view(
            wanted.shape
        )


@SETTINGS
@given(data=st.data())
def test_flat_pieces_make_a_tensor(data: st.DataObject, tmp_path: Path) -> None:
    """Pieces that end anywhere within rows are copied byte for byte, whole or any rows of it."""
    whole = torch.arange(60, dtype=torch.float32).view(12, 5)
    cuts = sorted(data.draw(st.lists(st.integers(0, 60), max_size=4)))
    bounds = list(zip([0, *cuts], [*cuts, 60], strict=True))
    pieces = {f"p{n}": whole.flatten()[a:b] for n, (a, b) in enumerate(bounds)}
    files = Files(tmp_path / "t.safetensors", pieces)
    parts = [files.loads[name] for name in pieces]
    wanted = expression.view(expression.concat(parts), (12, 5))
    assert all(isinstance(part, Run) for part in plan.segments_of([("t", wanted)]))
    assert torch.equal(files.value(wanted), whole)
    start = data.draw(st.integers(0, 11))
    stop = data.draw(st.integers(start + 1, 12))
    assert torch.equal(files.value(expression.rows(wanted, start, stop)), whole[start:stop])
    halved = expression.cast(wanted, Dtype.F16)
    assert torch.equal(files.value(halved), whole.half())


@SETTINGS
@given(data=st.data())
def test_boxes_make_a_tensor(data: st.DataObject, tmp_path: Path) -> None:
    """A tensor divided along two axes is put together, whole or any rows of it."""
    whole = torch.randn(12, 10, 3)
    cut, across = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 10))
    boxes = {
        f"{a}-{c}": (whole[a:b, c:d], (a, c, 0))
        for a, b in ((0, cut), (cut, 12))
        for c, d in ((0, across), (across, 10))
        if a < b and c < d
    }
    files = Files(tmp_path / "t.safetensors", {name: box for name, (box, _) in boxes.items()})
    parts = [Tile(files.loads[name], at) for name, (_, at) in boxes.items()]
    wanted = expression.tiles(parts, (12, 10, 3))
    assert torch.equal(files.value(wanted), whole)
    assert torch.equal(files.value(expression.cast(wanted, Dtype.BF16)), whole.bfloat16())
    start = data.draw(st.integers(0, 11))
    stop = data.draw(st.integers(start + 1, 12))
    assert torch.equal(files.value(expression.rows(wanted, start, stop)), whole[start:stop])


def test_boxes_along_the_rows_are_copied(tmp_path: Path) -> None:
    """What is divided along its rows alone needs no computation, in whatever order it comes."""
    whole = torch.randn(6, 4)
    files = Files(tmp_path / "t.safetensors", {"a": whole[:2], "b": whole[2:]})
    wanted = expression.tiles(
        [Tile(files.loads["b"], (2, 0)), Tile(files.loads["a"], (0, 0))], (6, 4)
    )
    assert isinstance(wanted, Concat)
    assert torch.equal(files.value(wanted), whole)


@pytest.mark.parametrize(
    ("at", "match"), [((0, 0), "overlap"), ((3, 0), "outside"), ((-1, 0), "outside")]
)
def test_boxes_that_leave_a_hole_are_refused(
    at: tuple[int, int], match: str, tmp_path: Path
) -> None:
    """The right number of elements is not enough: no element twice, none outside."""
    files = Files(tmp_path / "t.safetensors", {"a": torch.ones(2, 4), "b": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=match):
        expression.tiles([Tile(files.loads["a"], (0, 0)), Tile(files.loads["b"], at)], (4, 4))
    with pytest.raises(ValueError, match="cover"):
        expression.tiles([Tile(files.loads["a"], (0, 0))], (4, 4))


def test_values_do_not_depend_on_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes and merged adapters are the same in blocks of one row."""
    torch.manual_seed(0)
    tensors = {
        "left": torch.randn(30, 4), "right": torch.randn(30, 6), "base": torch.randn(30, 10),
        "down": torch.randn(3, 10), "up": torch.randn(30, 3),
    }  # fmt: skip
    files = Files(tmp_path / "t.safetensors", tensors)
    loads = files.loads
    boxes = expression.tiles([Tile(loads["left"], (0, 0)), Tile(loads["right"], (0, 4))], (30, 10))
    assert isinstance(boxes, Tiles)
    merged = LowRank(loads["base"], loads["down"], loads["up"], 0.5, Dtype.BF16)
    before = [files.value(boxes), files.value(merged)]
    monkeypatch.setattr(blocks, "_MERGED_BLOCK_BYTES", 1)
    (segment,) = plan.segments_of([("t", merged)])
    assert isinstance(segment, Computed)
    assert sum(len(batch) for batch in blocks.batches([segment])) == 30
    assert torch.equal(files.value(boxes), before[0])
    assert torch.allclose(files.value(merged).float(), before[1].float(), atol=1e-2)


@pytest.mark.parametrize("length", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (8, 3, 2)])
def test_an_adapter_is_merged_in_float32(
    shape: tuple[int, ...], length: bool, tmp_path: Path
) -> None:
    """Base and product are added in float32 and rounded once; DoRA scales each row."""
    torch.manual_seed(1)
    tensors = {
        "base": torch.randn(shape).bfloat16(),
        "down": torch.randn(2, 6).bfloat16(),
        "up": torch.randn(8, 2).bfloat16(),
        "length": torch.rand(8) + 0.5,
    }
    files = Files(tmp_path / "t.safetensors", tensors)
    loads = files.loads
    merged = LowRank(
        loads["base"],
        loads["down"],
        loads["up"],
        2.0,
        Dtype.BF16,
        loads["length"] if length else None,
    )
    base, down, up = (tensors[name].double() for name in ("base", "down", "up"))
    expected = base.reshape(8, 6) + 2.0 * up @ down
    if length:
        expected *= (tensors["length"].double() / expected.norm(dim=1))[:, None]
    found = files.value(merged)
    assert found.shape == shape
    assert torch.allclose(found.double().view(8, 6), expected, rtol=2**-8, atol=1e-3)
    axis = merged.axis
    assert torch.equal(
        files.value(expression.rows(merged, 3, 7, axis=axis)),
        found.narrow(axis, 3, 4),
    )


def test_views_of_loads_stay_loads(tmp_path: Path) -> None:
    """A view of stored elements in a row is simply a load of another shape."""
    files = Files(tmp_path / "t.safetensors", {"a": torch.ones(6)})
    load = files.loads["a"]
    assert expression.view(load, (2, 3)) == Load(load.extent, Dtype.F32, (2, 3))
    halved = expression.view(expression.cast(load, Dtype.F16), (2, 3))
    assert isinstance(halved, Cast)
    assert not isinstance(halved.source, View)
    with pytest.raises(ValueError, match="in one row"):
        expression.view(load, (4, 2))


@pytest.mark.parametrize("turned", [False, True])
def test_columns_of_a_factor(turned: bool, tmp_path: Path) -> None:
    """Every third column of a matrix, as they are or as rows, in an adapter's product."""
    factor, identity = torch.randn(14, 14), torch.eye(4)
    wanted = factor[:, 1:13:3].T if turned else factor[:, 1:13:3]
    tensors = {"factor": factor, "eye": identity if not turned else torch.eye(14)}
    files = Files(tmp_path / "t.safetensors", tensors | {"base": torch.zeros(wanted.shape)})
    up = Columns(files.loads["factor"], count=4, first=1, step=3, turned=turned)
    assert up.shape == tuple(wanted.shape)
    made = LowRank(files.loads["base"], files.loads["eye"], up, 1.0, Dtype.F32)
    assert torch.equal(files.value(made), wanted)
    assert torch.equal(files.value(expression.rows(made, 1, 3)), wanted[1:3])


def test_columns_scaled_to_a_length(tmp_path: Path) -> None:
    """Lengths are those of whole columns, however many blocks the tensor is divided into."""
    rows = blocks.BLOCK_BYTES // 16 * 3
    base, down, up = torch.randn(rows, 8), torch.randn(2, 8), torch.randn(rows, 2)
    length = torch.rand(8)
    files = Files(
        tmp_path / "t.safetensors", {"base": base, "down": down, "up": up, "length": length}
    )
    one = LowRank(*(files.loads[name] for name in ("base", "down", "up")), 0.5, Dtype.F32)
    made = dataclasses.replace(one, magnitude=files.loads["length"], whole=one)
    assert len(list(blocks.batches(plan.segments_of([("t", made)])))) > 1
    exact = base.double() + 0.5 * up.double() @ down.double()
    exact *= length / exact.norm(dim=0)
    assert torch.allclose(files.value(made).double(), exact, atol=1e-6)


def test_a_sum_without_a_second_factor(tmp_path: Path) -> None:
    """A vector is added as it is, times the scale."""
    files = Files(tmp_path / "t.safetensors", {"base": torch.ones(5), "up": torch.arange(5.0)})
    made = LowRank(files.loads["base"], None, files.loads["up"], 2.0, Dtype.F32)
    assert torch.equal(files.value(made), 1 + 2 * torch.arange(5.0))
