"""Endpoints of a small Xet content store (CAS), beside the Hub's own, and the tokens for it.

hf_xet 1.8 first tries newer endpoints (chunk dedup, grants, /v2) and takes their 404 as a no.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import time
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import refusal, xet
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes.repos import REPO
from ckptd.hub.local.values import File
from ckptd.hub.local.wire import Call, read_body, route, store_body
from ckptd.hub.local.xet import XetStore

TOKEN_LIFETIME_S = 3600
CAS = "/cas"
Scope = Literal["read", "write"]


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module; none but the tokens' refusal where Xet is off."""
    return [
        route(hub, REPO + "/xet-read-token/{revision}", "GET", read_token),
        route(hub, REPO + "/xet-write-token/{revision}", "GET", write_token),
        route(hub, CAS + "/v1/xorbs/default/{hash}", "POST", put_xorb, accounts_matter=False),
        route(hub, CAS + "/v1/xorbs/default/{hash}", "GET", get_xorb, accounts_matter=False),
        route(hub, CAS + "/v1/shards", "POST", put_shard, accounts_matter=False),
        route(
            hub, CAS + "/v1/reconstructions/{hash}", "GET", reconstruction, accounts_matter=False
        ),
    ]


def read_token(call: Call) -> Response:
    """Say where to read from Xet storage."""
    call.repo()
    return _token_answer(call, "read")


def write_token(call: Call) -> Response:
    """Say where to write to Xet storage; the revision of a new pull request is `None`."""
    revision = call.params["revision"]
    proposing = call.flag("create_pr") or revision == "None"
    call.contributable(None if proposing else revision)
    return _token_answer(call, "write")


async def put_xorb(call: Call, request: Request) -> Response:
    """Take a xorb, streamed to disk."""
    store = _store(call, "write")
    final = store.xorb(call.params["hash"])
    if final.exists():
        async for _ in request.stream():
            pass
        return JSONResponse({"was_inserted": False})
    with call.hub.store.blobs.receive() as incoming:
        await store_body(call, request, incoming.write, size=xet.LONGEST_XORB_BYTES)
        await anyio.to_thread.run_sync(
            store.keep_xorb, incoming, call.params["hash"], limiter=call.hub.threads
        )
    return JSONResponse({"was_inserted": True})


async def put_shard(call: Call, request: Request) -> Response:
    """Take a shard: what files there are, and of which chunks."""
    store = _store(call, "write")
    content = await read_body(request, limit=xet.LONGEST_SHARD_BYTES)
    name = hashlib.sha256(content).hexdigest()
    await anyio.to_thread.run_sync(store.keep_shard, content, name, limiter=call.hub.threads)
    return JSONResponse({"result": 1})


async def get_xorb(call: Call, _: Request) -> Response:
    """Return a xorb, in ranges."""
    path = _store(call, "read").xorb(call.params["hash"])
    if not path.exists():
        raise refusal.Refused(404, "No such xorb")
    return FileResponse(path, media_type="application/octet-stream")


def reconstruction(call: Call) -> Response:
    """Say from which parts of which xorbs a file, or a Range of it, is put together."""
    store = _store(call, "read")
    file = store.file(call.params["hash"])
    first, last = _range(call, file.size)
    terms: list[xet.Term] = []
    skipped = at = 0
    for term in file.terms:
        if at + term.nbytes > first and at <= last:
            skipped = skipped if terms else first - at
            terms.append(term)
        at += term.nbytes
    fetch = {}
    for xorb in {term.xorb for term in terms}:
        offsets = xet.chunk_offsets(store.xorb(xorb))
        fetch[xorb] = [
            {
                "range": {"start": start, "end": end},
                "url": _xorb_url(call, xorb),
                "url_range": {"start": offsets[start], "end": offsets[end] - 1},
            }
            for start, end in xet.merged_runs(term for term in terms if term.xorb == xorb)
        ]
    answer = {
        "offset_into_first_range": skipped,
        "terms": [
            {
                "hash": term.xorb,
                "unpacked_length": term.nbytes,
                "range": {"start": term.start, "end": term.end},
            }
            for term in terms
        ],
        "fetch_info": fetch,
    }
    return JSONResponse(answer)


def unpack(call: Call, file: File, target: Path) -> None:
    """Write the content of a Xet file to `target`, through hf_xet as any client would. Blocks.

    Raises:
        refusal.Refused: 501, this machine's Hub has no hf_xet to unpack with.
    """
    try:
        hf_xet: Any = importlib.import_module("hf_xet")  # native and optional
    except ImportError:
        raise refusal.Refused(501, "This file needs a client with hf_xet") from None
    expires = int(time.time()) + TOKEN_LIFETIME_S
    with hf_xet.XetSession().new_file_download_group(
        endpoint=call.base_url + CAS,
        token=_token(call.hub, "read", expires),
        token_expiry_unix_secs=expires,
        token_refresh_url=None,
        token_refresh_headers=None,
        custom_headers=None,
        progress_callback=None,
    ) as group:
        group.start_download_file(hf_xet.XetFileInfo(file.xet_hash, file.size), str(target))


def _token_answer(call: Call, scope: Scope) -> Response:
    """Return the answer of both: in JSON for hf_xet, in headers for the client's Python."""
    if call.hub.xet is None:
        raise refusal.Refused(404, "This Hub has no Xet storage; set HF_HUB_DISABLE_XET=1")
    expires = int(time.time()) + TOKEN_LIFETIME_S
    url, token = call.base_url + CAS, _token(call.hub, scope, expires)
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def _token(hub: Hub, scope: Scope, expires: int) -> str:
    text = f"{scope}.{expires}"
    return f"{text}.{hmac.new(hub.secret, text.encode(), hashlib.sha256).hexdigest()}"


def _store(call: Call, scope: Scope) -> XetStore:
    """Return the storage. Raises Refused: 404 without one, 401 without a good token for it."""
    if call.hub.xet is None:
        raise refusal.Refused(404, "This Hub has no Xet storage")
    bearer = call.headers.get("authorization", "").removeprefix("Bearer ")
    token = bearer or call.query.get("token", "")
    held, _, rest = token.partition(".")
    expires = rest.partition(".")[0]
    good = expires.isdecimal() and hmac.compare_digest(
        token, _token(call.hub, "write" if held == "write" else "read", int(expires))
    )
    if not good or int(expires) < time.time() or (scope == "write" and held != "write"):
        raise refusal.Refused(401, "Invalid or expired Xet token")
    return call.hub.xet


def _xorb_url(call: Call, xorb: str) -> str:
    """Return a link to a xorb that needs no header, like a storage service's."""
    token = _token(call.hub, "read", int(time.time()) + TOKEN_LIFETIME_S)
    return f"{call.base_url}{CAS}/v1/xorbs/default/{xorb}?token={token}"


def _range(call: Call, size: int) -> tuple[int, int]:
    """Return the first and the last byte asked for. Raises Refused (416)."""
    text = call.headers.get("range", "").removeprefix("bytes=")
    first, _, last = text.partition("-")
    if not first.isdecimal():
        return 0, size - 1
    start = int(first)
    if start >= size:
        raise refusal.Refused(416, "Past the end", headers={"Content-Range": f"bytes */{size}"})
    return start, min(int(last), size - 1) if last.isdecimal() else size - 1
