"""Endpoints about repos as a whole: make, look at, list, settings, move, delete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import accounts, front_matter, history, names, refusal
from ckptd.hub.local.names import RepoId
from ckptd.hub.local.options import Hub
from ckptd.hub.local.values import KINDS, MAIN, Commit, File, Repo, pointer
from ckptd.hub.local.wire import Call, route

REPO = "/api/{kind}/{namespace}/{name}"
"""How the API's paths name a repo."""
LONGEST_CARD_BYTES = 1024 * 1024


class CreateBody(BaseModel):
    """A repo to be made or deleted."""

    name: str
    organization: str | None = None
    type: str = "model"
    visibility: Literal["public", "private", "protected"] | None = None
    private: bool | None = None


class MoveBody(BaseModel):
    """A repo's old and new name."""

    fromRepo: str  # noqa: N815 - the API's name
    toRepo: str  # noqa: N815 - the API's name
    type: str = "model"


class SettingsBody(BaseModel):
    """What to change; None leaves it."""

    visibility: Literal["public", "private", "protected"] | None = None
    private: bool | None = None
    gated: Literal["auto", "manual"] | Literal[False] | None = None


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    return [
        route(hub, "/api/repos/create", "POST", create),
        route(hub, "/api/repos/delete", "DELETE", delete),
        route(hub, "/api/repos/move", "POST", move),
        route(hub, "/api/{kind}", "GET", listing),
        route(hub, REPO, "GET", info),
        route(hub, REPO + "/revision/{revision}", "GET", info),
        route(hub, REPO + "/settings", "PUT", settings),
        route(hub, REPO + "/auth-check", "GET", auth_check),
    ]


def create(call: Call) -> Response:
    """Make a repo; 409 with its URL when it exists."""
    body = call.json(CreateBody)
    repo_id = names.repo_id(body.type, body.organization or call.account.name or "-", body.name)
    call.must_write(repo_id.namespace)
    private = body.visibility == "private" or bool(body.private)
    url = f"{call.base_url}/{_url_path(repo_id)}"
    try:
        call.hub.store.create(repo_id, private=private)
    except refusal.Refused as refused:
        refused.extra["url"] = url
        raise
    return JSONResponse({"url": url, "name": str(repo_id), "id": str(repo_id)})


def delete(call: Call) -> Response:
    """Delete a repo."""
    body = call.json(CreateBody)
    repo_id = names.repo_id(body.type, body.organization or call.account.name or "-", body.name)
    _must_own(call, repo_id)
    call.hub.store.delete(repo_id)
    return JSONResponse({"deleted": str(repo_id)})


def move(call: Call) -> Response:
    """Rename a repo."""
    body = call.json(MoveBody)
    source = names.repo_id(body.type, *_halves(body.fromRepo))
    target = names.repo_id(body.type, *_halves(body.toRepo))
    _must_own(call, source)
    call.must_write(target.namespace)
    call.hub.store.move(source, target)
    return JSONResponse({"url": f"{call.base_url}/{_url_path(target)}"})


def settings(call: Call) -> Response:
    """Change visibility or gating."""
    call.writable()
    body = call.json(SettingsBody)
    private = body.private if body.visibility is None else body.visibility == "private"

    def change(repo: Repo) -> tuple[Repo, None]:
        return replace(
            repo,
            private=repo.private if private is None else private,
            gated=repo.gated if body.gated is None else body.gated,
        ), None

    call.hub.store.update(call.repo_id(), change)
    return JSONResponse(body.model_dump(exclude_none=True))


def auth_check(call: Call) -> Response:
    """Answer 200 when the repo is visible."""
    call.repo()
    return JSONResponse({"success": True})


def listing(call: Call) -> Response:
    """List the repos of a kind that this account sees: ?author= and ?search= narrow it."""
    if call.params["kind"] not in KINDS:
        raise refusal.Refused(404, f"No such endpoint: {call.url_path}")
    author, search = call.query.get("author"), call.query.get("search", "").lower()
    found = []
    for repo_id in call.hub.store.ids():
        repo = call.hub.store.find(repo_id)
        if repo is None or repo_id.kind != call.params["kind"] or not call.account.may_read(repo):
            continue
        if author in (None, repo.namespace) and search in repo.id.lower():
            found.append(summary(call.hub, repo, _head(call.hub, repo_id, repo)))
    return JSONResponse(found)


def info(call: Call) -> Response:
    """Return a repo at a revision, with its files; ?blobs=true adds their sizes and ids."""
    repo = call.repo()
    revision = call.params.get("revision", MAIN)
    commit = history.resolve(call.hub.store, call.repo_id(), repo, revision)
    sized = call.flag("blobs")
    answer = summary(call.hub, repo, commit)
    answer["siblings"] = [
        {"rfilename": path, **(_blob(file) if sized else {})} for path, file in commit.files.items()
    ]
    answer["usedStorage"] = sum(file.size for file in commit.files.values())
    return JSONResponse(answer)


def summary(hub: Hub, repo: Repo, commit: Commit) -> dict[str, Any]:
    """Return what the API says about a repo, but for its files."""
    card = card_data(hub, commit.files)
    tags = card.get("tags")
    return {
        "_id": commit.oid[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "createdAt": repo.date,
        "lastModified": commit.date,
        "downloads": 0,
        "likes": 0,
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
    }


def card_data(hub: Hub, files: Mapping[str, File]) -> dict[str, Any]:
    """Return the metadata of the README.md, in values that JSON has."""
    readme = files.get("README.md")
    if (
        readme is None
        or readme.size > LONGEST_CARD_BYTES
        or hub.store.blobs.size(readme.sha256) is None
    ):
        return {}
    card = hub.store.blobs.read(readme.sha256).decode(errors="replace")
    plain: dict[str, Any] = _plain(front_matter.metadata(card))
    return plain


def _plain(value: Any) -> Any:
    """Return YAML values as JSON values: dates and the like as text."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case None | bool() | int() | str():
            return value
        case float() if value - value == 0:
            return value
        case _:
            return str(value)


def _blob(file: File) -> dict[str, Any]:
    sized: dict[str, Any] = {"size": file.size, "blobId": file.oid}
    if file.lfs:
        sized["lfs"] = {
            "sha256": file.sha256,
            "size": file.size,
            "pointerSize": len(pointer(file.sha256, file.size)),
        }
    return sized


def _must_own(call: Call, repo_id: RepoId) -> None:
    """Raise Refused unless the account sees the repo and may change its namespace."""
    repo = call.hub.store.find(repo_id)
    if call.account is accounts.ANONYMOUS:
        raise refusal.login_needed()
    if repo is None or not call.account.may_read(repo):
        raise call.no_repo()
    call.must_write(repo_id.namespace)


def _head(hub: Hub, repo_id: RepoId, repo: Repo) -> Commit:
    return hub.store.commit(repo_id, repo.branches[MAIN])


def _url_path(repo_id: RepoId) -> str:
    return str(repo_id) if repo_id.kind == "models" else f"{repo_id.kind}/{repo_id}"


def _halves(repo_id: str) -> tuple[str, str]:
    namespace, _, name = repo_id.partition("/")
    return namespace, name
