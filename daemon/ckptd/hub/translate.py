"""Foreign exceptions become ours, once, here.

The client raises three families: `HfHubHTTPError` and its children (an answer with a status),
`httpx2.TransportError` (no answer), and from hf_xet plain builtins; upload failures come wrapped in
a bare RuntimeError whose `__cause__` is the real one. Each becomes the member of `HubError` that
says whose fault it is and whether a second try can help.

Statuses decide, never texts, with three exceptions that nobody offers a code for: the refusal of a
commit whose uploaded files the Hub no longer has (`is_lost_upload`), a 403 that means a quota, and
the library's ValueErrors about an answer, which are the Hub's fault where others are ours.
Messages are built from what the server said, never from the client's own text: that one carries
signed storage URLs.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Final

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._http import parse_ratelimit_headers

from ckptd import errors
from ckptd.telemetry import logs

TRANSIENT: Final = frozenset({408, 423, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses after which the same request may pass."""
LONGEST_SERVER_TEXT_CHARS = 300
LONGEST_ASKED_S = 10.0 * 365 * 86_400
"""A longer wait is nonsense, or a date beyond the calendar; it is cut long before in any case."""

_FULL: Final = frozenset({402, 507})
_CORRUPT: Final = frozenset({400, 404, 409, 412, 422})
"""What storage says of bytes that are not those announced, and the Hub of an upload that is not there."""
_QUOTA = re.compile(
    r"quota|storage (space|limit)|(limit|space)\b.*\bstorage|out of (space|storage)|storage is full"
    r"|exceed|upgrade your|billing",
    re.IGNORECASE,
)
_LOST = re.compile(
    r"LFS pointer|LFS object|(missing|unknown|no such) (lfs )?(object|file)|file that does not exist",
    re.IGNORECASE,
)
_FORM = re.compile(
    r"malformed|improperly formatted|invalid server response|invalid etag", re.IGNORECASE
)
_VERIFY = re.compile(r"/(lfs-)?verify$")
_SECRET = re.compile(r"hf_[A-Za-z0-9_]{6,}|(?i:bearer)\s+\S+")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]+")
_LOGIN = (
    "put a token with write access where the old one is (HF_TOKEN_PATH, or `hf auth login`), or set "
    "HF_TOKEN; {keep}"
)
_FULL_HINT = (
    "the account's storage or plan is used up: free some on the Hub (squashing history gives it back "
    "late), make the repo public, or extend the plan; the push goes on by itself then"
)
_KEEP = "the push goes on from where it stands once the token is good"


@contextlib.contextmanager
def translated(what: str, *, repo_id: str | None = None) -> Iterator[None]:
    """Run a client call; whatever it raises leaves as an `errors.HubError` that says `what` failed.

    Raises:
        errors.HubError: the family member for the status or the transport failure.
    """
    try:
        yield
    except errors.CkptdError:
        raise
    except Exception as exc:
        ours = _translate(exc, what, repo_id)
        if ours is None:
            raise
        raise ours from exc


def no_token(what: str) -> errors.HubUnauthorized:
    """Return the failure of a call that needs a token where there is none."""
    return errors.HubUnauthorized(f"{what}: there is no token", hint=_LOGIN.format(keep=_KEEP))


def is_lost_upload(error: errors.HubError) -> bool:
    """Say whether a commit was refused because the Hub no longer has an uploaded file.

    The Hub collects large files that no commit refers to after some hours and answers 400 "LFS
    pointer pointed to a file that does not exist"; there is no error code for it.
    """
    return (
        isinstance(error, errors.HubRejected)
        and error.status in (400, 422)
        and _LOST.search(error.message) is not None
    )


def is_xet_failure(error: errors.HubError) -> bool:
    """Say whether an upload failed inside hf_xet, whose failures are builtins without a status."""
    cause = error.__cause__
    return (
        isinstance(cause, (ConnectionError, TimeoutError, PermissionError))
        or (type(cause) is RuntimeError and cause.__cause__ is None)
    ) and not isinstance(cause, (HfHubHTTPError, OfflineModeIsEnabled))


