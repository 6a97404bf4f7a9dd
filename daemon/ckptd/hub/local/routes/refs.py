"""Endpoints about history: commit lists, branches, tags, squash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import commits, history, names, refusal
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes.repos import REPO
from ckptd.hub.local.values import MAIN, Repo, Tag
from ckptd.hub.local.wire import Call, route


class BranchBody(BaseModel):
    """Where a new branch starts."""

    startingPoint: str | None = None  # noqa: N815 - the API's name


class TagBody(BaseModel):
    """A new tag."""

    tag: str
    message: str = ""


class SquashBody(BaseModel):
    """Title of the one commit that stays."""

    message: str = "Super-squash branch"


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    return [
        route(hub, REPO + "/commits/{revision}", "GET", commit_list),
        route(hub, REPO + "/refs", "GET", refs),
        route(hub, REPO + "/branch/{ref}", "POST", create_branch),
        route(hub, REPO + "/branch/{ref}", "DELETE", delete_branch),
        route(hub, REPO + "/tag/{ref}", "POST", create_tag),
        route(hub, REPO + "/tag/{ref}", "DELETE", delete_tag),
        route(hub, REPO + "/super-squash/{ref}", "POST", squash),
    ]


def commit_list(call: Call) -> Response:
    """List the commits of a revision, newest first, page by page (?p=)."""
    start = call.commit(call.repo())
    page = int(call.query.get("p", "0")) if call.query.get("p", "0").isdecimal() else 0
    size = call.hub.choices.commits_page
    every = call.hub.store.past(call.repo_id(), start.oid)
    first = page * size
    shown = (call.hub.store.commit(call.repo_id(), oid) for oid in every[first : first + size])
    headers = {"X-Total-Count": str(len(every))}
    if first + size < len(every):
        headers["Link"] = f'<{call.base_url}{call.url_path}?p={page + 1}>; rel="next"'
    answer = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author, "avatar": ""}],
            "date": commit.date,
        }
        for commit in shown
    ]
    return JSONResponse(answer, headers=headers)


def refs(call: Call) -> Response:
    """List branches, tags and, with ?include_prs=1, the refs of pull requests."""
    repo = call.repo()
    answer: dict[str, Any] = {
        "branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in repo.branches.items()],
        "tags": [_ref(name, f"refs/tags/{name}", tag.commit) for name, tag in repo.tags.items()],
        "converts": [],
    }
    if call.flag("include_prs"):
        answer["pullRequests"] = [
            _ref(str(number), f"refs/pr/{number}", oid) for number, oid in repo.pulls.items()
        ]
    return JSONResponse(answer)


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


def create_branch(call: Call) -> Response:
    """Make a branch at `startingPoint`, or at the head of main; 409 when it exists."""
    call.writable()
    name, body = names.ref(call.params["ref"]), call.json(BranchBody)

    def change(repo: Repo) -> tuple[Repo, str]:
        if name in repo.branches:
            raise refusal.taken(f"Reference already exists: refs/heads/{name}")
        start = body.startingPoint or MAIN
        oid = history.resolve(call.hub.store, call.repo_id(), repo, start).oid
        return replace(repo, branches={**repo.branches, name: oid}), oid

    oid = call.hub.store.update(call.repo_id(), change)
    return JSONResponse(_ref(name, f"refs/heads/{name}", oid), 201)


def delete_branch(call: Call) -> Response:
    """Remove a branch; main is protected (403)."""
    call.writable()
    name = call.params["ref"]

    def change(repo: Repo) -> tuple[Repo, None]:
        if name == MAIN:
            raise refusal.forbidden("Cannot delete refs/heads/main: protected")
        if name not in repo.branches:
            raise refusal.no_revision(name)
        kept = {branch: oid for branch, oid in repo.branches.items() if branch != name}
        return replace(repo, branches=kept), None

    call.hub.store.update(call.repo_id(), change)
    return Response(status_code=204)


def create_tag(call: Call) -> Response:
    """Put a tag on the commit that the path names; 409 when the tag exists."""
    call.writable()
    body, revision = call.json(TagBody), call.params["ref"]
    name = names.ref(body.tag)

    def change(repo: Repo) -> tuple[Repo, str]:
        if name in repo.tags:
            raise refusal.taken(f"Tag reference exists already: refs/tags/{name}")
        oid = history.resolve(call.hub.store, call.repo_id(), repo, revision).oid
        return replace(repo, tags={**repo.tags, name: Tag(commit=oid, message=body.message)}), oid

    oid = call.hub.store.update(call.repo_id(), change)
    return JSONResponse(_ref(name, f"refs/tags/{name}", oid), 201)


def delete_tag(call: Call) -> Response:
    """Remove a tag."""
    call.writable()
    name = call.params["ref"]

    def change(repo: Repo) -> tuple[Repo, None]:
        if name not in repo.tags:
            raise refusal.no_revision(name)
        kept = {tag: value for tag, value in repo.tags.items() if tag != name}
        return replace(repo, tags=kept), None

    call.hub.store.update(call.repo_id(), change)
    return Response(status_code=204)


def squash(call: Call) -> Response:
    """Replace a branch's history by one commit."""
    call.writable()
    body = call.json(SquashBody)
    made = commits.squash(
        call.hub.store,
        call.repo_id(),
        call.params["ref"],
        title=body.message,
        author=call.account.name,
    )
    return JSONResponse({"commitOid": made.oid})
