"""Endpoints that take content: the LFS batch, and its uploads, whole or in parts.

Upload links carry a signature over what may be uploaded there and until when, like a storage
service's; they need no token. A link stays good over a restart. Bodies stream to disk.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import time
from typing import Any, Literal
from urllib.parse import urlencode

import anyio.to_thread
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import refusal
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes.repos import REPO
from ckptd.hub.local.wire import Call, route, store_body

LINK_LIFETIME_S = 24 * 3600
MOST_PARTS = 10_000


class Object(BaseModel):
    """Content by its sha256."""

    oid: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class BatchRef(BaseModel):
    """The branch that the content is for."""

    name: str


class BatchBody(BaseModel):
    """Content that somebody wants to upload or download."""

    operation: Literal["upload", "download"]
    objects: list[Object]
    transfers: list[str] = ["basic"]
    ref: BatchRef | None = None
    hash_algo: Literal["sha256"] = "sha256"


class Part(BaseModel):
    """A part that has arrived."""

    partNumber: int  # noqa: N815 - the API's name
    etag: str


class CompletionBody(BaseModel):
    """All parts have arrived."""

    oid: str
    parts: list[Part]


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    batch_path = "/{namespace}/{name}.git/info/lfs/objects/batch"
    return [
        route(hub, batch_path, "POST", batch),
        route(hub, "/{kind}" + batch_path, "POST", batch),
        route(hub, REPO + "/lfs-verify", "POST", verify),
        route(hub, REPO + "/lfs-files/duplicate", "POST", duplicate),
        route(hub, "/lfs/objects/{oid}", "PUT", upload, accounts_matter=False),
        route(hub, "/lfs/uploads/{upload}/{part:int}", "PUT", upload_part, accounts_matter=False),
        route(hub, "/lfs/uploads/{upload}", "POST", complete, accounts_matter=False),
    ]


def batch(call: Call) -> Response:
    """Say for each object where to upload it; no `actions` where it is here already."""
    body = call.json(BatchBody)
    if body.operation == "upload":
        call.contributable(body.ref.name if body.ref else None)
    repo = call.repo()
    blobs = call.hub.store.blobs
    multipart = "multipart" in body.transfers
    over = call.hub.choices.multipart_over_bytes if multipart else math.inf
    objects: list[dict[str, Any]] = []
    for wanted in body.objects:
        answer: dict[str, Any] = {"oid": wanted.oid, "size": wanted.size}
        held = blobs.size(wanted.oid)
        if body.operation == "download":
            if held is None:
                answer["error"] = {"code": 404, "message": "Object does not exist"}
            else:
                href = f"{call.base_url}/lfs/objects/{wanted.oid}?{_sign(call, wanted)}"
                answer["actions"] = {"download": {"href": href}}
        elif held is None:
            large = wanted.size > over
            action = _parts_action(call, wanted) if large else _action(call, wanted)
            check = f"{call.base_url}/api/{repo.kind}/{repo.id}/lfs-verify"
            answer["actions"] = {"upload": action, "verify": {"href": check}}
        objects.append(answer)
    large = any(wanted.size > over for wanted in body.objects)
    answer = {"transfer": "multipart" if large else "basic", "objects": objects}
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


def verify(call: Call) -> Response:
    """Confirm that an object has arrived whole."""
    call.contributable()
    wanted = call.json(Object)
    if call.hub.store.blobs.size(wanted.oid) != wanted.size:
        raise refusal.Refused(404, f"Object {wanted.oid} has not arrived")
    return JSONResponse({})


def duplicate(call: Call) -> Response:
    """Make LFS files of this repo usable in another; all repos share one store, so they are."""
    call.repo()
    return JSONResponse({"failed": []})


async def upload(call: Call, request: Request) -> Response:
    """Take a whole object: hashed while it streams to disk, refused when it is another."""
    wanted = _signed(call, Object(oid=call.params["oid"], size=_size(call)))
    blobs = call.hub.store.blobs

    with blobs.receive() as incoming:
        await store_body(call, request, incoming.write, size=wanted.size)
        await anyio.to_thread.run_sync(
            incoming.keep, wanted.oid, wanted.size, limiter=call.hub.threads
        )
    return Response(headers={"ETag": f'"{wanted.oid}"'})


async def upload_part(call: Call, request: Request) -> Response:
    """Take one part, at its place in the object's file."""
    wanted = _signed(call, Object(oid=call.query.get("oid", ""), size=_size(call)))
    number, chunk = int(call.params["part"]), int(call.query.get("chunk", "0"))
    offset = (number - 1) * chunk
    size = min(chunk, wanted.size - offset)
    if number < 1 or size <= 0:
        raise refusal.bad_request(f"There is no part {number}")
    digest = hashlib.sha256()
    with call.hub.store.blobs.part(call.params["upload"], offset) as file:

        def write(piece: bytes) -> None:
            file.write(piece)
            digest.update(piece)

        received = await store_body(call, request, write, size=size)
    if received != size:
        raise refusal.bad_request(f"IncompleteBody: {received} of {size} bytes arrived")
    return Response(headers={"ETag": f'"{digest.hexdigest()}"'})


