"""Discussions and pull requests: their states and what each step does to the repo.

    draft -> open <-> closed;  open -> merged (pull requests only, final)

A pull request's commits are on `refs/pr/N`. Merging puts its changes onto the base branch as one
commit, path by path; a path that both sides changed since the fork is a conflict (409).
"""

from __future__ import annotations

import html
import secrets
from dataclasses import replace

from ckptd.hub.local import history, refusal
from ckptd.hub.local.names import RepoId
from ckptd.hub.local.store import Store, now
from ckptd.hub.local.values import Commit, Discussion, Event, EventType, File, Repo, Status

TITLE_CHARS = range(3, 201)


def opened(
    repo: Repo,
    *,
    title: str,
    text: str,
    author: str,
    base: str | None = None,
    head: str | None = None,
    status: Status = "open",
) -> tuple[Repo, int]:
    """Return the repo with one more discussion, or pull request where `base` is set."""
    number = max(repo.discussions, default=0) + 1
    discussion = Discussion(
        num=number,
        title=title[: TITLE_CHARS.stop - 1],
        author=author,
        date=now(),
        status=status,
        base=base,
        events=(comment_event(text, author),) if text else (),
    )
    pulls = {**repo.pulls, number: head} if head is not None else repo.pulls
    listed = {**repo.discussions, number: discussion}
    return replace(repo, discussions=listed, pulls=pulls), number


def checked_title(title: str) -> str:
    """Return the title without blanks around it. Raises Refused (400) outside 3 to 200 chars."""
    title = title.strip()
    if len(title) not in TITLE_CHARS:
        raise refusal.bad_request("A title has 3 to 200 characters")
    return title


def get(repo: Repo, number: int) -> Discussion:
    """Return a discussion. Raises Refused (404)."""
    found = repo.discussions.get(number)
    if found is None:
        raise refusal.Refused(404, f"There is no discussion #{number}")
    return found


def with_commit(repo: Repo, number: int, commit: Commit) -> Repo:
    """Return the repo with `commit` as the newest of an unfinished pull request.

    Raises:
        refusal.Refused: 403, the pull request is closed or merged.
    """
    discussion = get(repo, number)
    if discussion.status not in ("draft", "open"):
        raise refusal.forbidden(f"Pull request #{number} is {discussion.status}")
    event = _event("commit", commit.author, {"subject": commit.title, "oid": commit.oid})
    after = with_events(repo, discussion, event)
    return replace(after, pulls={**repo.pulls, number: commit.oid})


def with_events(repo: Repo, discussion: Discussion, *events: Event) -> Repo:
    """Return the repo with `discussion` as it is given, and events added to it."""
    changed = replace(discussion, events=(*discussion.events, *events))
    return replace(repo, discussions={**repo.discussions, discussion.num: changed})


def with_status(
    repo: Repo, number: int, status: Status, *, author: str, comment: str = ""
) -> tuple[Repo, Event]:
    """Return the repo with the discussion open or closed, and the event of it.

    Raises:
        refusal.Refused: 400 for another status, 403 when it is merged.
    """
    discussion = get(repo, number)
    if status not in ("open", "closed"):
        raise refusal.bad_request(f"Invalid status: {status!r}")
    if discussion.status == "merged":
        raise refusal.forbidden(f"Pull request #{number} is merged")
    event = _event("status-change", author, {"status": status})
    said = (comment_event(comment, author),) if comment else ()
    return with_events(repo, replace(discussion, status=status), *said, event), event


def renamed(repo: Repo, number: int, title: str, *, author: str) -> tuple[Repo, Event]:
    """Return the repo with the discussion's new title, and the event of it."""
    discussion = get(repo, number)
    title = checked_title(title)
    data: dict[str, object] = {"from": discussion.title, "to": title}
    event = _event("title-change", author, data)
    return with_events(repo, replace(discussion, title=title), event), event


def merge(store: Store, repo_id: RepoId, number: int, *, author: str, comment: str = "") -> Commit:
    """Put an open pull request's changes onto its base branch, as one commit.

    Raises:
        refusal.Refused: 400 not an open pull request, 404 its base is gone, 409 conflicts.
    """

    def change(repo: Repo) -> tuple[Repo, Commit]:
        discussion = get(repo, number)
        if discussion.base is None or discussion.status != "open":
            raise refusal.bad_request(f"#{number} is not an open pull request")
        base = repo.branches.get(discussion.base)
        if base is None:
            raise refusal.no_revision(discussion.base)
        files, conflicts = merged_files(store, repo_id, base=base, head=repo.pulls[number])
        if conflicts:
            raise refusal.taken(f"Conflicting files: {', '.join(conflicts)}")
        made = store.write_commit(
            repo_id, files, parent=base, title=f"{discussion.title} (#{number})", author=author
        )
        done = replace(discussion, status="merged", merge_commit=made.oid)
        said = (comment_event(comment, author),) if comment else ()
        event = _event("status-change", author, {"status": "merged"})
        after = with_events(repo, done, *said, event)
        return replace(after, branches={**repo.branches, discussion.base: made.oid}), made

    return store.update(repo_id, change)


def merged_files(
    store: Store, repo_id: RepoId, *, base: str, head: str
) -> tuple[dict[str, File], list[str]]:
    """Return the files of `base` with what `head` changed since they forked, and the conflicts."""
    fork = history.fork_point(store, repo_id, base, head)
    before = fork.files if fork is not None else {}
    files = dict(store.commit(repo_id, base).files)
    conflicts = []
    for path, (old, new) in history.changes(before, store.commit(repo_id, head).files).items():
        if files.get(path) not in (old, new):
            conflicts.append(path)
        elif new is None:
            files.pop(path, None)
        else:
            files[path] = new
    return files, conflicts


def comment_event(text: str, author: str) -> Event:
    """Return a comment as the API writes it."""
    date = now()
    latest = {
        "raw": text,
        "html": f"<p>{html.escape(text)}</p>",
        "updatedAt": date,
        "author": {"name": author},
    }
    data = {"edited": False, "hidden": False, "latest": latest, "history": [latest]}
    return replace(_event("comment", author, dict(data)), date=date)


def _event(kind: EventType, author: str, data: dict[str, object]) -> Event:
    return Event(
        id=secrets.token_hex(12),
        type=kind,
        author=author,
        date=now(),
        data=data,
    )
