"""Which file systems are on the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.watch import mounts

MOUNTINFO = r"""
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:25 / /data rw,relatime shared:2 master:1 - nfs4 server:/export rw,vers=4.2
31 30 254:2 / /data/local rw - xfs /dev/vdb rw
32 22 0:30 / /s3 rw - fuse.s3fs s3fs rw
33 22 0:31 / /with\040space rw - lustre a@tcp:/fs rw
34 22 0:32 / /twice rw - nfs server:/a rw
35 34 0:33 / /twice rw - tmpfs tmpfs rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/runs/a", None),
        ("/data/runs", "nfs4"),
        ("/database", None),
        ("/data/local/runs", None),
        ("/s3/x", "fuse.s3fs"),
        ("/with space/x", "lustre"),
        ("/twice/x", None),
    ],
)
def test_nearest_mount_decides(path: str, kind: str | None) -> None:
    """The innermost, latest mount says whether a path is on the network."""
    assert mounts.network_type(Path(path), mountinfo=MOUNTINFO) == kind


def test_this_machine_has_a_root(tmp_path: Path) -> None:
    """The real mount table can be read."""
    text = mounts.MOUNTINFO_PATH.read_text("utf-8")
    assert mounts.file_system_type(tmp_path, text) is not None
