"""Endpoints that give content: a file of a revision, streamed from disk, in ranges."""

from __future__ import annotations

from urllib.parse import quote

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from ckptd.hub.local import history, refusal
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes import xet
from ckptd.hub.local.values import File, Repo
from ckptd.hub.local.wire import Call, route

TEXT_SUFFIXES = (".md", ".txt", ".json", ".yaml", ".yml", ".py", ".gitattributes", ".gitignore")
SHIELD = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
}
"""Files come from strangers: a browser shows or keeps them, and runs nothing."""


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    path = "/{namespace}/{name}/resolve/{revision}/{path:path}"
    return [
        route(hub, path, "GET HEAD", resolve),
        route(hub, "/{kind}" + path, "GET HEAD", resolve),
    ]


class BlobResponse(FileResponse):
    """A blob from disk, read in large pieces."""

    chunk_size = 1024 * 1024


async def resolve(call: Call, request: Request) -> Response:
    """Return a file; HEAD its headers: commit, ETag, size, and where Xet storage has it."""
    repo = call.repo()
    commit = await anyio.to_thread.run_sync(call.commit, repo, limiter=call.hub.threads)
    path = call.params["path"]
    file = commit.files.get(path)
    if file is None:
        folder = isinstance(history.entry(commit, path), history.Folder)
        what = "is a folder" if folder else "does not exist"
        raise refusal.no_entry(
            f"{path} {what} on revision {call.params['revision']}", commit=commit.oid
        )
    headers = _headers(call, repo, file, commit.oid, path)
    if request.method == "HEAD":
        return _head(call, file, headers)
    await _fetched(call, file)
    return BlobResponse(
        call.hub.store.blobs.path(file.sha256), headers=headers, media_type=_media_type(path)
    )


async def _fetched(call: Call, file: File) -> None:
    """Bring content that only Xet storage has into the blob store."""
    if call.hub.store.blobs.size(file.sha256) is not None:
        return
    if call.hub.xet is None or file.xet_hash is None:
        raise refusal.Refused(500, f"The content sha256:{file.sha256} is lost")
    await anyio.to_thread.run_sync(_unpack, call, file, limiter=call.hub.unpackers)


def _unpack(call: Call, file: File) -> None:
    blobs = call.hub.store.blobs
    if blobs.size(file.sha256) is not None:
        return
    name = blobs.unused_name()
    try:
        xet.unpack(call, file, name)
        blobs.adopt(name, file.sha256, file.size)
    finally:
        name.unlink(missing_ok=True)


def _head(call: Call, file: File, headers: dict[str, str]) -> Response:
    headers = headers | {"Accept-Ranges": "bytes", "Content-Length": str(file.size)}
    return Response(headers=headers, media_type=_media_type(call.params["path"]))


def _headers(call: Call, repo: Repo, file: File, oid: str, path: str) -> dict[str, str]:
    headers = {
        "ETag": f'"{file.etag}"',
        "X-Repo-Commit": oid,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        **SHIELD,
    }
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    if file.xet_hash is not None and call.hub.xet is not None:
        refresh = f"{call.base_url}/api/{repo.kind}/{repo.id}/xet-read-token/{oid}"
        headers |= {
            "X-Xet-Hash": file.xet_hash,
            "X-Xet-Refresh-Route": refresh,
            "Link": f'<{refresh}>; rel="xet-auth"',
        }
    return headers


def _media_type(path: str) -> str:
    return (
        "text/plain; charset=utf-8" if path.endswith(TEXT_SUFFIXES) else "application/octet-stream"
    )
