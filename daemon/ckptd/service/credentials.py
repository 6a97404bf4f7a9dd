"""A token that is replaced while the daemon runs: the jobs that wait for it go on at once.

Jobs read the token themselves, each try anew; here is only the look at its files, and the push.
Credentials of systemd stay as they were when the service started, so a token that is to be replaced
without a restart lies in a file that HF_TOKEN_PATH names.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio
import structlog
from anyio import to_thread

from ckptd import errors
from ckptd.hub import token_places
from ckptd.jobs.job import State
from ckptd.jobs.store import JobStore
from ckptd.telemetry import logs

log = structlog.get_logger()

LOOK_S = 2.0
"""Seconds between two looks."""
_WANTS_TOKEN = frozenset({errors.HubUnauthorized.__name__, errors.HubForbidden.__name__})


async def follow(store: JobStore, queued: Callable[[], None]) -> None:
    """Queue jobs that wait for a token whenever a token file has changed; until cancelled."""
    seen = await to_thread.run_sync(token_places.state)
    while True:
        await anyio.sleep(LOOK_S)
        now = await to_thread.run_sync(token_places.state)
        if now == seen:
            continue
        seen = now
        for text in await to_thread.run_sync(token_places.texts):
            logs.keep_secret(text)
        await wake(store)
        queued()


async def wake(store: JobStore) -> list[str]:
    """Queue the jobs that wait because of their token; return their ids."""
    woken = []
    for job in await store.list(states=[State.WAITING]):
        if job.failure is None or job.failure.code not in _WANTS_TOKEN:
            continue
        try:
            await store.retry(job.job_id, now=time.time(), reason="the token was replaced")
        except errors.UsageError:  # it has been taken or cancelled meanwhile
            continue
        woken.append(job.job_id)
    if woken:
        log.info("token replaced, jobs go on", jobs=woken)
    return woken