def is_corrupt_transfer(error: errors.HubError) -> bool:
    """Say whether what arrived is not what was sent, by the word of whoever received it."""
    cause = _innermost(error.__cause__) if error.__cause__ is not None else None
    return (
        isinstance(cause, HfHubHTTPError)
        and cause.response.status_code in _CORRUPT
        and (_is_storage(cause.response) or _is_verify(cause.response))
    )


def asked_wait_s(
    headers: Mapping[str, str], *, now: datetime.datetime | None = None
) -> float | None:
    """Return the seconds an answer asks to wait: `RateLimit` when used up, else `Retry-After`.

    Both forms of Retry-After count: seconds, and an HTTP date (RFC 9110, 10.2.3), which is taken
    against the answer's own `Date` where it has one, so that no clock need be right. So do the
    older `RateLimit-Remaining` and `RateLimit-Reset`.
    """
    given = {key.lower(): headers[key].strip() for key in headers}
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(float(limit.reset_in_seconds), LONGEST_ASKED_S)
    if given.get("ratelimit-remaining") == "0":
        reset_s = _seconds(given.get("ratelimit-reset", ""))
        if reset_s is not None:
            return reset_s
    value = given.get("retry-after", "")
    asked_s = _seconds(value)
    if asked_s is not None:
        return asked_s
    then = _date(value)
    if then is None:
        return None
    since = now or _date(given.get("date", "")) or datetime.datetime.now(datetime.UTC)
    return min(max(0.0, (then - since).total_seconds()), LONGEST_ASKED_S)


def _seconds(text: str) -> float | None:
    """Return a plain number of seconds, None for anything else."""
    if not re.fullmatch(r"[0-9]{1,300}(\.[0-9]{1,9})?", text):
        return None
    return min(float(text), LONGEST_ASKED_S)


def _date(text: str) -> datetime.datetime | None:
    """Return an HTTP date, None for anything else; one without a zone is in UTC."""
    try:
        found = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=datetime.UTC)


def _translate(exc: BaseException, what: str, repo_id: str | None) -> errors.HubError | None:
    """Return our error for theirs, or None for one that is of no known family."""
    real = _innermost(exc)
    if isinstance(real, errors.HubError):
        return real
    if isinstance(real, HfHubHTTPError):
        return _from_status(real, what, repo_id)
    if isinstance(real, LocalTokenNotFoundError):
        hint = _LOGIN.format(keep=_KEEP)
        return errors.HubUnauthorized(f"{what}: there is no token", repo_id=repo_id, hint=hint)
    if isinstance(real, OfflineModeIsEnabled):
        hint = "unset HF_HUB_OFFLINE"
        text = f"{what}: HF_HUB_OFFLINE forbids the network"
        return errors.HubRejected(text, repo_id=repo_id, hint=hint)
    if isinstance(real, json.JSONDecodeError):
        hint = "is HF_ENDPOINT a Hub, or a proxy's login page?"
        return errors.HubUnavailable(f"{what}: not a JSON answer", repo_id=repo_id, hint=hint)
    if isinstance(real, httpx2.HTTPError):
        return _unreachable(real, what, repo_id)
    if isinstance(real, PermissionError) and type(real).__module__.startswith("hf_xet"):
        text = f"{what}: the Xet storage refused the upload token: {_clean(str(real))}"
        return errors.HubUnavailable(text, repo_id=repo_id, hint="a new try fetches a new one")
    if isinstance(real, (ConnectionError, TimeoutError, RuntimeError)):
        return _unreachable(real, what, repo_id)
    if isinstance(real, (LookupError, TypeError, AttributeError)) or (
        isinstance(real, ValueError) and _FORM.search(str(real))
    ):
        text = f"{what}: an answer of another form ({type(real).__name__}: {_clean(str(real))})"
        hint = "is HF_ENDPOINT a Hub that huggingface_hub can speak to?"
        return errors.HubUnavailable(text, repo_id=repo_id, hint=hint)
    if isinstance(real, ValueError):
        return errors.HubRejected(f"{what}: {_clean(str(real))}", repo_id=repo_id)
    return None


