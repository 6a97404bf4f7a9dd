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
36 22 0:34 / /image rw - overlay overlay rw,lowerdir=/data/image:/lib,upperdir=/up,workdir=/w
37 22 0:35 / /container rw - overlay overlay rw,lowerdir=/lib,upperdir=/up,workdir=/w
38 22 0:36 / /windows rw - smb3 //server/share rw
39 22 0:37 / /guest rw - 9p host rw
40 22 0:38 / /stick rw - vfat /dev/sdb1 rw
41 30 0:39 / /data/cache rw - fuse.gcsfuse bucket rw
42 22 0:40 / /auto rw - autofs systemd-1 rw,direct
43 42 0:41 / /auto rw - nfs server:/b rw
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
        ("/image/runs", "overlay on nfs4"),
        ("/container/runs", None),
        ("/windows/x", "smb3"),
        ("/guest/x", "9p"),
        ("/stick/x", None),
        ("/data/cache/x", "fuse.gcsfuse"),
        ("/auto/x", "nfs"),
    ],
)
def test_nearest_mount_decides(path: str, kind: str | None) -> None:
    """The innermost, latest mount says whether a path is on the network."""
    assert mounts.file_system(Path(path), mountinfo=MOUNTINFO).network == kind


@pytest.mark.parametrize(
    ("path", "exact"),
    [
        ("/runs", True),
        ("/data/runs", True),
        ("/with space/x", True),
        ("/s3/x", False),
        ("/stick/x", False),
        ("/windows/x", False),
        ("/guest/x", False),
    ],
)
def test_whose_folders_have_exact_times(path: str, exact: bool) -> None:
    """Times of folders are believed only where the type is known to move them with each name."""
    assert mounts.file_system(Path(path), mountinfo=MOUNTINFO).exact_mtimes is exact


def test_no_mount_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mounts cannot be read nothing is believed, and events are used."""
    monkeypatch.setattr(mounts, "MOUNTINFO_PATH", tmp_path / "none")
    assert mounts.file_system(tmp_path) == mounts.FileSystem()


def test_this_machine_has_a_root(tmp_path: Path) -> None:
    """The real mount table can be read, and every path lies on some mount of it."""
    text = mounts.MOUNTINFO_PATH.read_text("utf-8", "surrogateescape")
    assert mounts._holding(tmp_path, list(mounts._mounts(text))) is not None
