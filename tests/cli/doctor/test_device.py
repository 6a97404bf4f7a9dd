"""The doctor's checks of torch and accelerators."""

from __future__ import annotations

import pytest

from ckptd.cli.doctor import device
from ckptd.cli.doctor.device import Torch
from ckptd.cli.doctor.finding import Grade

CPU = Torch(version="2.6.0+cpu", import_s=2.0)
CUDA = Torch(version="2.6.0", cuda_build="12.4", devices=("H100",), import_s=2.0)
LOST = Torch(version="2.6.0", cuda_build="12.4", cuda_error="no driver", import_s=2.0)
BROKEN = Torch(error="ModuleNotFoundError: No module named 'torch'")


@pytest.mark.parametrize(
    ("found", "computes", "grade"),
    [
        (CPU, True, Grade.OK),
        (BROKEN, True, Grade.FAILED),
        (BROKEN, False, Grade.WARNING),
        (Torch(version="2.6.0", import_s=20.0), True, Grade.WARNING),
    ],
)
def test_torch(found: Torch, computes: bool, grade: Grade) -> None:
    """torch must work where a definition computes, and be quick to start."""
    assert device.torch(found, computes=computes).grade is grade


@pytest.mark.parametrize(
    ("found", "files", "asked", "grade", "text"),
    [
        (CUDA, ["cuda:0"], ["auto"], Grade.OK, "H100"),
        (CUDA, ["cuda:0"], ["cuda:1"], Grade.FAILED, "ask for cuda:1, there are 1"),
        (CPU, ["cuda:0"], ["auto"], Grade.WARNING, "built without CUDA"),
        (CPU, ["cuda:0"], ["cuda"], Grade.FAILED, "built without CUDA"),
        (LOST, ["cuda:0"], ["cuda"], Grade.FAILED, "no driver"),
        (CPU, [], ["cuda"], Grade.FAILED, "no accelerator"),
        (CPU, [], ["auto", "cpu"], Grade.SKIPPED, "on the CPU"),
        (BROKEN, ["cuda:0"], ["cuda"], Grade.SKIPPED, "does not work"),
    ],
)
def test_gpu(found: Torch, files: list[str], asked: list[str], grade: Grade, text: str) -> None:
    """What is asked for, what is there, and what torch can use are compared."""
    (finding,) = device.gpu(found, files=files, asked=asked)
    assert finding.grade is grade
    assert text in finding.what
