"""Between HTTP and the repos: what every route needs of a request, and every answer's form.

An endpoint is a function `Call -> Response` that may block: it runs in a worker thread, after the
small body was read. Endpoints that stream are `async` and get the request as well. A `Refused`
becomes the error answer that the client understands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote

import anyio
import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import accounts, history, names, refusal
from ckptd.hub.local.accounts import Account
from ckptd.hub.local.names import RepoId
from ckptd.hub.local.options import Hub
from ckptd.hub.local.values import Commit, Repo

WRITE_BYTES = 1024 * 1024
"""Hashed and written in one go, in a worker thread."""
LONGEST_BODY_BYTES = 16 * 1024 * 1024
"""Of requests that are read as a whole; commits and content stream."""

Model = TypeVar("Model", bound=BaseModel)
Endpoint = Callable[["Call"], Response]
StreamingEndpoint = Callable[["Call", Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, understood."""

    hub: Hub
    account: Account
    base_url: str
    """`http://host:port` as the client wrote it: it compares our URLs with its endpoint."""
    url_path: str
    """The path as it was sent, not decoded."""
    params: Mapping[str, str]
    """Path parameters, decoded once."""
    query: QueryParams
    headers: Headers
    body: bytes = b""

    def json(self, model: type[Model]) -> Model:
        """Return the body as `model`. Raises Refused (400)."""
        try:
            return model.model_validate_json(self.body or b"{}")
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise refusal.bad_request(f"Invalid body: {where}: {first['msg']}") from None

    def flag(self, name: str) -> bool:
        """Return a boolean of the query."""
        return self.query.get(name, "").lower() in ("1", "true")

    def repo_id(self) -> RepoId:
        """Return the id of the repo that the path names. Raises Refused when there can be none."""
        try:
            return names.repo_id(
                self.params.get("kind", "models"), self.params["namespace"], self.params["name"]
            )
        except refusal.Refused:
            raise self.no_repo() from None

    def repo(self) -> Repo:
        """Return the repo that the path names. Raises Refused when it is absent or hidden."""
        found = self.hub.store.find(self.repo_id())
        if found is None or not self.account.may_read(found):
            raise self.no_repo()
        return found

    def writable(self) -> Repo:
        """Return the repo for changing it. Raises Refused: absent, hidden, 401 or 403."""
        found = self.repo()
        self.must_write(found.namespace)
        return found

    def contributable(self, revision: str | None = None) -> Repo:
        """Return the repo for a pull request, or for writing to its own or a branch `revision`."""
        found = self.repo()
        number = history.pull_number(revision) if revision is not None else None
        if revision is not None and number is None:
            return self.writable()
        discussion = found.discussions.get(number) if number is not None else None
        if discussion is not None and discussion.author != self.account.name:
            return self.writable()
        if self.account is accounts.ANONYMOUS:
            raise refusal.login_needed()
        if self.account.role == "read":
            raise refusal.forbidden("This token has role read; a token with role write is needed")
        return found

    def must_write(self, namespace: str) -> None:
        """Raise Refused unless the account may change things in `namespace`."""
        if self.account is accounts.ANONYMOUS:
            raise refusal.login_needed()
        if not self.account.may_write(namespace):
            why = "This token has role read" if self.account.role == "read" else "No membership"
            raise refusal.forbidden(
                f"{why}: {self.account.name} may not write to the namespace {namespace}"
            )

    def commit(self, repo: Repo) -> Commit:
        """Return the commit that the path's revision names. Raises Refused (404)."""
        return history.resolve(self.hub.store, self.repo_id(), repo, self.params["revision"])

    def no_repo(self) -> refusal.Refused:
        """Return the refusal for a repo that is absent or hidden."""
        return refusal.no_repo(anonymous=self.account is accounts.ANONYMOUS)


def route(
    hub: Hub,
    path: str,
    methods: str,
    endpoint: Endpoint | StreamingEndpoint,
    *,
    accounts_matter: bool = True,
) -> Route:
    """Return a starlette route for an endpoint; `methods` are separated by spaces.

    Where accounts do not matter, the endpoint checks a signature or a token of its own kind.
    """

    async def answer(request: Request) -> Response:
        try:
            call = _call(hub, request, known=accounts_matter)
            if inspect.iscoroutinefunction(endpoint):
                answered: Response = await endpoint(call, request)
                return answered
            body = await read_body(request)
            call = Call(**{name: getattr(call, name) for name in Call.__slots__} | {"body": body})
            work = functools.partial(endpoint, call)
            # An endpoint is typed as sync or async; here it is known to be the first.
            return await anyio.to_thread.run_sync(work, limiter=hub.threads)  # type: ignore[arg-type]
        except refusal.Refused as refused:
            return refused_answer(refused)

    return Route(path, answer, methods=methods.split(), name=f"{methods} {path}")


async def read_body(request: Request, *, limit: int = LONGEST_BODY_BYTES) -> bytes:
    """Return the request's body. Raises Refused (413) when it is longer than `limit`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise refusal.Refused(413, f"The body is longer than {limit} bytes")
    return bytes(body)


async def store_body(
    call: Call, request: Request, write: Callable[[bytes], None], *, size: int
) -> int:
    """Stream the body to `write` in large pieces and return its length.

    Raises:
        refusal.Refused: 400, it is longer than `size`.
    """
    held = bytearray()
    received = 0
    async for chunk in request.stream():
        held += chunk
        received += len(chunk)
        if received > size:
            raise refusal.bad_request(f"More than the announced {size} bytes arrived")
        if len(held) >= WRITE_BYTES:
            await anyio.to_thread.run_sync(write, bytes(held), limiter=call.hub.threads)
            held.clear()
    if held:
        await anyio.to_thread.run_sync(write, bytes(held), limiter=call.hub.threads)
    return received


def refused_answer(refused: refusal.Refused) -> Response:
    """Return the error answer: the code in a header, the text in a header and in JSON."""
    text = refused.message.encode("ascii", "replace").decode().replace("\n", " ").replace("\r", " ")
    headers = {"X-Error-Message": text[:500], **refused.headers}
    if refused.code:
        headers["X-Error-Code"] = refused.code
    return JSONResponse({"error": refused.message, **refused.extra}, refused.status, headers)


def _call(hub: Hub, request: Request, *, known: bool) -> Call:
    authorization = request.headers.get("authorization") if known else None
    return Call(
        hub=hub,
        account=accounts.identify(authorization, hub.accounts),
        base_url=f"{request.url.scheme}://{request.url.netloc}",
        url_path=request.scope["path"],
        params={name: unquote(str(value)) for name, value in request.path_params.items()},
        query=request.query_params,
        headers=request.headers,
    )
