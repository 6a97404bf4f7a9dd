"""Making, finding, changing and removing repos, with the real client."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


def test_a_new_repo_is_found_by_every_way_of_asking(api: HfApi):
    """create_repo makes a repo with one commit, which repo_info, repo_exists and refs agree on."""
    url = api.create_repo("acme/run", private=True)
    info = api.repo_info("acme/run", files_metadata=True)
    assert (url.repo_id, url.repo_type) == ("acme/run", "model")
    assert info.private
    assert api.repo_exists("acme/run")
    assert [f.rfilename for f in info.siblings] == [".gitattributes"]
    assert api.list_repo_refs("acme/run").branches[0].target_commit == info.sha
    assert [model.id for model in api.list_models(author="acme")] == ["acme/run"]


def test_creating_a_repo_twice_is_a_conflict_unless_allowed(api: HfApi):
    """The second create_repo gives 409, and with exist_ok the URL of the repo."""
    first = api.create_repo("acme/run")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("acme/run")
    assert caught.value.response.status_code == 409
    assert api.create_repo("acme/run", exist_ok=True) == first


def test_a_repo_without_namespace_belongs_to_the_account(api: HfApi):
    """create_repo("run") makes it under the token's user."""
    assert api.create_repo("run").repo_id == "ckptd/run"


@pytest.mark.parametrize("repo_type", ["dataset", "space"])
def test_other_repo_types_live_beside_models(api: HfApi, repo_type: str, add):
    """The same name of another type is another repo, with its own files."""
    extra = {"space_sdk": "static"} if repo_type == "space" else {}
    api.create_repo("acme/run")
    url = api.create_repo("acme/run", repo_type=repo_type, **extra)
    api.create_commit("acme/run", [add("x.bin", b"\0")], commit_message="x", repo_type=repo_type)
    assert url.repo_type == repo_type
    assert api.file_exists("acme/run", "x.bin", repo_type=repo_type)
    assert not api.file_exists("acme/run", "x.bin")


def test_settings_change_what_others_see(hub, api: HfApi, repo: str):
    """A repo made private disappears for the anonymous and comes back when public again."""
    anonymous = HfApi(endpoint=hub.url, token=False)
    api.update_repo_settings(repo, private=True)
    with pytest.raises(RepositoryNotFoundError):
        anonymous.repo_info(repo)
    api.update_repo_settings(repo, private=False, gated="auto")
    assert anonymous.repo_info(repo).gated == "auto"


def test_deleting_a_repo_takes_everything(api: HfApi, repo: str):
    """After delete_repo it is not found, deleting again is an error, and the name is free."""
    old = api.repo_info(repo).sha
    api.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    api.delete_repo(repo, missing_ok=True)
    api.create_repo(repo)
    assert not api.revision_exists(repo, old)


def test_moving_a_repo_keeps_its_history(api: HfApi, repo: str, add):
    """move_repo gives the same commits another name; the old name and a taken one are refused."""
    oid = api.create_commit(repo, [add("a.json")], commit_message="a").oid
    api.create_repo("acme/taken")
    with pytest.raises(HfHubHTTPError) as caught:
        api.move_repo(repo, "acme/taken")
    api.move_repo(repo, "other/moved")
    assert caught.value.response.status_code == 409
    assert api.repo_info("other/moved").sha == oid
    assert api.repo_info("other/moved").id == "other/moved"
    assert not api.repo_exists(repo)


@pytest.mark.parametrize("name", ["acme/a--b", "acme/a..b", "api/x", "acme/x.git"])
def test_names_that_are_no_repo_are_refused(hub, name: str):
    """What cannot be a repo's name gets 400, whatever the client would have let through."""
    import httpx2

    namespace, _, short = name.partition("/")
    answer = httpx2.post(
        f"{hub.url}/api/repos/create",
        json={"organization": namespace, "name": short},
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400
    assert answer.headers["X-Error-Message"] == answer.json()["error"]


def test_the_card_reaches_repo_info(api: HfApi, repo: str, add):
    """Tags and library of README.md stand in repo_info."""
    card = b"---\ntags: [ckptd]\nlibrary_name: transformers\n---\n# run\n"
    api.create_commit(repo, [add("README.md", card)], commit_message="card")
    info = api.model_info(repo)
    assert (info.tags, info.library_name) == (["ckptd"], "transformers")
    assert info.card_data is not None
    assert info.card_data.tags == ["ckptd"]
