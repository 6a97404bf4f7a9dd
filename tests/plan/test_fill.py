"""Filling tensors from a checkpoint: the values, the memory they land in, and files that change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, Header, StoredTensor, TensorSpec
from ckptd.errors import CheckpointUnsupported, SourceChanged
from ckptd.plan import fill
from ckptd.plan.fill import Filling

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Header:
    save_file(tensors, path)
    return header.read(path)


def filled(
    head: Header, targets: dict[str, torch.Tensor], num_threads: int = 2
) -> dict[str, torch.Tensor]:
    stored = {tensor.spec.name: tensor for tensor in head.tensors}
    fillings = [Filling(stored[name], target) for name, target in targets.items()]
    fill.fill(fillings, stamps={head.path: head.stamp}, num_threads=num_threads)
    return targets


def like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=dtype or tensor.dtype)


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "RUN_BYTES", 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_torch_has_arrives_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """A tensor of the file's dtype has the file's bytes, whatever the dtype."""
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (5, 48), dtype=torch.uint8)
    tensor = raw.view(dtype)
    head = saved(tmp_path / "model.safetensors", {"a": tensor})
    target = filled(head, {"a": like(tensor)})["a"]
    assert torch.equal(target.view(torch.uint8), raw)


def test_bytes_go_into_the_memory_that_was_there(tmp_path: Path) -> None:
    """The target is written in place: views of it see the values."""
    head = saved(tmp_path / "model.safetensors", {"a": torch.arange(12.0).view(3, 4)})
    whole = torch.zeros(5, 4)
    filled(head, {"a": whole[1:4]})
    assert torch.equal(whole[1:4], torch.arange(12.0).view(3, 4))
    assert not whole[0].any()
    assert not whole[4].any()


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_many_tensors_of_odd_shapes_arrive(tmp_path: Path, num_threads: int) -> None:
    """Scalars, empty, tiny and long tensors, neighbours and not, arrive with any threads."""
    torch.manual_seed(0)
    shapes = [(), (0,), (3,), (7, 0, 2), (1000,), (33, 65), (2, 3, 5, 7), (1,), (4, 4096)]
    tensors = {f"t{n}": torch.randn(shape) for n, shape in enumerate(shapes * 3)}
    head = saved(tmp_path / "model.safetensors", tensors)
    chosen = {name: like(t) for n, (name, t) in enumerate(tensors.items()) if n % 4 != 2}
    for name, target in filled(head, chosen, num_threads).items():
        assert torch.equal(target, tensors[name])


@pytest.mark.usefixtures("small_runs")
def test_casts_are_those_of_torch(tmp_path: Path) -> None:
    """A target of another dtype has the values that `to` gives, however the read was divided."""
    torch.manual_seed(0)
    pairs = [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.int64, torch.float32),
    ]
    tensors = {f"t{n}": (torch.randn(17, 33) * 9).to(a) for n, (a, _) in enumerate(pairs)}
    head = saved(tmp_path / "model.safetensors", tensors)
    targets = {f"t{n}": like(tensors[f"t{n}"], b) for n, (_, b) in enumerate(pairs)}
    for name, target in filled(head, targets).items():
        assert torch.equal(target, tensors[name].to(target.dtype))


@pytest.mark.usefixtures("small_runs")
def test_a_target_of_other_strides_gets_the_same_values(tmp_path: Path) -> None:
    """Transposed, strided and channels-last targets are filled by element, not by byte."""
    tensor = torch.randn(4, 6, 8, 10)
    head = saved(
        tmp_path / "model.safetensors",
        {"a": tensor, "b": tensor[0, 0].clone(), "c": tensor[:, 0, 0, 0].clone()},
    )
    targets = {
        "a": torch.zeros_like(tensor).to(memory_format=torch.channels_last),
        "b": torch.zeros(10, 8).t(),
        "c": torch.zeros(400)[::100],
    }
    filled(head, targets)
    assert torch.equal(targets["a"], tensor)
    assert torch.equal(targets["b"], tensor[0, 0])
    assert torch.equal(targets["c"], tensor[:, 0, 0, 0])


def test_offsets_that_fit_no_dtype_are_read(tmp_path: Path) -> None:
    """A tensor that begins at an odd byte of the file is cast all the same."""
    path = tmp_path / "model.safetensors"
    specs = [TensorSpec("odd", Dtype.U8, (3,)), TensorSpec("after", Dtype.F32, (2,))]
    values = torch.tensor([1.5, -2.0])
    path.write_bytes(
        header.encode(specs, metadata={}) + b"abc" + bytes(values.view(torch.uint8).tolist())
    )
    targets = {"odd": torch.zeros(3), "after": torch.zeros(2, dtype=torch.float64)}
    filled(header.read(path), targets)
    assert targets["after"].tolist() == [1.5, -2.0]
    assert targets["odd"].tolist() == [97, 98, 99]


def test_parameters_are_filled_and_keep_their_gradient_flag(tmp_path: Path) -> None:
    """A parameter that requires a gradient is filled without a trace in autograd."""
    head = saved(tmp_path / "model.safetensors", {"a": torch.ones(3), "b": torch.ones(3)})
    targets = {
        "a": torch.nn.Parameter(torch.zeros(3)),
        "b": torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)),
    }
    filled(head, targets)
    for parameter in targets.values():
        assert parameter.tolist() == [1, 1, 1]
        assert parameter.requires_grad
        assert parameter.grad_fn is None


def test_many_neighbours_are_read_in_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand small tensors that lie side by side cost a handful of reads."""
    tensors = {f"t{n:04}": torch.full((4,), float(n)) for n in range(2000)}
    head = saved(tmp_path / "model.safetensors", tensors)
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    targets = filled(head, {name: like(tensor) for name, tensor in tensors.items()})
    assert all(torch.equal(target, tensors[name]) for name, target in targets.items())
    assert len(calls) <= 3


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that gives fewer bytes than asked goes on where it stopped, across buffers."""
    tensors = {name: torch.randn(5, 7) for name in "abcdef"}
    head = saved(tmp_path / "model.safetensors", tensors)
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        wanted, left = [], 173
        for buffer in buffers:
            wanted.append(buffer[:left])
            left -= len(wanted[-1])
        return preadv(fd, [buffer for buffer in wanted if len(buffer)], offset)

    monkeypatch.setattr(os, "preadv", short)
    targets = filled(head, {name: like(tensor) for name, tensor in tensors.items()})
    assert all(torch.equal(target, tensors[name]) for name, target in targets.items())


def test_a_file_that_was_truncated_after_planning_is_named(tmp_path: Path) -> None:
    """A file with another size than its header's reading saw raises SourceChanged, no SIGBUS."""
    path = tmp_path / "model.safetensors"
    head = saved(path, {"a": torch.randn(1000)})
    os.truncate(path, 2000)
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        filled(head, {"a": torch.zeros(1000)})


