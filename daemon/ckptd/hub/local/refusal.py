"""The Hub's ways to say no, as it says them: a status, the client's error code, a sentence.

`Refused` is an answer for the other side, not a failure of ckptd, so it is not part of
`ckptd.errors`. The client recognises an error by the `X-Error-Code` header, never by the text.
"""

from __future__ import annotations


class Refused(Exception):
    """A request that gets an error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        extra: dict[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}
        self.extra = extra or {}
        """More keys of the JSON body."""


def bad_request(message: str) -> Refused:
    """400: the request makes no sense."""
    return Refused(400, message)


def bad_token() -> Refused:
    """401: a token that the Hub does not know; the client tells it apart by this very text."""
    return Refused(401, "Invalid credentials in Authorization header")


def login_needed() -> Refused:
    """401: nobody is logged in, and this needs somebody."""
    return Refused(401, "Invalid username or password.")


def forbidden(message: str) -> Refused:
    """403: the token is good but may not do this."""
    return Refused(403, message)


def no_repo(*, anonymous: bool) -> Refused:
    """404 (401 to the anonymous): no such repo, or hidden from this token; the same either way."""
    status = 401 if anonymous else 404
    return Refused(status, "Repository not found", code="RepoNotFound")


def no_revision(revision: str) -> Refused:
    """404: no branch, tag or commit of that name."""
    return Refused(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


def no_entry(message: str, *, commit: str | None = None) -> Refused:
    """404: the revision has no such file or folder."""
    headers = {"X-Repo-Commit": commit} if commit else {}
    return Refused(404, message, code="EntryNotFound", headers=headers)


def taken(message: str, **extra: object) -> Refused:
    """409: the name is in use."""
    return Refused(409, message, extra=extra)


def stale() -> Refused:
    """412: the branch is not where the client thought it was."""
    return Refused(
        412,
        "The branch was updated since you opened this page. Please refresh and try again.",
    )