def _innermost(exc: BaseException) -> BaseException:
    """Return the failure that the client wrapped in bare RuntimeErrors."""
    while type(exc) is RuntimeError and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def _from_status(exc: HfHubHTTPError, what: str, repo_id: str | None) -> errors.HubError:
    """Return our error for an answer with an error status."""
    status = exc.response.status_code
    if status == 401 and exc.response.headers.get("X-Error-Code") == "RepoNotFound":
        status = 404  # the Hub's way to hide what is there from whom it does not let see it
    said = _clean(exc.server_message or "")
    text = f"{what}: {said}" if said else what
    kind, hint = _kind(status, stored=_is_storage(exc.response))
    if kind is errors.HubForbidden and _QUOTA.search(said):
        kind, hint = errors.HubFull, _FULL_HINT
    return kind(
        text,
        repo_id=repo_id,
        status=exc.response.status_code,
        request_id=exc.request_id,
        retry_after_s=asked_wait_s(exc.response.headers) if status in TRANSIENT else None,
        hint=hint,
    )


def _kind(status: int, *, stored: bool) -> tuple[type[errors.HubError], str]:
    """Return the class of an error status, and what to do next."""
    if status in _FULL:
        return errors.HubFull, _FULL_HINT
    if status in TRANSIENT or status >= 500:
        return errors.HubUnavailable, "temporary: run it again later (the daemon does so by itself)"
    if status < 400:
        return errors.HubUnavailable, "is HF_ENDPOINT a Hub? it redirects to nowhere"
    if stored and status in (401, 403, 404, 405, 410):
        return errors.HubUnavailable, "the upload link has expired; a new try gets a fresh one"
    if stored:
        return errors.HubRejected, "the bytes that arrived are not those that were announced"
    if status == 401:
        return errors.HubUnauthorized, _LOGIN.format(keep=_KEEP)
    if status == 403:
        return errors.HubForbidden, (
            "give the token write access to this repo (or its organisation) on the Hub; " + _KEEP
        )
    if status == 404:
        return (
            errors.HubNotFound,
            "check repo_id and revision, and that this token may see the repo",
        )
    if status in (409, 412):
        return (
            errors.HubConflict,
            "somebody else changed it meanwhile: run it again (the daemon does so by itself)",
        )
    return errors.HubRejected, "the Hub will not take this as it is"


def _is_storage(response: httpx2.Response) -> bool:
    """Say whether the answer came from an upload link, not from the Hub's own routes.

    Links carry their own signature: PUT of content, and the POST without a token that completes a
    multipart upload.
    """
    request = response.request
    return request.method == "PUT" or (
        request.method == "POST"
        and "authorization" not in request.headers
        and bool(request.url.query)
    )


def _is_verify(response: httpx2.Response) -> bool:
    """Say whether the Hub was asked to confirm that an upload has arrived."""
    request = response.request
    return request.method == "POST" and _VERIFY.search(request.url.path) is not None


def _unreachable(exc: BaseException, what: str, repo_id: str | None) -> errors.HubError:
    name = type(exc).__name__
    said = _clean(str(exc)) or name
    return errors.HubUnavailable(
        f"{what}: no answer ({name}: {said})" if said != name else f"{what}: no answer ({name})",
        repo_id=repo_id,
        hint="check the network and HF_ENDPOINT, then run it again (the daemon does so by itself)",
    )


def clean_record(record: logging.LogRecord) -> bool:
    """Take tokens and signatures out of a log line of the library; a filter that keeps every line."""
    record.msg, record.args = _clean(record.getMessage()), ()
    return True


def _clean(text: str) -> str:
    """Return one line of bounded length without tokens or signed URLs."""
    line = logs.without_secrets(" ".join(text.split()))
    line = _QUERY.sub(r"\1", _SECRET.sub("***", line))
    if len(line) > LONGEST_SERVER_TEXT_CHARS:
        return line[: LONGEST_SERVER_TEXT_CHARS - 1] + "…"
    return line