def test_a_file_that_changes_during_the_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file rewritten after it was opened is found by the check at the end."""
    path = tmp_path / "model.safetensors"
    head = saved(path, {"a": torch.randn(1000)})
    preadv = os.preadv

    def rewriting(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.utime(path, ns=(1, 1))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", rewriting)
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        filled(head, {"a": torch.zeros(1000)})


def test_wrong_targets_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """A target of another shape, or one without memory, is a ValueError that names the tensor."""
    head = saved(tmp_path / "model.safetensors", {"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="'a'"):
        filled(head, {"a": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="meta"):
        filled(head, {"a": torch.zeros(2, 3, device="meta")})


def test_a_dtype_torch_does_not_have_is_refused(tmp_path: Path) -> None:
    """A packed type of fewer than eight bits names file and tensor."""
    spec = TensorSpec("packed", Dtype.F4, (4, 4))
    stored = StoredTensor(spec, Extent(tmp_path / "model.safetensors", 100, spec.nbytes))
    with pytest.raises(CheckpointUnsupported, match="'packed'"):
        fill.fill([Filling(stored, torch.zeros(4, 4))], stamps={})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("small_runs")
def test_a_cuda_target_gets_the_same_values(tmp_path: Path) -> None:
    """Through pinned buffers, with and without a cast, values are those of the file."""
    torch.manual_seed(0)
    tensors = {f"t{n}": torch.randn(5 + n, 33).to(torch.bfloat16) for n in range(40)}
    head = saved(tmp_path / "model.safetensors", tensors)
    targets = {
        name: torch.zeros_like(
            tensor, device="cuda", dtype=torch.float32 if place % 3 == 0 else tensor.dtype
        )
        for place, (name, tensor) in enumerate(tensors.items())
    }
    targets["t7"] = torch.zeros(33, 12, device="cuda", dtype=torch.bfloat16).t()
    for name, target in filled(head, targets).items():
        assert torch.equal(target.cpu(), tensors[name].to(target.dtype))
