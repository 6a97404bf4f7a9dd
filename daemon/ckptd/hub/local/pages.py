"""What a person sees of the Hub in a browser: values in, HTML out. Pure.

Everything that came from outside is escaped here, in `tag`; links are built from percent-encoded
parts. No scripts, no foreign resources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

from ckptd import units
from ckptd.hub.local.values import Commit, Discussion, File, Repo

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'"

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin-top:2rem}a{color:#0b57d0;text-decoration:none}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid #e4e4e4;vertical-align:top}td.n{text-align:right;white-space:nowrap}
pre{background:#f6f6f6;padding:1rem;overflow:auto;white-space:pre-wrap}
code{font-size:.9em}.dim{color:#777}.chip{background:#eef;border-radius:.6rem;padding:0 .5rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}a{color:#8ab4f8}
pre{background:#242424}td,th{border-color:#333}.chip{background:#334}}
""".replace("\n", "")


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """Return an element; children that are not `Html`, and all attributes, are escaped."""
    inside = "".join(
        child if isinstance(child, Html) else escape(child, quote=True) for child in children
    )
    written = "".join(
        f' {key.rstrip("_")}="{escape(value, quote=True)}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{inside}</{name}>")


def index(repos: Iterable[tuple[Repo, Commit]], *, who: str) -> Html:
    """Return the page that lists repos with their newest commits."""
    rows = [
        (
            link(repo, repo.id if repo.kind == "models" else repo.url_path),
            "private" if repo.private else "public",
            commit.title,
            str(sum(item.is_pull_request for item in repo.discussions.values())),
            size(commit.files),
            when(commit.date),
        )
        for repo, commit in repos
    ]
    login = tag("a", "log in", href="/?login=1") if not who else Html(escape(f"you are {who}"))
    return _page(
        "Hub on loopback",
        tag("p", "The repos that you may see. ", login, class_="dim"),
        _table(("repo", "", "newest commit on main", "PRs", "size", "changed"), rows),
    )


def repo_page(
    repo: Repo, revision: str, commit: Commit, *, readme: str | None, history: Sequence[Commit]
) -> Html:
    """Return a repo's page at a revision: refs, files, pull requests, history, card."""
    discussions = sorted(repo.discussions.values(), key=lambda item: -item.num)
    card = (tag("h2", "README.md"), tag("pre", readme)) if readme is not None else ()
    return _page(
        repo.id,
        tag("p", f"{'private' if repo.private else 'public'} {repo.kind.removesuffix('s')}"),
        tag("p", tag("code", revision), " = ", _commit_link(repo, commit), " ", commit.title),
        _table(("ref", "commit"), _refs(repo)),
        tag("h2", f"Files ({size(commit.files)})"),
        _table(("file", "size", "storage", "sha256"), _files(repo, commit)),
        tag("h2", "Pull requests and discussions"),
        _table(("", "title", "status", "by", ""), [_discussion(repo, d) for d in discussions]),
        tag("h2", "Commits"),
        _table(
            ("commit", "title", "by", ""),
            [(_commit_link(repo, c), c.title, c.author, when(c.date)) for c in history],
        ),
        *card,
    )


def commit_page(
    repo: Repo, commit: Commit, changed: Mapping[str, tuple[File | None, File | None]]
) -> Html:
    """Return what one commit changed."""
    rows = [
        (
            "added" if old is None else "deleted" if new is None else "changed",
            path,
            units.format_bytes(new.size) if new else "",
            tag("code", (new.sha256 if new else "")[:16]),
        )
        for path, (old, new) in changed.items()
    ]
    return _page(
        commit.title,
        tag("p", "Commit ", tag("code", commit.oid), " of ", link(repo, repo.id)),
        tag("p", f"By {commit.author}, ", when(commit.date), class_="dim"),
        tag("pre", commit.message) if commit.message else Html(),
        _table(("", "file", "size", "sha256"), rows),
    )


def discussion_page(repo: Repo, discussion: Discussion) -> Html:
    """Return a discussion or pull request with everything that happened in it."""
    rows = []
    for event in discussion.events:
        latest = event.data.get("latest")
        said = latest.get("raw", "") if isinstance(latest, dict) else ""
        what = said or ", ".join(str(value) for value in event.data.values())
        rows.append((event.type, tag("span", str(what)), event.author, when(event.date)))
    kind = "Pull request" if discussion.is_pull_request else "Discussion"
    ref = f"refs/pr/{discussion.num}"
    files = Html()
    if discussion.is_pull_request:
        files = tag("p", tag("a", f"files of {ref}", href=_path(repo, "tree", ref)))
    return _page(
        discussion.title,
        tag("p", f"{kind} #{discussion.num} of ", link(repo, repo.id)),
        tag("p", tag("span", discussion.status, class_="chip")),
        files,
        _table(("", "", "by", ""), rows),
    )


def refused_page(message: str) -> Html:
    """Return the page for an error."""
    return _page("Hub on loopback", tag("p", message), tag("p", tag("a", "all repos", href="/")))


def link(repo: Repo, text: str) -> Html:
    """Return a link to a repo."""
    return tag("a", text, href=_path(repo))


def size(files: Mapping[str, File]) -> str:
    """Return number and bytes of files for people."""
    return f"{len(files)} files, {units.format_bytes(sum(f.size for f in files.values()))}"


def when(date: str) -> Html:
    """Return a date as HTML."""
    return tag("span", date[:19].replace("T", " "), class_="dim")


def _refs(repo: Repo) -> list[tuple[str, ...]]:
    named = [(f"refs/heads/{name}", name, oid) for name, oid in repo.branches.items()]
    named += [(f"refs/tags/{name}", name, item.commit) for name, item in repo.tags.items()]
    named += [(f"refs/pr/{number}",) * 2 + (oid,) for number, oid in repo.pulls.items()]
    return [
        (tag("a", ref, href=_path(repo, "tree", name)), tag("code", oid[:12]))
        for ref, name, oid in named
    ]


def _files(repo: Repo, commit: Commit) -> list[tuple[str, ...]]:
    return [
        (
            tag("a", path, href=f"{_path(repo, 'resolve', commit.oid)}/{quote(path)}"),
            units.format_bytes(file.size),
            ("Xet" if file.xet_hash else "LFS") if file.lfs else "git",
            tag("code", file.sha256[:16]),
        )
        for path, file in commit.files.items()
    ]


def _discussion(repo: Repo, discussion: Discussion) -> tuple[str, ...]:
    return (
        f"#{discussion.num}",
        tag("a", discussion.title, href=_path(repo, "discussions", str(discussion.num))),
        tag("span", discussion.status, class_="chip"),
        discussion.author,
        when(discussion.date),
    )


def _commit_link(repo: Repo, commit: Commit) -> Html:
    return tag("a", tag("code", commit.oid[:12]), href=_path(repo, "commit", commit.oid))


def _path(repo: Repo, *parts: str) -> str:
    return "/" + quote(repo.url_path) + "".join("/" + quote(part, safe="") for part in parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    lines = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    if not lines:
        return tag("p", "none", class_="dim")
    return tag("table", tag("tr", *(tag("th", cell) for cell in head)), *lines)


def _page(title: str, *content: Html) -> Html:
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        tag("title", title),
        Html(f"<style>{_STYLE}</style>"),
    )
    body = tag("body", tag("p", tag("a", "Hub on loopback", href="/")), tag("h1", title), *content)
    return Html(f"<!doctype html>{tag('html', head, body, lang='en')}")