def complete(call: Call) -> Response:
    """Put the parts together: hashed as a whole, refused when it is another object."""
    wanted = _signed(call, Object(oid=call.query.get("oid", ""), size=_size(call)))
    blobs = call.hub.store.blobs
    if blobs.size(wanted.oid) != wanted.size:  # a repeated completion finds it done
        blobs.keep_parts(call.params["upload"], wanted.oid, wanted.size)
    return JSONResponse({"success": True})


def _action(call: Call, wanted: Object) -> dict[str, Any]:
    return {"href": f"{call.base_url}/lfs/objects/{wanted.oid}?{_sign(call, wanted)}"}


def _parts_action(call: Call, wanted: Object) -> dict[str, Any]:
    over = call.hub.choices.multipart_over_bytes
    chunk = max(over, math.ceil(wanted.size / MOST_PARTS))
    upload_id = secrets.token_hex(32)
    url = f"{call.base_url}/lfs/uploads/{upload_id}"
    query = _sign(call, wanted, upload=upload_id)
    count = math.ceil(wanted.size / chunk)
    parts = {f"{n:05d}": f"{url}/{n}?chunk={chunk}&{query}" for n in range(1, count + 1)}
    return {"href": f"{url}?{query}", "header": {"chunk_size": str(chunk), **parts}}


def _sign(call: Call, wanted: Object, *, upload: str = "") -> str:
    """Return the query of an upload link."""
    expires = int(time.time()) + LINK_LIFETIME_S
    fields = {"oid": wanted.oid, "size": wanted.size, "expires": expires}
    return urlencode(fields | {"signature": _signature(call, wanted, expires, upload)})


def _signed(call: Call, wanted: Object) -> Object:
    """Return what an upload link is for. Raises Refused (403) when it is forged or too old."""
    expires = call.query.get("expires", "")
    if not expires.isdecimal() or int(expires) < time.time():
        raise refusal.forbidden("This upload link has expired")
    good = _signature(call, wanted, int(expires), call.params.get("upload", ""))
    if not hmac.compare_digest(good, call.query.get("signature", "")):
        raise refusal.forbidden("This upload link is not one of ours")
    return wanted


def _signature(call: Call, wanted: Object, expires: int, upload: str) -> str:
    text = json.dumps([wanted.oid, wanted.size, expires, upload])
    return hmac.new(call.hub.secret, text.encode(), hashlib.sha256).hexdigest()


def _size(call: Call) -> int:
    text = call.query.get("size", "")
    if not text.isdecimal():
        raise refusal.forbidden("This upload link is not one of ours")
    return int(text)
