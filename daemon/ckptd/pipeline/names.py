"""What the Hub and git take as names: repos, branches and pull request refs, tags.

Pure checks, so that a name the Hub would refuse after hours of work is refused when the definition
is read. The rules for repos are the Hub's (96 characters, letters, digits, `-`, `_`, `.`), those for
refs are git's (`git help check-ref-format`).
"""

from __future__ import annotations

import re

_REPO_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.IGNORECASE)
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]*")
_REF_REFUSED = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")
MAX_REPO_CHARS = 96


def check_repo_id(repo_id: str) -> None:
    """Pass if `repo_id` is `owner/name` as the Hub takes it.

    Raises:
        ValueError: says which rule is broken.
    """
    owner, slash, name = repo_id.partition("/")
    if not slash or not owner or not name or "/" in name:
        raise ValueError(f"not a repo id: {repo_id!r} (write owner/name)")
    for part in (owner, name):
        if not _REPO_PART.fullmatch(part):
            raise ValueError(
                f"not a repo id: {repo_id!r} (letters, digits, '-', '_' and '.' only, "
                "and no '-' or '.' at either end)"
            )
    if "--" in repo_id or ".." in repo_id:
        raise ValueError(f"not a repo id: {repo_id!r} (the Hub takes neither '--' nor '..')")
    if len(repo_id) > MAX_REPO_CHARS:
        raise ValueError(f"repo id of {len(repo_id)} characters, the Hub takes {MAX_REPO_CHARS}")
    if name.endswith((".git", ".ipynb")):
        raise ValueError(f"not a repo id: {repo_id!r} (the name may not end in .git or .ipynb)")


def check_revision(revision: str) -> None:
    """Pass if commits can be pushed to `revision`: a branch name, or `refs/pr/N`.

    Raises:
        ValueError: says which rule is broken.
    """
    if is_pull_request(revision):
        return
    if revision.startswith("refs/"):
        raise ValueError(f"not a revision: {revision!r} (write a branch name or refs/pr/N)")
    if _COMMIT.fullmatch(revision):
        raise ValueError(f"{revision} is a commit: a push needs a branch name or refs/pr/N")
    _check_ref("revision", revision)


def check_git_tag(tag: str) -> None:
    """Pass if git takes `tag` as the name of a tag.

    Raises:
        ValueError: says which rule is broken.
    """
    if tag.startswith("refs/"):
        raise ValueError(f"not a tag: {tag!r} (write the name alone)")
    _check_ref("tag", tag)


def is_pull_request(revision: str | None) -> bool:
    """Return whether `revision` is the ref of a pull request, `refs/pr/N`."""
    return revision is not None and _PULL_REQUEST.fullmatch(revision) is not None


def _check_ref(kind: str, name: str) -> None:
    parts = name.split("/")
    broken = (
        "it is empty"
        if not name
        else "it holds a space, a control character or one of ~^:?*[\\"
        if _REF_REFUSED.search(name)
        else "it holds '..' or '@{'"
        if ".." in name or "@{" in name or name == "@"
        else "it begins with '-'"
        if name.startswith("-")
        else "it ends with '.'"
        if name.endswith(".")
        else "a part of it is empty"
        if not all(parts)
        else "a part of it begins with '.' or ends with '.lock'"
        if any(part.startswith(".") or part.endswith(".lock") for part in parts)
        else "it is HEAD"
        if name == "HEAD"
        else None
    )
    if broken:
        raise ValueError(f"not a {kind}: {name!r} ({broken})")
