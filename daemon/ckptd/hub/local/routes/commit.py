"""The endpoint that makes commits: lines of JSON, read one at a time."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, TypeVar

import anyio.to_thread
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import commits, names, refusal
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes.repos import REPO
from ckptd.hub.local.values import LONGEST_REGULAR_BYTES, Commit
from ckptd.hub.local.wire import Call, route

LONGEST_LINE_BYTES = LONGEST_REGULAR_BYTES * 4 // 3 + 64 * 1024
"""Of a commit's body: the largest regular file in base64, and its path."""
MOST_OPERATIONS = 100_000

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class Header(BaseModel):
    """First line of a commit's body."""

    summary: str
    description: str = ""
    parentCommit: str | None = None  # noqa: N815 - the API's name


class RegularFile(BaseModel):
    """A file that travels inside the commit."""

    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "base64"


class LfsFile(BaseModel):
    """A file that was uploaded before."""

    path: str
    algo: Literal["sha256"] = "sha256"
    oid: str = Field(pattern="^[0-9a-f]{64}$")
    size: int | None = None


class DeletedPath(BaseModel):
    """A file or folder to remove."""

    path: str


class Line(BaseModel):
    """One line of a commit's body."""

    key: str
    value: dict[str, Any]


_LINE = TypeAdapter(Line)


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    return [route(hub, REPO + "/commit/{revision}", "POST", commit)]


async def commit(call: Call, request: Request) -> Response:
    """Make one commit from lines of JSON; with ?create_pr=1 as a new pull request."""
    create_pr = call.flag("create_pr")
    revision = call.params["revision"]
    call.contributable(None if create_pr else revision)
    header: Header | None = None
    operations: list[commits.Operation] = []
    async for line in _lines(request):
        if header is None:
            header = _header(line)
        else:
            operations.append(await _run(call, functools.partial(_operation, call, line)))
        if len(operations) > MOST_OPERATIONS:
            raise refusal.Refused(413, f"More than {MOST_OPERATIONS} operations in one commit")
    if header is None:
        raise refusal.bad_request("The commit has no header")
    draft = commits.Draft(
        revision=revision,
        title=header.summary,
        message=header.description,
        parent=header.parentCommit,
        operations=operations,
        author=call.account,
    )
    return await _run(call, functools.partial(_commit, call, draft, create_pr=create_pr))


def _commit(call: Call, draft: commits.Draft, *, create_pr: bool) -> Response:
    store, repo_id = call.hub.store, call.repo_id()
    url = f"{call.base_url}/{call.repo().url_path}"
    if not create_pr:
        made = commits.commit(store, repo_id, draft)
        return JSONResponse(_made(url, made))
    made, number = commits.commit_to_new_pull(store, repo_id, draft)
    return JSONResponse(_made(url, made) | {"pullRequestUrl": f"{url}/discussions/{number}"})


def _made(url: str, made: Commit) -> dict[str, Any]:
    return {
        "success": True,
        "commitOid": made.oid,
        "commitUrl": f"{url}/commit/{made.oid}",
        "hookOutput": "",
    }


def _header(line: bytes) -> Header:
    parsed = _parsed(line)
    if parsed.key != "header":
        raise refusal.bad_request("The first line of a commit must be its header")
    return _value(Header, parsed)


def _operation(call: Call, line: bytes) -> commits.Operation:
    """Return the operation of a line, with the content of a regular file already kept."""
    parsed = _parsed(line)
    store = call.hub.store
    match parsed.key:
        case "file":
            regular = _value(RegularFile, parsed)
            names.path(regular.path)
            file = commits.regular_file(store, _content(regular))
            return commits.Put(path=regular.path, file=file)
        case "lfsFile":
            large = _value(LfsFile, parsed)
            names.path(large.path)
            file = commits.lfs_file(store, large.oid, large.size, xet=call.hub.xet)
            return commits.Put(path=large.path, file=file)
        case "deletedFile" | "deletedFolder":
            path = _value(DeletedPath, parsed).path.rstrip("/")
            return commits.Remove(path=path, folder=parsed.key == "deletedFolder")
        case _:
            raise refusal.bad_request(f"Unknown operation: {parsed.key!r}")


def _content(file: RegularFile) -> bytes:
    try:
        encoded = file.content.encode()
        content = base64.b64decode(encoded, validate=True) if file.encoding == "base64" else encoded
    except (binascii.Error, ValueError):
        raise refusal.bad_request(f"{file.path}: the content is not base64") from None
    if len(content) > LONGEST_REGULAR_BYTES:
        raise refusal.bad_request(
            f"{file.path} has {len(content)} bytes; files over {LONGEST_REGULAR_BYTES} need LFS"
        )
    return content


def _parsed(line: bytes) -> Line:
    try:
        return _LINE.validate_json(line)
    except ValidationError:
        raise refusal.bad_request("A line of the commit is not a JSON operation") from None


def _value(model: type[Model], line: Line) -> Model:
    try:
        return model.model_validate(line.value)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refusal.bad_request(f"{line.key}: {where}: {first['msg']}") from None


async def _lines(request: Request) -> AsyncIterator[bytes]:
    """Yield the lines of the body as they arrive, holding one at a time."""
    held = bytearray()
    async for chunk in request.stream():
        held += chunk
        while (end := held.find(b"\n")) >= 0:
            line, held = bytes(held[:end]), held[end + 1 :]
            if line.strip():
                yield line
        if len(held) > LONGEST_LINE_BYTES:
            raise refusal.Refused(413, "A regular file of the commit is too large; use LFS")
    if held.strip():
        yield bytes(held)


async def _run(call: Call, work: Callable[[], T]) -> T:
    return await anyio.to_thread.run_sync(work, limiter=call.hub.threads)
