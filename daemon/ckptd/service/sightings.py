"""What became of each checkpoint that one definition saw, and whether this state of it was dealt with.

A verdict holds for the files as they are: names, sizes and times where a job was made; where none
was, also for who may read them (a refusal is looked at again after a chmod) and for the definition
that brought it about.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from ckptd.checkpoint.listing import Listing
from ckptd.jobs.job import State
from ckptd.jobs.store import JobStore, Sighting, Verdict
from ckptd.pipeline.definition import Definition
from ckptd.service import identify

DECIDED = frozenset({Verdict.TAKEN, Verdict.REFUSED, Verdict.SKIPPED})
"""Verdicts after which nothing more is done until something changes."""
_MAY_DESERVE = frozenset({State.FAILED, State.REFUSED, State.HELD, State.SKIPPED})


class Sightings:
    """The sightings of one definition in the job store."""

    def __init__(self, store: JobStore, definition: Definition) -> None:
        self._store = store
        self._definition = definition

    async def is_decided(self, path: Path, seen: Listing) -> bool:
        """Whether this very state of the checkpoint was dealt with, maybe before a restart."""
        sighting = await self._of(path)
        if sighting is None or sighting.verdict not in DECIDED:
            return False
        if sighting.fingerprint_id != self._identity(seen, sighting.verdict):
            return False
        return sighting.job_id is None or not await self._deserves_another(sighting.job_id)

    async def is_known(self, path: Path, *, reason: str | None = None) -> bool:
        """Whether the checkpoint was ever seen, and for the last time with `reason`, if one is given."""
        sighting = await self._of(path)
        return sighting is not None and (reason is None or sighting.reason == reason)

    async def note(
        self,
        path: Path,
        seen: Listing | None,
        verdict: Verdict,
        *,
        reason: str | None = None,
        job_id: str | None = None,
    ) -> None:
        """Record what became of the checkpoint, in place of what was recorded before."""
        await self._store.note(
            Sighting(
                source_path=str(path),
                pipeline=self._definition.pipeline,
                fingerprint_id="" if seen is None else self._identity(seen, verdict),
                verdict=verdict,
                # Names on disk may be no text; the store takes nothing else.
                reason=None if reason is None else reason.encode("utf-8", "replace").decode(),
                job_id=job_id,
                at=time.time(),
            )
        )

    async def _of(self, path: Path) -> Sighting | None:
        return await self._store.sighting(str(path), self._definition.pipeline)

    async def _deserves_another(self, job_id: str) -> bool:
        """Whether a job was not done under a definition that has been changed since."""
        known = await identify.known_job(self._store, job_id)
        if known is None or not identify.stands(known, self._definition):
            return True
        return known.state in _MAY_DESERVE and known.spec.definition != self._definition.dump()

    def _identity(self, seen: Listing, verdict: Verdict) -> str:
        """What a verdict holds for."""
        if verdict is Verdict.TAKEN:
            return seen.fingerprint_id
        definition = json.dumps(self._definition.dump(), sort_keys=True).encode()
        told = hashlib.sha256(definition).hexdigest()[:16]
        return f"{seen.fingerprint_id} {told} {seen.access_id[:16]}"
