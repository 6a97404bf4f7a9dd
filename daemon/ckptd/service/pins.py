"""Where the pins of a definition are, and their life: live while a folder grows, frozen for a job.

`<root>/.ckptd/live/<id>/` follows a folder of the trainer; when the checkpoint is taken it is
renamed to `<root>/.ckptd/pins/<job>-<owner>/` and never changed again, so that a trainer that writes into
the same folder once more gets a new live pin. Where the root cannot be written, pins are copies in
the state folder. Everything here blocks.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

import structlog

from ckptd.checkpoint import pin
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pin import PinMethod
from ckptd.errors import StorageFailed
from ckptd.watch.scan import Place

log = structlog.get_logger()


class Pins:
    """The pins of one definition's watched place.

    `owner` is the daemon's identity: daemons that share a root leave each other's pins alone.
    """

    def __init__(self, *, owner: str, pipeline: str, place: Place, state_path: Path) -> None:
        self._owner = owner
        self._pipeline = pipeline
        self._place = place
        self._root_path = place.root_path
        self._state_path = state_path
        self._bases: dict[Path, tuple[Path, PinMethod]] = {}
        self._lock = threading.Lock()

    def live_path(self, source: Path, root_path: Path) -> Path:
        """Return where the live pin of `source` (below `root_path`) is."""
        base, _ = self._base(root_path)
        try:
            ino = source.stat().st_ino
        except OSError:
            ino = 0
        key = f"{self._owner}\0{self._pipeline}\0{source}\0{ino}".encode()
        return base / "live" / hashlib.sha256(key).hexdigest()[:16]

    def frozen_path(self, live_path: Path, job_id: str) -> Path:
        """Return where the pin of a job is, on the same mount as its live one.

        Daemons that share a root have the same id for the same work, and each its own pin.
        """
        return live_path.parent.parent / "pins" / f"{job_id}-{self._owner[:8]}"

    def refresh_early(self, live_path: Path, seen: Listing) -> None:
        """Bring the live pin up to `seen` where that is nearly free; copies wait for quiet.

        Raises:
            NoSpace, StorageFailed: the pin cannot be written.
        """
        method = self._method(live_path)
        if method is not PinMethod.COPY:
            self._refresh(live_path, seen, method)

    def refresh_fully(self, live_path: Path, seen: Listing) -> None:
        """Make the live pin exactly `seen`, the state of a quiet folder.

        Raises:
            NoSpace, StorageFailed: the pin cannot be written.
        """
        self._refresh(live_path, seen, self._method(live_path))
        pin.prune(live_path, seen)

    def freeze(self, live_path: Path, frozen_path: Path) -> None:
        """Turn a live pin into a job's; what an earlier attempt left there is replaced."""
        shutil.rmtree(frozen_path, ignore_errors=True)
        frozen_path.parent.mkdir(parents=True, exist_ok=True)
        live_path.rename(frozen_path)

    def release(self, live_path: Path) -> None:
        """Remove a live pin."""
        pin.release(live_path)

    def orphans(self) -> list[tuple[Path, Path]]:
        """Return (source, live pin) of pins whose source went away while nobody watched."""
        found = []
        pattern = str(self._root_path.resolve().joinpath(*self._place.parts))
        for base in self._known_bases():
            for live_path in sorted((base / "live").glob("*")):
                origin = self._own_origin(live_path)
                if origin is None or origin.get("pipeline") != self._pipeline:
                    continue
                source = Path(origin["source"])
                if source.match(pattern) and not _exists(source):
                    found.append((source, live_path))
        return found

    def sweep(self, needed: Collection[Path]) -> None:
        """Remove the frozen pins that no job in `needed` has; those of a crash go live again."""
        for base in self._known_bases():
            for path in (base / "pins").glob("*"):
                if path in needed:
                    continue
                origin = self._own_origin(path)
                if origin is None:
                    continue  # another daemon's
                if not _exists(Path(origin["source"])):
                    live_path = base / "live" / path.name
                    if not live_path.exists():
                        live_path.parent.mkdir(parents=True, exist_ok=True)
                        path.rename(live_path)
                        continue
                pin.release(path)

    def _refresh(self, live_path: Path, seen: Listing, method: PinMethod) -> None:
        if pin.read_origin(live_path) is None:
            origin = {
                "owner": self._owner,
                "pipeline": self._pipeline,
                "source": str(seen.path),
            }
            pin.write_origin(live_path, origin)
        pin.refresh(seen.base_path, seen, live_path, method)

    def _own_origin(self, path: Path) -> dict[str, str] | None:
        """Return the origin of a pin that this daemon made, None for any other."""
        origin = pin.read_origin(path)
        if origin is None or origin.get("owner") != self._owner or "source" not in origin:
            return None
        return origin

    def _method(self, live_path: Path) -> PinMethod:
        base = live_path.parent.parent
        return next((m for b, m in self._bases.values() if b == base), PinMethod.COPY)

    def _base(self, root_path: Path) -> tuple[Path, PinMethod]:
        with self._lock:
            if root_path not in self._bases:
                self._bases[root_path] = self._probed(root_path)
            return self._bases[root_path]

    def _probed(self, root_path: Path) -> tuple[Path, PinMethod]:
        try:
            method = pin.probe(root_path)
        except StorageFailed as error:
            log.warning("pins are copies in the state folder", root=str(root_path), why=str(error))
            return self._fallback(root_path), PinMethod.COPY
        log.info("pins probed", root=str(root_path), method=str(method))
        return root_path / pin.FOLDER_NAME, method

    def _fallback(self, root_path: Path) -> Path:
        name = hashlib.sha256(str(root_path).encode()).hexdigest()[:16]
        return self._state_path / "pins" / name

    def _known_bases(self) -> list[Path]:
        root_path = self._root_path.resolve()
        return [root_path / pin.FOLDER_NAME, self._fallback(root_path)]


def _exists(path: Path) -> bool:
    """Whether something is there; what may not be looked at is taken to be."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
