"""Xet storage as a folder (casUrl `local://`)."""

from __future__ import annotations

from pathlib import Path


class XetFolder:
    """Placeholder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, sha256: str) -> tuple[str, int] | None:
        """Find."""
        return None
