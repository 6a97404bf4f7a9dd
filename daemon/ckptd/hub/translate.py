"""Foreign exceptions become ours, once, here.

The client raises three families: `HfHubHTTPError` and its children (an answer with a status),
`httpx2.TransportError` (no answer), and from hf_xet plain builtins; upload failures come wrapped in
a bare RuntimeError whose `__cause__` is the real one. Each becomes the member of `HubError` that
says whose fault it is and whether a second try can help.

Statuses decide, never texts, with one exception that the Hub offers no code for: the refusal of a
commit whose uploaded files it no longer has (`is_lost_upload`). Messages are built from what the
server said, never from the client's own text: that one carries signed storage URLs.
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

TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses after which the same request may pass."""
LONGEST_SERVER_TEXT_CHARS = 300

_SECRET = re.compile(r"hf_[A-Za-z0-9_]{6,}|(?i:bearer)\s+\S+")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]+")
_LOGIN = "set HF_TOKEN (or log in with `hf auth login`) to a token with write access; {keep}"
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


def is_lost_upload(error: errors.HubError) -> bool:
    """Say whether a commit was refused because the Hub no longer has an uploaded file.

    The Hub collects large files that no commit refers to after some hours and answers 400 "LFS
    pointer pointed to a file that does not exist"; there is no error code for it.
    """
    return error.status == 400 and "LFS pointer" in error.message


def is_xet_failure(error: errors.HubError) -> bool:
    """Say whether an upload failed inside hf_xet, whose failures are builtins without a status."""
    cause = error.__cause__
    return (
        isinstance(cause, (ConnectionError, TimeoutError, PermissionError))
        or (type(cause) is RuntimeError and cause.__cause__ is None)
    ) and not isinstance(cause, (HfHubHTTPError, OfflineModeIsEnabled))


def asked_wait_s(
    headers: Mapping[str, str], *, now: datetime.datetime | None = None
) -> float | None:
    """Return the seconds an answer asks to wait: `RateLimit` when used up, else `Retry-After`.

    Both forms of Retry-After count: seconds, and an HTTP date (RFC 9110, 10.2.3).
    """
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = next((headers[key] for key in headers if key.lower() == "retry-after"), "").strip()
    if value.isdigit():
        return float(value)
    if not value:
        return None
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    now = now if now is not None else datetime.datetime.now(datetime.UTC)
    return max(0.0, (then - now).total_seconds())


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
    said = _clean(exc.server_message or "")
    text = f"{what}: {said}" if said else what
    kind, hint = _kind(status, stored=_is_storage(exc.response))
    return kind(
        text,
        repo_id=repo_id,
        status=status,
        request_id=exc.request_id,
        retry_after_s=asked_wait_s(exc.response.headers) if status in TRANSIENT else None,
        hint=hint,
    )


def _kind(status: int, *, stored: bool) -> tuple[type[errors.HubError], str]:
    """Return the class of an error status, and what to do next."""
    if status in TRANSIENT or status >= 500:
        return errors.HubUnavailable, "temporary: run it again later (the daemon does so by itself)"
    if stored and status in (401, 403, 404, 410):
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
    if status == 402:
        return errors.HubRejected, "the account's plan or quota does not allow it"
    return errors.HubRejected, "the Hub will not take this as it is"


def _is_storage(response: httpx2.Response) -> bool:
    """Say whether the answer came from an upload link (PUT), not from the Hub's own routes."""
    return response.request.method == "PUT"


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
    line = _QUERY.sub(r"\1", _SECRET.sub("***", " ".join(text.split())))
    if len(line) > LONGEST_SERVER_TEXT_CHARS:
        return line[: LONGEST_SERVER_TEXT_CHARS - 1] + "…"
    return line
