"""Endpoints about discussions and pull requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ckptd.hub.local import discussions, history
from ckptd.hub.local.options import Hub
from ckptd.hub.local.routes.repos import REPO
from ckptd.hub.local.values import MAIN, Discussion, Event, Repo, Status
from ckptd.hub.local.wire import Call, route


class OpenBody(BaseModel):
    """A new discussion, or draft pull request against main."""

    title: str
    description: str = ""
    pullRequest: bool = False  # noqa: N815 - the API's name


class StatusBody(BaseModel):
    """A new status, and why."""

    status: Status
    comment: str = ""


class CommentBody(BaseModel):
    """Something to say."""

    comment: str = ""


class TitleBody(BaseModel):
    """A new title."""

    title: str


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    one = REPO + "/discussions/{number:int}"
    return [
        route(hub, REPO + "/discussions", "GET", listing),
        route(hub, REPO + "/discussions", "POST", create),
        route(hub, one, "GET", details),
        route(hub, one + "/comment", "POST", comment),
        route(hub, one + "/title", "POST", rename),
        route(hub, one + "/status", "POST", status),
        route(hub, one + "/merge", "POST", merge),
    ]


def listing(call: Call) -> Response:
    """List discussions, newest first: ?type=, ?status=, ?author=, ?p=."""
    repo = call.repo()
    kind, state = call.query.get("type", "all"), call.query.get("status", "all")
    chosen = [
        discussion
        for discussion in sorted(repo.discussions.values(), key=lambda item: -item.num)
        if kind in ("all", "pull_request" if discussion.is_pull_request else "discussion")
        and state in ("all", "open" if discussion.status in ("open", "draft") else "closed")
        and call.query.get("author", discussion.author) == discussion.author
    ]
    page = call.query.get("p", "0")
    size = call.hub.choices.discussions_page
    start = int(page) * size if page.isdecimal() else 0
    answer = [_summary(repo, discussion) for discussion in chosen[start : start + size]]
    return JSONResponse({"discussions": answer, "count": len(chosen), "start": start})


def create(call: Call) -> Response:
    """Open a discussion, or a pull request, which begins as a draft at the head of main."""
    call.contributable()
    body = call.json(OpenBody)
    pull = body.pullRequest

    def change(repo: Repo) -> tuple[Repo, int]:
        return discussions.opened(
            repo,
            title=discussions.checked_title(body.title),
            text=body.description,
            author=call.account.name,
            base=MAIN if pull else None,
            head=repo.branches[MAIN] if pull else None,
            status="draft" if pull else "open",
        )

    number = call.hub.store.update(call.repo_id(), change)
    url = f"{call.base_url}/{call.repo().url_path}/discussions/{number}"
    return JSONResponse({"num": number, "url": url, "pullRequest": pull}, 201)


def details(call: Call) -> Response:
    """Return a discussion with its events; a pull request with what it changes."""
    repo = call.repo()
    discussion = discussions.get(repo, _number(call))
    answer = _summary(repo, discussion)
    answer["events"] = [_event(event) for event in discussion.events]
    if discussion.base is not None:
        answer["changes"] = {"base": f"refs/heads/{discussion.base}"}
        if discussion.merge_commit:
            answer["changes"]["mergeCommitId"] = discussion.merge_commit
        answer["diff"], answer["filesWithConflicts"] = _diff(call, repo, discussion)
    return JSONResponse(answer)


def comment(call: Call) -> Response:
    """Add a comment."""
    call.contributable()
    event = discussions.comment_event(call.json(CommentBody).comment, call.account.name)

    def change(repo: Repo) -> tuple[Repo, None]:
        return discussions.with_events(repo, discussions.get(repo, _number(call)), event), None

    call.hub.store.update(call.repo_id(), change)
    return JSONResponse({"newMessage": _event(event)})


def rename(call: Call) -> Response:
    """Give a discussion another title."""
    call.contributable(_ref(call))
    title = call.json(TitleBody).title
    event = call.hub.store.update(
        call.repo_id(),
        lambda repo: discussions.renamed(repo, _number(call), title, author=call.account.name),
    )
    return JSONResponse({"newTitle": _event(event)})


def status(call: Call) -> Response:
    """Open or close a discussion, or a draft."""
    call.contributable(_ref(call))
    body = call.json(StatusBody)
    event = call.hub.store.update(
        call.repo_id(),
        lambda repo: discussions.with_status(
            repo, _number(call), body.status, author=call.account.name, comment=body.comment
        ),
    )
    return JSONResponse({"newStatus": _event(event)})


def merge(call: Call) -> Response:
    """Merge an open pull request into its base branch."""
    call.writable()
    said = call.json(CommentBody).comment
    made = discussions.merge(
        call.hub.store, call.repo_id(), _number(call), author=call.account.name, comment=said
    )
    return JSONResponse({"mergeCommitId": made.oid})


def _number(call: Call) -> int:
    return int(call.params["number"])


def _ref(call: Call) -> str:
    return f"refs/pr/{_number(call)}"


def _summary(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "author": {"name": discussion.author, "type": "user"},
        "createdAt": discussion.date,
        "repo": {"name": repo.id, "type": repo.kind.removesuffix("s")},
        "isPullRequest": discussion.is_pull_request,
        "numComments": sum(event.type == "comment" for event in discussion.events),
    }


def _event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "type": event.type,
        "author": {"name": event.author, "type": "user"},
        "createdAt": event.date,
        "data": event.data,
    }


def _diff(call: Call, repo: Repo, discussion: Discussion) -> tuple[str, list[str]]:
    """Return one line for each changed file, and the files that conflict with the base."""
    store, repo_id = call.hub.store, call.repo_id()
    tip = repo.pulls[discussion.num]
    base = repo.branches.get(discussion.base or MAIN)
    if base is None or discussion.merge_commit:
        return "", []
    fork = history.fork_point(store, repo_id, base, tip)
    before = fork.files if fork else {}
    changed = history.changes(before, store.commit(repo_id, tip).files)
    letters = {(False, True): "A", (True, False): "D"}
    diff = "".join(
        f"{letters.get((old is not None, new is not None), 'M')}\t{path}\n"
        for path, (old, new) in changed.items()
    )
    return diff, discussions.merged_files(store, repo_id, base=base, head=tip)[1]
