"""The Hub as an ASGI application."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from ckptd.hub.local import accounts, refusal, wire
from ckptd.hub.local.accounts import Account
from ckptd.hub.local.blobs import write_durably
from ckptd.hub.local.options import Choices, Hub
from ckptd.hub.local.routes import (
    account,
    browser,
    commit,
    discussions,
    downloads,
    files,
    refs,
    repos,
    uploads,
    xet,
)
from ckptd.hub.local.store import Store
from ckptd.hub.local.traffic import FaultHook, Ledger, Traffic
from ckptd.hub.local.xet import XetStore

ROOMS = (account, repos, files, refs, commit, discussions, uploads, xet, downloads, browser)
"""Modules with routes, in the order in which they are tried."""


def create_app(
    store: Store,
    *,
    tokens: Mapping[str, Account] | None = None,
    choices: Choices | None = None,
    ledger: Ledger | None = None,
    faults: FaultHook | None = None,
    hosts: Collection[str] | None = None,
) -> Traffic:
    """Return an app that serves `store`; the caller closes the store after it.

    Args:
        store: the repos.
        tokens: token -> account; None takes those kept in the store's folder.
        choices: what the owner may choose; None takes the defaults.
        ledger: gets an entry for each request.
        faults: asked before each request, see `traffic`; also the result's attribute `faults`.
        hosts: names under which it may be spoken to, see `origins`; None for any.
    """
    choices = choices or Choices()
    hub = Hub(
        store=store,
        accounts=accounts.open_accounts(store.root, tokens),
        secret=_secret(store),
        xet=XetStore(store.root / "xet") if choices.xet else None,
        choices=choices,
    )
    app = Router(
        routes=[route for room in ROOMS for route in room.routes(hub)],
        redirect_slashes=False,
        default=_not_found,
    )
    ledger = ledger if ledger is not None else Ledger()
    return Traffic(app, ledger=ledger, faults=faults, hosts=hosts)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    await wire.refused_answer(refusal.Refused(404, "No such page"))(scope, receive, send)


def _secret(store: Store) -> bytes:
    """Return the key that signs upload links, made on the first start."""
    path = store.root / "secret"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        fresh = secrets.token_bytes(32)
    write_durably(path, fresh, mode=0o600)
    return fresh
