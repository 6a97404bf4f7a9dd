"""What a push put on the Hub, file by file, and how that compares with what a revision holds.

Pure. A `Record` is written when a file is uploaded (or read, for files small enough to travel
inside the commit); a `RemoteFile` is what the Hub's tree says. Equality is by content: sha256 for
files in large-file storage, the git blob id for regular ones.

**Which files a push deletes.** Only weights that would be loaded instead of, or together with, the
new ones: in each folder that gets new weights, files with the standard names of transformers'
unnamed variant (`model.safetensors`, `model-00001-of-00002.safetensors`, its index, and the same
for `pytorch_model.bin` and diffusers' names) that are not part of the push. Kept: everything in
other folders; variants (`model.fp16.safetensors`), since they are loaded only when asked for by
name; adapters, `.gguf`, `consolidated.*`, TensorFlow and Flax weights, tokenizers, and whatever else
people put there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

_WEIGHTS = re.compile(
    r"(diffusion_pytorch_)?model((-\d{5,}-of-\d{5,})?\.safetensors|\.safetensors\.index\.json)"
    r"|pytorch_model(-\d{5,}-of-\d{5,})?\.bin|pytorch_model\.bin\.index\.json"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file of a revision's tree."""

    path_in_repo: str
    nbytes: int
    blob_id: str
    """Git sha1 of the blob; for large files, of their pointer."""
    sha256: str | None
    """Of the content, for files in large-file storage only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One file of a push, ready to be committed."""

    path_in_repo: str
    nbytes: int
    sha256: str
    content: bytes | None
    """The bytes of a file that travels inside the commit; None for one in large-file storage."""

    @property
    def blob_id(self) -> str | None:
        """The git blob id of a regular file, None for a large one."""
        return None if self.content is None else git_blob_id(self.content)


def git_blob_id(content: bytes) -> str:
    """Return the sha1 that git gives this content (gitformat: header `blob SIZE NUL`)."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def difference(record: Record, remote: RemoteFile | None) -> str | None:
    """Return what is wrong with `remote` as the copy of `record`, or None when it is that file."""
    if remote is None:
        return "is not there"
    if remote.nbytes != record.nbytes:
        return f"has {remote.nbytes:,} bytes, {record.nbytes:,} were sent"
    if remote.sha256 is not None:
        if remote.sha256 != record.sha256:
            return f"has sha256 {remote.sha256}, {record.sha256} was sent"
        return None
    if record.blob_id is None:
        return "is not in large-file storage, where it was sent"
    if remote.blob_id != record.blob_id:
        return f"has git blob {remote.blob_id}, {record.blob_id} was sent"
    return None


def differences(records: Iterable[Record], tree: Mapping[str, RemoteFile]) -> list[str]:
    """Return one text for each file of the push that `tree` does not hold as it was sent."""
    texts = []
    for record in records:
        what = difference(record, tree.get(record.path_in_repo))
        if what is not None:
            texts.append(f"{record.path_in_repo} {what}")
    return texts


def stale_weights(records: Iterable[Record], tree: Mapping[str, RemoteFile]) -> list[str]:
    """Return the weight files of earlier pushes to delete, sorted; the module docstring has the rule."""
    pushed = {record.path_in_repo for record in records}
    folders = {PurePosixPath(path).parent for path in pushed if is_weights(path)}
    return sorted(
        path
        for path in tree
        if path not in pushed and is_weights(path) and PurePosixPath(path).parent in folders
    )


def is_weights(path_in_repo: str) -> bool:
    """Say whether transformers or diffusers looks for weights or their index under this name."""
    return _WEIGHTS.fullmatch(PurePosixPath(path_in_repo).name) is not None
