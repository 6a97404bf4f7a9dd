"""Reading a binary header of unknown length: forward, in large steps, never past the end.

Every length that a file claims is compared with the bytes that are there before anything is
allocated, so that a hostile header costs no more memory than its own size.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from ckptd.errors import CheckpointCorrupt

STEP_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 28
"""The largest vocabularies with their merges take some 20 MB; more than this is no header."""
_LENGTH = struct.Struct("<Q")


class Cursor:
    """A place in a file that moves forward; `what` in each method names what is read there."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int, *, start: int = 0) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self._file = file
        self._start = start
        """Where in the file the buffer begins."""
        self._buffer = bytearray()
        self._at = 0
        file.seek(start)

    @property
    def position(self) -> int:
        """The offset in the file of the next byte."""
        return self._start + self._at

    def take(self, nbytes: int, what: str) -> bytes:
        """Return the next bytes.

        Raises:
            CheckpointCorrupt: the file ends before.
        """
        self._require(nbytes, what)
        begin = self._at
        self._at += nbytes
        return bytes(self._buffer[begin : self._at])

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        """Return the next values as `struct` reads `form` in little-endian order.

        Raises:
            CheckpointCorrupt: the file ends before.
        """
        layout = struct.Struct("<" + form)
        self._require(layout.size, what)
        values = layout.unpack_from(self._buffer, self._at)
        self._at += layout.size
        return values

    def text(self, what: str, *, strict: bool = True) -> str:
        """Return the next text: a length of 8 bytes, then UTF-8.

        Raises:
            CheckpointCorrupt: the file ends before, or (where `strict`) it is no UTF-8.
        """
        (length,) = self.unpack("Q", what)
        raw = self.take(length, what)
        try:
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError as error:
            raise CheckpointCorrupt(
                f"{what} is not text", path=self.path, found=repr(raw[:60])
            ) from error

    def skip(self, nbytes: int, what: str) -> None:
        """Move past the next bytes.

        Raises:
            CheckpointCorrupt: the file ends before.
        """
        self._require(nbytes, what)
        self._at += nbytes

    def skip_texts(self, count: int, what: str) -> None:
        """Move past `count` texts.

        Raises:
            CheckpointCorrupt: the file ends before.
        """
        self._require_left(count * _LENGTH.size, what)
        for _ in range(count):  # a vocabulary has several 100,000: no calls on the usual way
            if self._at + _LENGTH.size > len(self._buffer):
                self._require(_LENGTH.size, what)
            (length,) = _LENGTH.unpack_from(self._buffer, self._at)
            after = self._at + _LENGTH.size + length
            if after > len(self._buffer):
                self._require(_LENGTH.size + length, what)
            self._at = after

    def _require(self, nbytes: int, what: str) -> None:
        """Have the next `nbytes` in the buffer."""
        self._require_left(nbytes, what)
        while len(self._buffer) - self._at < nbytes:
            missing = nbytes - (len(self._buffer) - self._at)
            part = self._file.read(max(missing, STEP_BYTES))
            if not part:
                raise CheckpointCorrupt("shrank while its header was read", path=self.path)
            self._buffer += part

    def _require_left(self, nbytes: int, what: str) -> None:
        end = self.position + nbytes
        if end > self.file_bytes:
            raise CheckpointCorrupt(
                f"ends within its header, at {what!r}",
                path=self.path,
                expected=f"at least {end} bytes",
                found=f"{self.file_bytes}",
                hint="the file is truncated: copy or download it again",
            )
        if self._at + nbytes > MAX_HEADER_BYTES:
            raise CheckpointCorrupt(
                f"its header is larger than any, at {what!r}",
                path=self.path,
                expected=f"at most {MAX_HEADER_BYTES} bytes",
                found=f"{self._at + nbytes}",
            )
