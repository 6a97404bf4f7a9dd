"""The base model of a merge: which one it is, what identifies it, and its files.

`locate` says which: a folder, or a repo of the Hub at a commit, so that a job and its retries have
the same one however the branch moves. `open_base` gets its files, which may take long for a repo
that is not in the cache. Everything here blocks.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import adapter_files, checkpoint, content, listing
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.errors import CheckpointIncomplete, CheckpointUnsupported, SourceChanged
from ckptd.pipeline.adapter import settings as adapter_settings
from ckptd.pipeline.definition import StageCall
from ckptd.pipeline.stage import Base

_ANYWHERE = Path("/")
"""A person named the base, and the links of the Hub's cache lead to its blobs."""
_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+))?"
)
_WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.vocab",
)
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Weights from before safetensors, read without running what is in them."""
_ALSO_WANTED = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")
_UNWANTED = ("*/*.safetensors", "consolidated*", "onnx/*", "original/*")
_CACHED = re.compile(r"/models--(?P<repo>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
_MAX_KNOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a base is: a folder, or a repo at a commit."""

    folder: Path | None = None
    repo_id: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"{self.repo_id}@{self.commit}"

    @property
    def name(self) -> str:
        """The base's name for people: no path, so that a published model shows nobody's folders."""
        if self.folder is None:
            return str(self)
        cached = cached_repo(self.folder)
        return self.folder.name if cached is None else "@".join(cached)


def locate(
    stages: Sequence[StageCall],
    source: Checkpoint,
    *,
    beside: Path,
    endpoint: str | None,
    pinned: str | None = None,
) -> Place | None:
    """Return where the base is that `stages` merge the adapter `source` into; None without a merge.

    A relative folder is looked for in the working folder, then in `beside` (the trainer's folder)
    and above it. `pinned` is what an earlier call said (`str`), and holds.

    Raises:
        CheckpointIncomplete: the adapter names no base, or a folder that is not there.
        HubError: the repo's commit cannot be looked up.
    """
    call = next((call for call in stages if call.name == "merge"), None)
    if call is None or source.config_path.name != adapter_files.CONFIG_NAME:
        return None
    config = adapter_files.read_config(source.config_path)
    settings = adapter_settings.read(config, source.config_path)
    asked: str | None = getattr(call.options, "base", None)
    text = pinned or asked or settings.base
    if text is None:
        raise CheckpointIncomplete(
            "names no base model",
            path=source.config_path,
            expected="base_model_name_or_path",
            hint="name it in the definition: merge: {base: PATH or owner/name@revision}",
        )
    folder = folder_of(text, beside)
    if folder is not None:
        return Place(folder=folder)
    match = _REPO.fullmatch(text)
    if match is None:
        raise CheckpointIncomplete(
            f"the base model {text} is not there",
            path=source.path,
            expected="a folder, or owner/name of a repo on the Hub",
            hint="name it in the definition: merge: {base: PATH or owner/name@revision} "
            "(--set merge.base=... on the command line)",
        )
    revision = match["revision"] or (None if asked else settings.revision) or "main"
    snapshot: Any = importlib.import_module("ckptd.hub.snapshot")
    commit: str = snapshot.commit_of(match["repo"], revision, endpoint=endpoint)
    return Place(repo_id=match["repo"], commit=commit)


def place_of(text: str) -> Place:
    """Return the place that `str` made this of."""
    if text.startswith("/"):
        return Place(folder=Path(text))
    repo_id, _, commit = text.rpartition("@")
    return Place(repo_id=repo_id, commit=commit)


def fingerprint(place: Place) -> str | None:
    """Return the state of the files of a base folder; None for a repo, whose commit is its state."""
    if place.folder is None:
        return None
    return listing.list_files(place.folder, within=_ANYWHERE).fingerprint_id


def open_base(
    place: Place,
    *,
    endpoint: str | None,
    digest: str | None = None,
    expected: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Base:
    """Return the base at `place`; a repo's files are fetched where the cache lacks them.

    `report` is told the bytes that are here, of those to be fetched. `digest` was taken while the files of a folder had the fingerprint `expected`.

    Raises:
        SourceChanged: they have another one.
        CheckpointRefused: it is no checkpoint that can be read.
        HubError, StorageFailed: it cannot be fetched.
    """
    folder = place.folder
    if expected is not None and (found := fingerprint(place)) != expected:
        raise SourceChanged(path=str(folder), expected=expected[:12], found=str(found)[:12])
    if folder is None:
        snapshot: Any = importlib.import_module("ckptd.hub.snapshot")
        folder = snapshot.fetch(
            place.repo_id,
            place.commit,
            endpoint=endpoint,
            wanted=(*_WANTED, *_ALSO_WANTED),
            instead=_PICKLED,
            unwanted=_UNWANTED,
            report=report,
        )
    source = checkpoint.open_checkpoint(folder, within=_ANYWHERE)
    if source.layout == "peft":
        raise CheckpointUnsupported(
            "the base is an adapter itself",
            path=folder,
            hint="merge that one into its own base first, and name the result with `base:`",
        )
    if source.parts:
        raise CheckpointUnsupported(
            "the base is no model of transformers",
            path=folder,
            found=source.layout,
            hint="name the model that the adapter was trained on with `base:`",
        )
    return Base(source=source, name=place.name, digest=place.commit or digest)


class Digests:
    """Content digests of base folders, taken once for each state of their files."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    def of(self, place: Place, *, check: Callable[[], None] = lambda: None) -> str:
        """Return what identifies the base at `place`: a commit, or a digest of every byte.

        Raises:
            CheckpointRefused: the folder cannot be opened.
        """
        if place.folder is None:
            return str(place.commit)
        source = checkpoint.open_checkpoint(place.folder, within=_ANYWHERE)
        files = checkpoint.identifying_files(source)
        states = ((str(path), *_state(path)) for _, path in files)
        key = hashlib.sha256(repr(sorted(states)).encode()).hexdigest()
        with self._lock:
            if key not in self._known:
                while len(self._known) >= _MAX_KNOWN:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = content.digest(files, check=check)
            return self._known[key]


def cached_repo(folder: Path) -> tuple[str, str] | None:
    """Return repo and commit of a folder in the Hub's cache; None for any other folder."""
    match = _CACHED.search(folder.as_posix())
    if match is None:
        return None
    return match["repo"].replace("--", "/", 1), match["commit"]


def together(content_digest: str, base_digest: str) -> str:
    """Return what identifies an adapter and its base as one content."""
    both = hashlib.sha256(f"{content_digest} {base_digest}".encode())
    return f"sha256:{both.hexdigest()}"


def _state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def folder_of(text: str, beside: Path) -> Path | None:
    """Return the folder that a base's name is; None where there is none, and it may be a repo's.

    A relative one is looked for in the working folder, then in `beside` and above it.
    """
    path = Path(text).expanduser()
    if path.is_absolute():
        return path.resolve() if path.is_dir() else None
    for start in (Path.cwd(), beside, *beside.parents[:2]):
        if (start / path).is_dir():
            return (start / path).resolve()
    return None
