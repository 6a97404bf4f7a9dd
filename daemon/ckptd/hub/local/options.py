"""What one running Hub consists of: the store, the accounts, its choices. Shared by all routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import anyio

from ckptd.hub.local.accounts import Account
from ckptd.hub.local.store import Store
from ckptd.hub.local.xet import XetStore

MULTIPART_OVER_BYTES = 5 * 1000**3
"""Larger LFS objects are uploaded in parts of at most this size, as on the public Hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a Hub's owner may choose."""

    xet: bool = True
    """Offer Xet. A client that has hf_xet needs it, unless HF_HUB_DISABLE_XET is set."""
    multipart_over_bytes: int = MULTIPART_OVER_BYTES
    tree_page: int = 1000
    """Entries of one answer to a tree request (a twentieth of it when expanded)."""
    commits_page: int = 50
    discussions_page: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """One running Hub; lives as long as its app."""

    store: Store
    accounts: Mapping[str, Account]
    secret: bytes
    """Signs upload links."""
    xet: XetStore | None
    choices: Choices
    threads: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(16))
    """Threads that wait for the disk."""
    unpackers: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    """Threads that unpack Xet content; they ask this very Hub, so they must not take all of
    `threads`."""
