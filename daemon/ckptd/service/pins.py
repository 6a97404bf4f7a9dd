"""Where the pins of a definition are, and their life: live while a folder grows, frozen for a job.

`<root>/.ckptd/live/<id>/` follows a folder of the trainer; when the checkpoint is taken it is
renamed to `<root>/.ckptd/pins/<job>-<owner>/` and never changed again, so that a trainer that
writes into the same folder once more gets a new live pin. Where the root cannot be written, files
are held open and copied to the state folder. `service.pinned` looks after the pins of all
definitions together. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from ckptd.checkpoint import birth, origin, pin, whole
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.checkpoint.pin import PinMethod
from ckptd.checkpoint.whole import Look, Noted
from ckptd.errors import CheckpointVanished, StorageFailed
from ckptd.service import pinned
from ckptd.watch.scan import Place

log = structlog.get_logger()

AGAIN = "+"
"""What the live pin of a folder gets behind its name while one before it is still judged."""


@dataclass(slots=True)
class _Turn:
    """Who works at one live pin, and waits for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_takers: int = 0


class Pins:
    """The pins of one definition's watched place.

    `owner` is the daemon's identity: daemons that share a root leave each other's pins alone.
    """

    def __init__(
        self, *, owner: str, pipeline: str, place: Place, state_path: Path, held: OpenFiles
    ) -> None:
        self._owner = owner
        self._pipeline = pipeline
        self._place = place
        self._root_path = place.root_path
        self._state_path = state_path
        self._held = held
        self._bases: dict[Path, tuple[Path, PinMethod]] = {}
        self._lock = threading.Lock()
        self._busy: dict[Path, _Turn] = {}
        self._unsynced: set[Path] = set()
        self._stood: dict[Path, tuple[Mapping[Path, int], float]] = {}

    def live_path(self, source: Path, root_path: Path) -> Path | None:
        """Return where the live pin of `source` (below `root_path`) is; None where that is gone.

        A folder that was deleted and made anew is another one.
        """
        base, _ = self._base(root_path)
        name = self._live_name(source)
        return None if name is None else base / "live" / name

    def frozen_path(self, live_path: Path, job_id: str) -> Path:
        """Return where the pin of a job is, on the same mount as its live one.

        Daemons that share a root have the same id for the same work, and each its own pin.
        """
        return live_path.parent.parent / "pins" / pinned.frozen_name(job_id, self._owner)

    def refresh_early(self, live_path: Path, source: Path) -> bool:
        """Bring the live pin up to what is in `source` now where that is nearly free.

        Where all of it was there to be pinned, that is noted: see `checkpoint.whole`. Returns
        whether another look after `CERTAIN_S` would make that certain.

        Raises:
            CheckpointVanished: the source is gone.
            NoSpace, StorageFailed: the pin cannot be written.
        """
        method = self._method(live_path)
        if method is PinMethod.COPY:
            return False  # nothing is free: it waits for quiet
        with self._alone(live_path):
            found = whole.look(source)
            if self._live_name(source) != live_path.name.rstrip(AGAIN):
                raise CheckpointVanished(path=source)  # made anew since: another folder
            report = self._refresh(live_path, found.listing, method, early=True)
            is_whole = not report.vanished and not report.left and whole.confirm(found)
            certain = is_whole and (found.certain or self._has_stood(live_path, found))
            if is_whole:
                whole.note(live_path, found.listing, settled=False, certain=certain)
            self._sync(live_path)
        return is_whole and not certain

    def refresh_fully(self, live_path: Path, seen: Listing) -> None:
        """Make the live pin exactly `seen`, the state of a quiet folder.

        Raises:
            NoSpace, StorageFailed: the pin cannot be written.
        """
        with self._alone(live_path):
            report = self._refresh(live_path, seen, self._method(live_path), early=False)
            self._held.release(live_path)
            if not report.vanished:
                pin.prune(live_path, seen)
                whole.note(live_path, seen, settled=True, certain=True)
            self._sync(live_path)

    def last_intact(self, live_path: Path) -> Noted | None:
        """Make the live pin of a source that is gone what was there when all of it was, and say so.

        None where it was never seen whole, or not all of that was pinned.

        Raises:
            NoSpace, StorageFailed: what was held open cannot be copied.
        """
        with self._alone(live_path):
            pin.materialize(live_path, self._held)
            noted = whole.noted(live_path)
            if noted is None or pin.lacking(live_path, noted.listing):
                return None
            pin.prune(live_path, noted.listing)
            return noted

    def freeze(self, live_path: Path, frozen_path: Path) -> None:
        """Turn a live pin into a job's; what an earlier attempt left there is replaced."""
        with self._alone(live_path):
            shutil.rmtree(frozen_path, ignore_errors=True)
            frozen_path.parent.mkdir(parents=True, exist_ok=True)
            live_path.rename(frozen_path)
            self._stood.pop(live_path, None)

    def release(self, live_path: Path) -> None:
        """Remove a live pin."""
        with self._alone(live_path):
            self._held.release(live_path)
            self._unsynced.discard(live_path)
            self._stood.pop(live_path, None)
            pin.release(live_path)

    def orphans(self) -> list[tuple[Path, Path]]:
        """Return (source, live pin) of pins whose source went away while nobody watched."""
        found = []
        pattern = str(self._root_path.resolve().joinpath(*self._place.parts))
        for base in self._known_bases():
            for live_path in sorted((base / "live").glob("*")):
                known = pinned.own_origin(live_path, self._owner)
                if known is None or known.get("pipeline") != self._pipeline:
                    continue
                source = Path(known["source"])
                if source.match(pattern) and not pinned.exists(source):
                    found.append((source, live_path))
        return found

    def _live_name(self, source: Path) -> str | None:
        """Return the name of the live pin of the folder that is at `source` now, if there is one."""
        try:
            identity = birth.identity(source)
        except OSError:
            return None
        key = f"{self._owner}\0{self._pipeline}\0{source}\0{identity}".encode()
        return hashlib.sha256(key).hexdigest()[:16]

    @contextlib.contextmanager
    def _alone(self, live_path: Path) -> Iterator[None]:
        """Keep others off one live pin: a checkpoint may be judged while its next change is seen."""
        with self._lock:
            turn = self._busy.setdefault(live_path, _Turn())
            turn.num_takers += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.num_takers -= 1
                if not turn.num_takers:
                    del self._busy[live_path]

    def _refresh(
        self, live_path: Path, seen: Listing, method: PinMethod, *, early: bool
    ) -> pin.PinReport:
        if origin.read(live_path) is None:
            ours = {
                "owner": self._owner,
                "pipeline": self._pipeline,
                "source": str(seen.path),
                "method": str(method),
            }
            origin.write(live_path, ours)
            self._unsynced.add(live_path)
        return pin.refresh(seen.base_path, seen, live_path, method, held=self._held, early=early)

    def _has_stood(self, live_path: Path, found: Look) -> bool:
        """Whether the folders are as an intact look saw them `CERTAIN_S` ago."""
        folders, since = self._stood.get(live_path, (None, 0.0))
        if folders == found.folders:
            return time.monotonic() - since >= whole.CERTAIN_S
        self._stood[live_path] = (found.folders, time.monotonic())
        return False

    def _sync(self, live_path: Path) -> None:
        """Make a new pin's origin durable, last: the trainer deletes faster than a disk syncs."""
        if live_path in self._unsynced:
            origin.sync(live_path)
            self._unsynced.discard(live_path)

    def _method(self, live_path: Path) -> PinMethod:
        base = live_path.parent.parent
        return next((m for b, m in self._bases.values() if b == base), PinMethod.COPY)

    def _base(self, root_path: Path) -> tuple[Path, PinMethod]:
        with self._lock:
            if root_path not in self._bases:
                self._bases[root_path] = self._probed(root_path)
            return self._bases[root_path]

    def _probed(self, root_path: Path) -> tuple[Path, PinMethod]:
        pinned.remember(self._state_path, root_path)
        base = root_path / pin.FOLDER_NAME
        try:
            method = pin.probe(root_path)
        except StorageFailed as error:
            log.warning("pins go to the state folder", root=str(root_path), why=str(error))
            base, method = pinned.base_in_state(self._state_path, root_path), PinMethod.OPEN_FILES
        log.info("pins probed", root=str(root_path), method=str(method))
        return base, method

    def _known_bases(self) -> list[Path]:
        root_path = self._root_path.resolve()
        return [root_path / pin.FOLDER_NAME, pinned.base_in_state(self._state_path, root_path)]
