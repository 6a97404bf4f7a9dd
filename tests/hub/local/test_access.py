"""Who may do what: tokens, roles, namespaces, private repos."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ckptd.hub.local.accounts import Account

Login = Callable[[str | None], HfApi]


@pytest.fixture
def login(hub) -> Login:
    """Return the client of an account by its name; None is anonymous."""
    by_name = {account.name: token for token, account in hub.accounts.items()}

    def as_(name: str | None) -> HfApi:
        return HfApi(endpoint=hub.url, token=by_name[name] if name else False)

    return as_


def refusal(call: Callable[[], object]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def commit(api: HfApi, **options: object) -> object:
    ops = [CommitOperationAdd("a.json", b"{}")]
    return api.create_commit("acme/run", ops, commit_message="add a", **options)


def test_whoami_tells_account_and_role(login: Login):
    """whoami names the account; a token that only reads says so; no token is 401."""
    assert login("ckptd").whoami()["name"] == "ckptd"
    assert login("reader").whoami()["auth"]["accessToken"]["role"] == "read"
    assert refusal(lambda: HfApi(endpoint=login(None).endpoint, token="hf_wrong").whoami()) == 401


def test_a_wrong_token_is_401_even_for_what_is_public(login: Login, api: HfApi, repo: str):
    """An unknown token is told so, not that the repo is missing."""
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=api.endpoint, token="hf_wrong").repo_info(repo)
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)
    assert caught.value.server_message == "Invalid credentials in Authorization header"


@pytest.mark.parametrize(
    ("who", "status"), [(None, 401), ("reader", 403), ("stranger", 403), ("root", None)]
)
def test_writing_needs_role_and_membership(login: Login, repo: str, who: str | None, status):
    """Commit, branch, tag, settings and repo creation in acme: by role and namespace."""
    mine = login(who)
    for call in (
        lambda: commit(mine),
        lambda: mine.create_branch(repo, branch=f"b-{who}"),
        lambda: mine.create_tag(repo, tag=f"t-{who}"),
        lambda: mine.update_repo_settings(repo, private=False),
        lambda: mine.create_repo(f"acme/{who}"),
        lambda: mine.delete_repo(repo),
    ):
        if status is None:
            call()
        else:
            assert refusal(call) == status


def test_a_stranger_may_propose_but_not_merge(login: Login, repo: str):
    """A write token without membership may open a pull request, commit to its own, not merge."""
    stranger = login("stranger")
    made = commit(stranger, create_pr=True)
    ops = [CommitOperationAdd("b.bin", b"\0")]
    stranger.create_commit(repo, ops, commit_message="b", revision=made.pr_revision)
    assert refusal(lambda: stranger.merge_pull_request(repo, made.pr_num)) == 403
    assert refusal(lambda: commit(login("reader"), create_pr=True)) == 403


def test_a_stranger_may_not_touch_the_pull_request_of_another(login: Login, api: HfApi, repo: str):
    """Only its author and members commit to refs/pr/N."""
    api.create_pull_request(repo, title="mine")
    assert refusal(lambda: commit(login("stranger"), revision="refs/pr/1")) == 403


@pytest.mark.parametrize("who", [None, "stranger"])
def test_a_private_repo_does_not_exist_for_others(login: Login, api: HfApi, who: str | None):
    """Info, files, upload: each is RepositoryNotFound, as for a repo that never was."""
    api.create_repo("acme/run", private=True)
    other = login(who)
    for call in (
        lambda: other.repo_info("acme/run"),
        lambda: other.hf_hub_download("acme/run", ".gitattributes"),
        lambda: list(other.list_repo_tree("acme/run")),
        lambda: commit(other),
        lambda: other.repo_info("acme/never"),
    ):
        with pytest.raises(RepositoryNotFoundError) as caught:
            call()
        assert caught.value.response.status_code == (404 if who else 401)
    assert list(other.list_models()) == []
    assert login("reader").repo_info("acme/run").private


def test_namespaces_belong_to_members():
    """owns and may_write by name, organisation, wildcard and role."""
    member = Account(name="me", orgs=("acme",))
    assert member.may_write("me")
    assert member.may_write("acme")
    assert not member.may_write("other")
    assert not Account(name="me", role="read").may_write("me")
    assert Account(name="root", role="admin").may_write("other")
