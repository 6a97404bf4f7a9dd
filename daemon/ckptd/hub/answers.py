"""What a Hub's answers say, as our values. Pure.

Everything that a push can do without may be absent, and nothing is minded that is there besides;
what it cannot do without raises a LookupError, TypeError or AttributeError, which `translate` tells
as an answer of another form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import httpx2

from ckptd import errors
from ckptd.hub import ledger
from ckptd.hub.facts import Commit, PullRequest, RepoFacts

_PAGE = re.compile(rb"\s*<(!doctype html|html)[\s>]", re.IGNORECASE)


def next_page(response: httpx2.Response) -> str | None:
    """Return the link to the next page of a list, None on the last one.

    A relative link is completed; one to another host, which a Hub behind a proxy may give, is
    followed on this one: the token is for nobody else.
    """
    link = response.links.get("next", {}).get("url")
    if link is None:
        return None
    here = response.url
    there = here.join(link).copy_with(scheme=here.scheme, host=here.host, port=here.port)
    return None if there == here else str(there)


def content(response: httpx2.Response, name: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        errors.HubUnavailable: it is a page of somebody in between.
    """
    is_html = response.headers.get("content-type", "").startswith("text/html")
    if is_html and _PAGE.match(response.content):
        raise errors.HubUnavailable(
            f"in place of {name} came a web page",
            hint="is HF_ENDPOINT a Hub, or a proxy's login page?",
        )
    return bytes(response.content)


def repo(data: Mapping[str, Any], *, asked: str) -> RepoFacts:
    """Return what a repo is; without a name in the answer it has the one that was `asked` for."""
    return RepoFacts(
        repo_id=str(data.get("id") or data.get("modelId") or asked),
        is_private=bool(data.get("private") or data.get("visibility") == "private"),
    )


def head(data: Mapping[str, Any]) -> str | None:
    """Return the commit that an answer about a revision names."""
    sha = data.get("sha")
    return str(sha) if sha else None


def branch_head(refs: Mapping[str, Any], branch: str) -> str | None:
    """Return the commit of a branch in a list of refs."""
    return _targets(refs.get("branches")).get(branch)


def tags(refs: Mapping[str, Any]) -> dict[str, str]:
    """Return the git tags in a list of refs, and the commits they point to."""
    return _targets(refs.get("tags"))


def files(items: Iterable[Mapping[str, Any]]) -> dict[str, ledger.RemoteFile]:
    """Return the files of a tree by path."""
    return {str(item["path"]): _file(item) for item in items if item.get("type") != "directory"}


def commits(items: Iterable[Mapping[str, Any]]) -> list[Commit]:
    """Return the commits of a list, in its order."""
    return [
        Commit(
            oid=str(item.get("id") or item["oid"]),
            text=f"{item.get('title') or ''}\n{item.get('message') or ''}",
        )
        for item in items
    ]


def pull_requests(items: Iterable[Mapping[str, Any]]) -> list[PullRequest]:
    """Return the pull requests among discussions."""
    return [pull_request(item) for item in items if item.get("isPullRequest", True)]


def pull_request(data: Mapping[str, Any]) -> PullRequest:
    """Return a pull request, with its first comment where the answer has its events."""
    comments = [_comment(event) for event in data.get("events") or ()]
    return PullRequest(
        num=int(data["num"]),
        title=str(data["title"]),
        author=str((data.get("author") or {}).get("name") or ""),
        status=str(data["status"]),
        text=next((comment for comment in comments if comment), ""),
    )


def _file(item: Mapping[str, Any]) -> ledger.RemoteFile:
    large = item.get("lfs") or {}
    sha256 = large.get("oid") or large.get("sha256")
    return ledger.RemoteFile(
        path_in_repo=str(item["path"]),
        nbytes=int(large["size"] if "size" in large else item["size"]),
        blob_id=str(item.get("oid") or item.get("blobId") or ""),
        sha256=str(sha256).removeprefix("sha256:") if sha256 else None,
    )


def _targets(refs: Iterable[Mapping[str, Any]] | None) -> dict[str, str]:
    return {str(ref["name"]): str(ref["targetCommit"]) for ref in refs or ()}


def _comment(event: Mapping[str, Any]) -> str:
    latest = (event.get("data") or {}).get("latest") or {}
    return str(latest.get("raw") or "")
