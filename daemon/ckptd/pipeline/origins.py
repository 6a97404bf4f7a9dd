"""What an adapter was trained on, as far as its publication tells: name, kind, license.

An adapter has no model's config. What is needed of its base besides the weights (the model_type for
a placeholder, the license for the model card) is read here: from the base's folder, or as a small
file from the Hub. A base that is nowhere to be found is no failure here. Everything here blocks.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import adapter_files
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.hub import card
from ckptd.pipeline import bases, placeholders
from ckptd.pipeline.bases import Place
from ckptd.pipeline.definition import Push

_HUB_URL = "https://huggingface.co"
_CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The base of an adapter: its folder, and the repo of the Hub that it is, where one is known."""

    folder: Path | None
    repo_id: str | None
    revision: str

    def read(self, name: str, *, endpoint: str | None, online: bool) -> bytes | None:
        """Return a small file of the base; None where it has none, or cannot be found.

        Raises:
            HubError: `online`, and the Hub cannot answer.
        """
        if self.folder is not None:
            path = self.folder / name
            if path.is_file():
                return path.read_bytes()
        if self.repo_id is None:
            return None
        snapshot: Any = importlib.import_module("ckptd.hub.snapshot")
        found: bytes | None = snapshot.read(
            self.repo_id, self.revision, name, endpoint=endpoint, online=online
        )
        return found


def of(source: Checkpoint, *, beside: Path, place: Place | None = None) -> Origin | None:
    """Return the base of the adapter `source`; None for a whole model, or where none is named.

    `place` is where the base is that it is merged into. Folders are found as `bases.locate` does.
    """
    if source.config_path.name != adapter_files.CONFIG_NAME:
        return None
    said = adapter_files.read_config(source.config_path)
    named = said.get("base_model_name_or_path")
    named = named if isinstance(named, str) and named else None
    folder = None if named is None else bases.folder_of(named, beside)
    model_id = named if folder is None and card.is_model_id(named) else None
    revision = said.get("revision")
    revision = revision if isinstance(revision, str) and revision else "main"
    if place is not None:
        folder, revision = place.folder, place.commit or revision
        model_id = place.repo_id or model_id
    cached = None if folder is None else bases.cached_repo(folder)
    if cached is not None:
        model_id, revision = cached
    if folder is None and model_id is None:
        return None
    return Origin(folder=folder, repo_id=model_id, revision=revision)


def model_type(
    push: Push | None, source: Checkpoint, origin: Origin | None, *, endpoint: str | None
) -> str | None:
    """Return the model_type for the placeholder of that name: of an adapter, that of its base.

    The base is asked only where `push` uses the placeholder.

    Raises:
        HubError: the Hub cannot answer.
    """
    if origin is None:
        return _text(source.config.get("model_type"))
    if push is None or not _uses_model_type(push):
        return None
    content = origin.read(_CONFIG_NAME, endpoint=endpoint, online=True)
    try:
        config = json.loads(content or b"{}")
    except ValueError:
        return None
    return _text(config.get("model_type")) if isinstance(config, dict) else None


def card_facts(
    source: Checkpoint, origin: Origin | None, *, merged: bool, endpoint: str | None, online: bool
) -> card.Facts:
    """Return what the model card of an adapter, or of what it was merged into, may lack.

    License and task are those of the base, unless a merged adapter's own card says others.

    Raises:
        HubError: `online`, and the Hub cannot answer.
    """
    if source.config_path.name != adapter_files.CONFIG_NAME:
        return card.NOTHING
    relation = "finetune" if merged else "adapter"
    borrowed: dict[str, str] = {}
    if origin is not None:
        content = origin.read(card.CARD_NAME, endpoint=endpoint, online=online)
        borrowed = dict(card.borrowed((content or b"").decode(errors="replace")))
        link = borrowed.get("license_link", "")
        if link and "://" not in link:
            if origin.repo_id is None:
                del borrowed["license_link"]
            else:
                borrowed["license_link"] = f"{_HUB_URL}/{origin.repo_id}/blob/main/{link}"
    if merged:
        borrowed = card.over(_own(source), borrowed)
    return card.Facts(
        base_model=None if origin is None else origin.repo_id,
        relation=relation,
        borrowed=tuple(borrowed.items()),
    )


def _own(source: Checkpoint) -> dict[str, str]:
    """Return what the adapter's own card says that stays true of the merged model."""
    readme = source.config_path.with_name(card.CARD_NAME)
    if not readme.is_file():
        return {}
    return dict(card.borrowed(readme.read_text("utf-8", errors="replace")))


def _uses_model_type(push: Push) -> bool:
    texts = [text for text in push.model_dump().values() if isinstance(text, str)]
    return any("model_type" in placeholders.used(text) for text in [*texts, *push.tags])


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
