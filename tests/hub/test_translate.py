"""Foreign exceptions become ours."""

from __future__ import annotations

import datetime
import json

import httpx2
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils._http import hf_raise_for_status

from ckptd import errors
from ckptd.hub import translate

URL = "https://hub.example/api/models/acme/run/commit/main"
SIGNED = "https://storage.example/bucket/oid?X-Amz-Signature=5ec2e7"


def answer(
    status: int, *, url: str = URL, method: str = "POST", text: str = "", **headers: str
) -> httpx2.Response:
    return httpx2.Response(
        status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        json={"error": text},
        request=httpx2.Request(method, url, headers={"authorization": "Bearer hf_secretsecret"}),
    )


def ours(exc: BaseException) -> errors.HubError:
    with (
        pytest.raises(errors.HubError) as caught,
        translate.translated("committing to main", repo_id="acme/run"),
    ):
        raise exc
    return caught.value


def refused(response: httpx2.Response) -> errors.HubError:
    with pytest.raises(httpx2.HTTPError) as caught:
        hf_raise_for_status(response)
    return ours(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.HubRejected),
        (401, errors.HubUnauthorized),
        (402, errors.HubFull),
        (403, errors.HubForbidden),
        (404, errors.HubNotFound),
        (408, errors.HubUnavailable),
        (409, errors.HubConflict),
        (412, errors.HubConflict),
        (413, errors.HubRejected),
        (422, errors.HubRejected),
        (429, errors.HubUnavailable),
        (500, errors.HubUnavailable),
        (502, errors.HubUnavailable),
        (504, errors.HubUnavailable),
        (507, errors.HubFull),
    ],
)
def test_a_status_has_one_class(status: int, kind: type[errors.HubError]) -> None:
    """Each status becomes one class, and the text says what was tried, where, and what is next."""
    error = refused(answer(status, text="the reason", X_Request_Id="r-1"))
    assert type(error) is kind
    assert error.status == status
    assert error.hint
    for part in ("acme/run", "committing to main", "the reason", "r-1"):
        assert part in str(error)


@pytest.mark.parametrize("code", ["RepoNotFound", "RevisionNotFound", "EntryNotFound"])
def test_absent_things_are_not_found(code: str) -> None:
    """Repo, revision and file alike: 404 with the Hub's error code."""
    assert type(refused(answer(404, X_Error_Code=code))) is errors.HubNotFound


def test_a_hidden_repo_is_not_found() -> None:
    """401 with the code of an absent repo is no bad token: the repo is made then."""
    assert type(refused(answer(401, X_Error_Code="RepoNotFound"))) is errors.HubNotFound


def test_an_upload_link_that_expired_is_no_lack_of_permission() -> None:
    """403 from storage passes with a fresh link; the signature never reaches the text."""
    error = refused(answer(403, url=SIGNED, method="PUT", text="expired"))
    assert type(error) is errors.HubUnavailable
    assert "5ec2e7" not in str(error)


def test_tokens_never_reach_the_text() -> None:
    """Even a server that echoes the token does not get it into a message."""
    error = refused(answer(400, text="bad header Bearer hf_secretsecret here"))
    assert "hf_secret" not in str(error)


def test_wrapped_failures_are_unwrapped() -> None:
    """An LFS upload failure arrives in a bare RuntimeError; its cause decides."""
    try:
        try:
            raise httpx2.WriteTimeout("slow")
        except httpx2.TransportError as exc:
            raise RuntimeError("Error while uploading 'x'") from exc
    except RuntimeError as exc:
        error = ours(exc)
    assert type(error) is errors.HubUnavailable
    assert not translate.is_xet_failure(error)


def test_signed_urls_lose_their_signature() -> None:
    """hf_xet puts the whole URL into its text; the query of a storage URL is a credential."""
    error = ours(RuntimeError(f"request to {SIGNED} failed"))
    assert "https://storage.example/bucket/oid failed" in str(error)


@pytest.mark.parametrize("exc", [ConnectionError("404"), TimeoutError("t"), RuntimeError("xorb")])
def test_xet_failures_are_builtins(exc: Exception) -> None:
    """What hf_xet raises is unavailable, and known to come from there."""
    error = ours(exc)
    assert type(error) is errors.HubUnavailable
    assert translate.is_xet_failure(error)


def test_no_token_is_unauthorized() -> None:
    """A missing token says how to get one."""
    error = ours(LocalTokenNotFoundError("no"))
    assert type(error) is errors.HubUnauthorized
    assert "HF_TOKEN" in str(error)


def test_a_page_instead_of_json_is_unavailable() -> None:
    """A proxy's login page is named as such."""
    assert type(ours(json.JSONDecodeError("x", "y", 0))) is errors.HubUnavailable


@pytest.mark.parametrize("exc", [KeyError("id"), TypeError("not a list"), IndexError("0")])
def test_an_answer_of_another_form_is_the_hubs(exc: Exception) -> None:
    """What a proxy or another server makes of an answer is not a fault of ckptd, and may pass."""
    error = ours(exc)
    assert type(error) is errors.HubUnavailable
    assert "an answer of another form" in str(error)


def test_the_unknown_stays_what_it_is() -> None:
    """A bug is not dressed as a Hub failure."""
    with pytest.raises(ZeroDivisionError), translate.translated("x"):
        raise ZeroDivisionError


NOW = datetime.datetime(2030, 1, 1, 12, 0, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "Tue, 01 Jan 2030 12:00:30 GMT"}, 30.0),
        ({"Retry-After": "Tue, 01 Jan 2030 11:00:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "7"}, 55.0),
        ({"RateLimit": '"api";r=3;t=55', "Retry-After": "7"}, 7.0),
        ({"RateLimit-Remaining": "0", "RateLimit-Reset": "40", "Retry-After": "7"}, 40.0),
        ({"RateLimit-Remaining": "2", "RateLimit-Reset": "40"}, None),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "²"}, None),
        ({"Retry-After": "9" * 400}, None),
        ({"Retry-After": "9" * 200}, translate.LONGEST_ASKED_S),
        ({"Retry-After": "Tue, 01 Jan 2030 12:00:30 -0000"}, 30.0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, translate.LONGEST_ASKED_S),
    ],
)
def test_the_asked_wait(headers: dict[str, str], expected_s: float | None) -> None:
    """RateLimit counts when it is used up; Retry-After in seconds or as a date."""
    assert translate.asked_wait_s(headers, now=NOW) == expected_s


def test_a_date_is_taken_against_the_clock_of_who_wrote_it() -> None:
    """A clock that is hours off, here or there, does not change the wait."""
    headers = {
        "Date": "Mon, 01 Jan 2001 00:00:00 GMT",
        "Retry-After": "Mon, 01 Jan 2001 00:00:09 GMT",
    }
    assert translate.asked_wait_s(headers) == 9


@pytest.mark.parametrize(
    "text",
    [
        "Private repository storage limit reached, please upgrade your plan",
        "You have exceeded your storage quota",
        "Out of storage",
    ],
)
def test_a_refusal_that_names_a_quota_waits_for_room(text: str) -> None:
    """403 means a permission, unless it says that there is no room: that is another thing to mend."""
    error = refused(answer(403, text=text))
    assert type(error) is errors.HubFull
    assert error.retry is errors.Retry.WAIT
    assert "storage or plan is used up" in str(error)


def test_only_temporary_answers_carry_a_wait() -> None:
    """A 429 hands its wait to whoever schedules the next try; a 400 has none."""
    assert refused(answer(429, Retry_After="9")).retry_after_s == 9
    assert refused(answer(400, Retry_After="9")).retry_after_s is None
