"""The pages for a person with a browser. The last routes: what is no API path may be a page.

A browser has no token; it is asked for one (as the password) where a page needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ckptd.hub.local import accounts, discussions, history, pages, refusal
from ckptd.hub.local.options import Hub
from ckptd.hub.local.store import ancestors
from ckptd.hub.local.values import MAIN, Commit
from ckptd.hub.local.wire import Call, route

SHOWN_COMMITS = 30
SHOWN_CARD_BYTES = 256 * 1024
NO_PAGES = ("api", "cas", "lfs")
"""First parts of paths that only programs ask for."""
HEADERS = {
    "Content-Security-Policy": pages.CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
}


def routes(hub: Hub) -> list[Route]:
    """Return the routes of this module."""
    methods = "GET HEAD POST PUT PATCH DELETE"
    found = [
        route(hub, f"/{name}/{{rest:path}}", methods, no_such_endpoint, accounts_matter=False)
        for name in NO_PAGES
    ]
    found.append(route(hub, "/", "GET", _page(index)))
    for prefix in ("/{namespace}/{name}", "/{kind}/{namespace}/{name}"):
        found += [
            route(hub, prefix, "GET", _page(repo)),
            route(hub, prefix + "/tree/{revision}", "GET", _page(repo)),
            route(hub, prefix + "/commit/{revision}", "GET", _page(commit)),
            route(hub, prefix + "/discussions/{number:int}", "GET", _page(discussion)),
        ]
    return found


def no_such_endpoint(call: Call) -> Response:
    """Answer 404 to what no module before this one knows."""
    raise refusal.Refused(404, f"No such endpoint: {call.url_path}")


def index(call: Call) -> pages.Html:
    """List the repos."""
    anonymous = call.account is accounts.ANONYMOUS
    if anonymous and call.query.get("login"):
        raise refusal.login_needed()
    store = call.hub.store
    listed = []
    for repo_id in store.ids():
        found = store.find(repo_id)
        if found is not None and call.account.may_read(found):
            listed.append((found, store.commit(repo_id, found.branches[MAIN])))
    return pages.index(listed, who=call.account.name)


def repo(call: Call) -> pages.Html:
    """Show a repo at a revision."""
    found = call.repo()
    revision = call.params.get("revision", MAIN)
    store, repo_id = call.hub.store, call.repo_id()
    at = history.resolve(store, repo_id, found, revision)
    past = list(islice(ancestors(store, repo_id, at.oid), SHOWN_COMMITS))
    return pages.repo_page(found, revision, at, readme=_readme(call, at), history=past)


def commit(call: Call) -> pages.Html:
    """Show what a commit changed."""
    found = call.repo()
    at = call.commit(found)
    parent = call.hub.store.commit(call.repo_id(), at.parent) if at.parent else None
    return pages.commit_page(found, at, history.changes(parent.files if parent else {}, at.files))


def discussion(call: Call) -> pages.Html:
    """Show a discussion or pull request."""
    found = call.repo()
    return pages.discussion_page(found, discussions.get(found, int(call.params["number"])))


def _readme(call: Call, at: Commit) -> str | None:
    file = at.files.get("README.md")
    if (
        file is None
        or file.size > SHOWN_CARD_BYTES
        or call.hub.store.blobs.size(file.sha256) is None
    ):
        return None
    return call.hub.store.blobs.read(file.sha256).decode(errors="replace")


def _page(render: Callable[[Call], pages.Html]) -> Callable[[Call], Response]:
    """Return an endpoint that answers with a page, for a refusal too."""

    def endpoint(call: Call) -> Response:
        try:
            return HTMLResponse(render(call), headers=HEADERS)
        except refusal.Refused as refused:
            headers = dict(HEADERS)
            if refused.status == 401:
                headers["WWW-Authenticate"] = 'Basic realm="the token is the password"'
            return HTMLResponse(pages.refused_page(refused.message), refused.status, headers)

    return endpoint
