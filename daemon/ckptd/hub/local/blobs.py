"""File content, named by its sha256. Written once, checked while it is written, never changed.

Content arrives under a temporary name in `incoming/`, is hashed on its way, and gets its final name
only when size and sha256 are what was announced: after fsync of the file, by rename, with fsync of
the folder. So what carries its final name is whole, after a kill at any point too. Synchronous; one
`Incoming` belongs to one thread at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ckptd.hub.local import refusal

READ_BYTES = 1024 * 1024

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """The content store under one folder; safe to use from many threads.

    Args:
        root: made where absent. Leftovers of interrupted uploads in it are removed.
    """

    def __init__(self, root: Path) -> None:
        self._final = root / "blobs"
        self._incoming = root / "incoming"
        for folder in (self._final, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    def path(self, sha256: str) -> Path:
        """Return where the content lies, or would lie."""
        return self._final / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Return the size of the content in bytes; None when it is not here."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, sha256: str) -> bytes:
        """Return small content as a whole."""
        return self.path(sha256).read_bytes()

    def put(self, content: bytes) -> str:
        """Keep `content` and return its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if self.size(sha256) != len(content):
            with self.receive() as incoming:
                incoming.write(content)
                incoming.keep(sha256, len(content))
        return sha256

    @contextmanager
    def receive(self) -> Iterator[Incoming]:
        """Open a new temporary file; it is removed at the end unless it was kept."""
        name = self.unused_name()
        with name.open("xb") as file:
            try:
                yield Incoming(self, file, name)
            finally:
                name.unlink(missing_ok=True)

    def adopt(self, path: Path, sha256: str, size: int) -> None:
        """Take a file that lies on this filesystem, once it is what it should be.

        Raises:
            refusal.Refused: 400, it is not.
        """
        with path.open("rb+") as file:
            incoming = Incoming(self, file, path)
            while chunk := file.read(READ_BYTES):
                incoming.count(chunk)
            incoming.keep(sha256, size)

    def unused_name(self) -> Path:
        """Return a name in `incoming/` that nothing has; what is left there goes at the next start."""
        return self._incoming / f"{secrets.token_hex(8)}.part"

    @contextmanager
    def part(self, upload_id: str, offset: int) -> Iterator[BinaryIO]:
        """Open a multipart upload's file for writing at `offset`, making it where absent."""
        file = os.fdopen(os.open(self._parts(upload_id), os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        with file:
            file.seek(offset)
            yield file

    def keep_parts(self, upload_id: str, sha256: str, size: int) -> None:
        """Hash a multipart upload's file and give it its final name.

        Raises:
            refusal.Refused: 404 when nothing was uploaded, 400 when size or sha256 differ; the
                parts are removed then, since they can never become right.
        """
        name = self._parts(upload_id)
        if not name.exists():
            raise refusal.Refused(404, "no such multipart upload")
        try:
            self.adopt(name, sha256, size)
        finally:
            name.unlink(missing_ok=True)

    def _parts(self, upload_id: str) -> Path:
        if not _SHA256.fullmatch(upload_id):
            raise refusal.bad_request(f"not an upload id: {upload_id!r}")
        return self._incoming / f"{upload_id}.parts"


class Incoming:
    """Content on its way in: hashed as it is written."""

    def __init__(self, blobs: Blobs, file: BinaryIO, path: Path) -> None:
        self._blobs = blobs
        self._file = file
        self._path = path
        self._hash = hashlib.sha256()
        self.nbytes = 0

    def write(self, chunk: bytes) -> None:
        """Append `chunk`. Blocks on the disk."""
        self._file.write(chunk)
        self.count(chunk)

    def count(self, chunk: bytes) -> None:
        """Hash bytes that the file already holds."""
        self._hash.update(chunk)
        self.nbytes += len(chunk)

    def keep(self, sha256: str, size: int) -> None:
        """Make the content durable under its final name.

        Raises:
            refusal.Refused: 400, size or sha256 are not what was announced; nothing is kept.
        """
        if self.nbytes != size:
            raise refusal.bad_request(f"IncompleteBody: {self.nbytes} of {size} bytes arrived")
        found = self._hash.hexdigest()
        if found != sha256:
            raise refusal.bad_request(f"BadDigest: announced sha256 {sha256}, received {found}")
        self.place(self._blobs.path(sha256))

    def flushed(self) -> Path:
        """Return where the content is now, with all that was written readable there."""
        self._file.flush()
        return self._path

    def place(self, final: Path) -> None:
        """Make the content durable under the name `final`, unchecked."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if not final.parent.exists():
            final.parent.mkdir(exist_ok=True)
            sync_folder(final.parent.parent)
        self._path.replace(final)
        sync_folder(final.parent)


def write_durably(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace the file `path` with `content` in one step that survives a kill and a power loss."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"
        ) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
