"""Xet storage on disk: xorbs, shards, and how a file is put together from them.

A client cuts files into chunks, packs new chunks into xorbs and describes files in shards; both are
kept as they came, by hash, under `ROOT/xet`. The shards say which content (sha256) is which Xet
file. This side never unpacks: a reader gets byte ranges of xorbs.

Formats: xet-core `mdb_shard` (a 48 byte header, then per file a 48 byte record, its terms, and
where flagged verification records and a sha256 record; a record of 0xff ends the files) and
`xorb_object` (chunks, each with an 8 byte header). Hashes are written as four little-endian u64.
What a client claims about sha256 is checked when the content is first unpacked, see `unpack`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptd.hub.local import refusal
from ckptd.hub.local.blobs import Incoming, write_durably

LONGEST_SHARD_BYTES = 256 * 1024 * 1024
LONGEST_XORB_BYTES = 128 * 1024 * 1024

_RECORD = 48
_HEADER = struct.Struct("<32sQQ")
_TAG = b"HFRepoMetaData\0"
_FILE = struct.Struct("<32sIIQ")
_TERM = struct.Struct("<32sIIII")
_END = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30
_FOOTER = b"XETBLOB"
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A run of chunks of one xorb, `start` to `end` (excluded)."""

    xorb: str
    nbytes: int
    """Unpacked."""
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class XetFile:
    """A file in Xet storage: its terms, one after the other."""

    hash: str
    sha256: str | None
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(term.nbytes for term in self.terms)


class XetStore:
    """What clients uploaded, safe to use from many threads.

    Args:
        root: made where absent; its shards are read at once.
    """

    def __init__(self, root: Path) -> None:
        self._xorbs = root / "xorbs"
        self._shards = root / "shards"
        self._by_sha256: dict[str, XetFile] = {}
        self._by_hash: dict[str, XetFile] = {}
        for folder in (self._xorbs, self._shards):
            folder.mkdir(parents=True, exist_ok=True)
        for path in self._shards.glob("*.mdb"):
            self._learn(list(read_shard(path.read_bytes())))

    def find(self, sha256: str) -> XetFile | None:
        """Return the file with this content, or None."""
        return self._by_sha256.get(sha256)

    def file(self, file_hash: str) -> XetFile:
        """Return the file of this Xet hash. Raises Refused (404)."""
        found = self._by_hash.get(file_hash)
        if found is None:
            raise refusal.Refused(404, f"No Xet file {file_hash}")
        return found

    def xorb(self, xorb_hash: str) -> Path:
        """Return where a xorb lies, or would lie. Raises Refused (400) for what is no hash."""
        if not _HASH.fullmatch(xorb_hash):
            raise refusal.bad_request(f"Not a hash: {xorb_hash!r}")
        return self._xorbs / xorb_hash

    def keep_xorb(self, incoming: Incoming, xorb_hash: str) -> None:
        """Keep a xorb that has arrived. Raises Refused (400) when it is not whole."""
        chunk_offsets(incoming.flushed())
        incoming.place(self.xorb(xorb_hash))

    def keep_shard(self, content: bytes, name: str) -> None:
        """Keep a shard and know its files.

        Raises:
            refusal.Refused: 400, it is not a shard or names a xorb that never arrived.
        """
        files = list(read_shard(content))
        for xorb in {term.xorb for file in files for term in file.terms}:
            if not self.xorb(xorb).exists():
                raise refusal.bad_request(f"The shard names a xorb that is not here: {xorb}")
        write_durably(self._shards / f"{name}.mdb", content)
        self._learn(files)

    def _learn(self, files: list[XetFile]) -> None:
        for file in files:
            self._by_hash[file.hash] = file
            if file.sha256 is not None:
                self._by_sha256[file.sha256] = file


def read_shard(content: bytes) -> Iterator[XetFile]:
    """Yield the files of a shard. Raises Refused (400) when it is malformed."""
    try:
        tag, _, _ = _HEADER.unpack_from(content)
        if not tag.startswith(_TAG):
            raise refusal.bad_request("Not a shard")
        at = _RECORD
        while True:
            file_hash, flags, count, _ = _FILE.unpack_from(content, at)
            if file_hash == _END:
                return
            at += _RECORD
            fields = [_TERM.unpack_from(content, at + n * _RECORD) for n in range(count)]
            at += count * _RECORD * (2 if flags & _HAS_VERIFICATION else 1)
            sha256 = None
            if flags & _HAS_SHA256:
                sha256 = _hex(struct.unpack_from("<32s", content, at)[0])
                at += _RECORD
            terms = tuple(
                Term(xorb=_hex(xorb), nbytes=nbytes, start=start, end=end)
                for xorb, _, nbytes, start, end in fields
            )
            yield XetFile(hash=_hex(file_hash), sha256=sha256, terms=terms)
    except struct.error:
        raise refusal.bad_request("The shard is cut off") from None


def chunk_offsets(path: Path) -> list[int]:
    """Return where each chunk of a xorb begins, and where the last one ends.

    Raises:
        refusal.Refused: 400, it is not a whole xorb.
    """
    size = path.stat().st_size
    offsets = [0]
    with path.open("rb") as file:
        while offsets[-1] < size:
            file.seek(offsets[-1])
            head = file.read(8)
            if len(head) < 8:
                raise refusal.bad_request("The xorb is cut off")
            if head.startswith(_FOOTER):
                break
            offsets.append(offsets[-1] + 8 + int.from_bytes(head[1:4], "little"))
    if offsets[-1] > size or len(offsets) == 1:
        raise refusal.bad_request("The xorb is cut off")
    return offsets


def merged_runs(terms: Iterable[Term]) -> list[tuple[int, int]]:
    """Return the chunk runs of terms of one xorb, sorted, with those that touch made one.

    hf_xet wants each chunk in one run only: repeated content gives terms that overlap.
    """
    merged: list[tuple[int, int]] = []
    for start, end in sorted((term.start, term.end) for term in terms):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
