"""Facts of the machine, read from files of the kernel's form."""

from __future__ import annotations

from pathlib import Path

from ckptd.telemetry import node


def test_memory_is_the_smaller_of_node_and_cgroup(tmp_path: Path) -> None:
    """A container's bound counts where it is below the node's memory; `max` is none."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\nMemFree: 1 kB\n")
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    assert node.memory_bytes(meminfo=meminfo, cgroups=tmp_path) == 1_024_000
    limit.write_text("512000\n")
    assert node.memory_bytes(meminfo=meminfo, cgroups=tmp_path) == 512_000


def test_old_cgroups_count_too(tmp_path: Path) -> None:
    """The first version of cgroups has another file."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4096\n")
    assert node.memory_bytes(meminfo=meminfo, cgroups=tmp_path) == 4096


def test_accelerators(tmp_path: Path) -> None:
    """Numbered device files are accelerators, the control devices are not."""
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert node.accelerators(tmp_path) == ("cuda:0", "cuda:1")


def test_free_space_of_a_folder_to_be(tmp_path: Path) -> None:
    """A folder that is not there yet is judged by the disk it will be on."""
    assert node.free_bytes(tmp_path / "a" / "b") > 0
    assert 0 < node.low_water_bytes(tmp_path / "a" / "b") <= node.LOW_WATER_BYTES
