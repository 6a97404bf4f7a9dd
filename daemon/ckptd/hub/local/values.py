"""What the Hub keeps: repos, commits, files, tags, discussions. Immutable values, no behaviour.

A repo's whole mutable state is one `Repo` value, which is replaced in one piece. A commit is a
snapshot, path -> file, that never changes. Both are written to disk as JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["models", "datasets", "spaces"]
"""Repo types, as the API's paths spell them."""
KINDS: tuple[Kind, ...] = ("models", "datasets", "spaces")
Status = Literal["draft", "open", "closed", "merged"]
EventType = Literal["comment", "status-change", "commit", "title-change"]

MAIN = "main"
LONGEST_REGULAR_BYTES = 10 * 1024 * 1024
"""Larger files must travel over LFS or Xet."""


def git_oid(content: bytes) -> str:
    """Return the git object id of a file with this content (sha1 over `blob <size>\\0<content>`)."""
    head = b"blob %d\0" % len(content)
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """Return the text that git holds in place of an LFS file (git-lfs specification v1)."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a commit; its content is the blob `sha256`."""

    oid: str
    """Git object id: of the content, or of the pointer for an LFS file."""
    sha256: str
    size: int
    lfs: bool
    xet_hash: str | None = None
    """Name of the content in Xet storage, where it came that way."""

    @property
    def etag(self) -> str:
        """What the client keys its cache with: sha256 for LFS, the git object id else."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One snapshot of a repo; history is linear, so there is one parent at most."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A name for one commit."""

    commit: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened in a discussion; `data` is in the API's own form."""

    id: str
    type: EventType
    author: str
    date: str
    data: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Discussion:
    """A discussion, or a pull request where `base` is set; its commits are on refs/pr/N."""

    num: int
    title: str
    author: str
    date: str
    status: Status
    base: str | None = None
    """Branch that a pull request wants to change."""
    merge_commit: str | None = None
    events: tuple[Event, ...] = ()

    @property
    def is_pull_request(self) -> bool:
        """Whether it has commits of its own."""
        return self.base is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repo:
    """Everything of a repo that can change. Replaced as one value, on disk too."""

    kind: Kind
    namespace: str
    name: str
    private: bool
    date: str
    branches: Mapping[str, str]
    gated: bool | str = False
    tags: Mapping[str, Tag] = field(default_factory=dict)
    pulls: Mapping[int, str] = field(default_factory=dict)
    """Pull request number -> its newest commit."""
    discussions: Mapping[int, Discussion] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def url_path(self) -> str:
        """Path of the repo's page, without the leading slash: `ns/name`, `datasets/ns/name`."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"
