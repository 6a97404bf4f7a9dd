"""Commits and refs, with the real client."""

from __future__ import annotations

import json

import httpx2
import pytest
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)

from ckptd.hub.local import store


def files(api: HfApi, repo: str, revision: str = "main") -> set[str]:
    return set(api.list_repo_files(repo, revision=revision)) - {".gitattributes"}


def status(caught: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return caught.value.response.status_code


def test_a_commit_holds_regular_and_lfs_files(api: HfApi, repo: str, add):
    """One create_commit brings small text and weights, and the tree tells their sha256 and size."""
    made = api.create_commit(
        repo,
        [add("config.json", b"{}"), add("a/model.safetensors", b"\1" * 4000)],
        commit_message="title",
        commit_description="body",
    )
    tree = {item.path: item for item in api.list_repo_tree(repo, recursive=True)}
    top = api.list_repo_commits(repo)[0]
    assert tree["config.json"].lfs is None
    assert tree["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert tree["a/model.safetensors"].lfs.size == 4000
    assert tree["a"].path == "a"
    assert (top.commit_id, top.title, top.message) == (made.oid, "title", "body")
    assert top.authors == ["ckptd"]


def test_a_long_history_is_told_whole(api: HfApi, repo: str, add):
    """More commits than are kept in memory and than fit a page, newest first; a new repo has none."""
    titles = [str(number) for number in range(store.CACHED_COMMITS + 10)]
    for title in titles:
        api.create_commit(repo, [add("a.json", title.encode())], commit_message=title)
    for _ in range(2):
        listed = api.list_repo_commits(repo)
        assert [commit.title for commit in listed] == [*reversed(titles), "initial commit"]
    api.delete_repo(repo)
    api.create_repo(repo)
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["initial commit"]


def test_a_stale_parent_is_refused_and_changes_nothing(api: HfApi, repo: str, add):
    """With parent_commit set, a commit after a foreign one gets 412."""
    head = api.repo_info(repo).sha
    api.create_commit(repo, [add("a.json")], commit_message="a", parent_commit=head)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(repo, [add("b.json")], commit_message="b", parent_commit=head)
    assert status(caught) == 412
    assert files(api, repo) == {"a.json"}


def test_deletions_take_files_and_folders(api: HfApi, repo: str, add):
    """deletedFile, deletedFolder and additions of one commit land together; additions win."""
    api.create_commit(
        repo, [add("old.bin", b"\0"), add("d/x.json"), add("d/e/y.json")], commit_message="a"
    )
    api.create_commit(
        repo,
        [CommitOperationDelete("old.bin"), CommitOperationDelete("d/"), add("d/new.json")],
        commit_message="b",
    )
    assert files(api, repo) == {"d/new.json"}


def test_deleting_what_is_not_there_refuses_the_whole_commit(api: HfApi, repo: str, add):
    """A commit with one impossible deletion leaves the branch where it was."""
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(
            repo, [add("a.json"), CommitOperationDelete("nope.bin")], commit_message="x"
        )
    assert files(api, repo) == set()


def test_unchanged_files_are_recognised(api: HfApi, repo: str, add):
    """The same content again is no commit: preupload tells the client what the paths hold."""
    first = api.create_commit(repo, [add("a.json"), add("b.bin", b"\0")], commit_message="a")
    again = api.create_commit(repo, [add("a.json"), add("b.bin", b"\0")], commit_message="b")
    assert again.oid == first.oid


def test_a_copy_needs_no_upload(api: HfApi, hub, repo: str, add):
    """CommitOperationCopy puts LFS content under another path without sending it again."""
    api.create_commit(repo, [add("a.bin", b"\0abc")], commit_message="a")
    hub.ledger.clear()
    api.create_commit(repo, [CommitOperationCopy("a.bin", "b.bin")], commit_message="b")
    assert files(api, repo) == {"a.bin", "b.bin"}
    assert not hub.ledger.find("PUT")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "a//b", ".git/config", "a\0b", ""])
def test_paths_that_leave_the_repo_are_refused(hub, repo: str, path: str):
    """The server itself refuses hostile paths, the client's own check aside."""
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}},
    ]
    answer = httpx2.post(
        f"{hub.url}/api/models/{repo}/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400
    assert "path" in answer.json()["error"].lower()


def test_a_file_cannot_be_a_folder_too(api: HfApi, repo: str, add):
    """A path below a file, or a file where a folder is, is refused."""
    api.create_commit(repo, [add("a", b"text"), add("d/x", b"text")], commit_message="a")
    for path in ("a/b", "d"):
        with pytest.raises(BadRequestError):
            api.create_commit(repo, [add(path, b"text")], commit_message="b")


def test_a_pointer_to_content_that_never_came_is_refused(hub, repo: str):
    """An lfsFile without content gets the public Hub's 400."""
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "a.bin", "oid": "0" * 64, "size": 1}},
    ]
    body = "\n".join(map(json.dumps, lines))
    answer = httpx2.post(
        f"{hub.url}/api/models/{repo}/commit/main",
        content=body,
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400
    assert "LFS pointer pointed to a file that does not exist" in answer.json()["error"]


@pytest.mark.parametrize("body", ["", "not json", '{"key":"file","value":{}}', '{"key":"header"}'])
def test_a_malformed_commit_gets_400(hub, repo: str, body: str):
    """Whatever the body is, the answer is a readable refusal."""
    answer = httpx2.post(
        f"{hub.url}/api/models/{repo}/commit/main",
        content=body,
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_branches_start_where_asked_and_go(api: HfApi, repo: str, add):
    """create_branch at a commit, commit to it, delete it; main never moves and cannot go."""
    first = api.create_commit(repo, [add("a.json")], commit_message="a").oid
    main = api.create_commit(repo, [add("b.json")], commit_message="b").oid
    api.create_branch(repo, branch="runs/step-1", revision=first)
    api.create_commit(repo, [add("c.json")], commit_message="c", revision="runs/step-1")
    assert files(api, repo, "runs/step-1") == {"a.json", "c.json"}
    assert api.repo_info(repo).sha == main
    api.delete_branch(repo, branch="runs/step-1")
    with pytest.raises(HfHubHTTPError) as caught:
        api.delete_branch(repo, branch="main")
    assert status(caught) == 403
    assert [branch.name for branch in api.list_repo_refs(repo).branches] == ["main"]


def test_tags_are_fixed_names_for_commits(api: HfApi, repo: str, add):
    """create_tag on an oid, 409 when it exists, and reading through it."""
    oid = api.create_commit(repo, [add("a.json")], commit_message="a").oid
    api.create_commit(repo, [add("b.json")], commit_message="b")
    api.create_tag(repo, tag="step-1", revision=oid, tag_message="one")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_tag(repo, tag="step-1")
    api.create_tag(repo, tag="step-1", exist_ok=True)
    assert status(caught) == 409
    assert api.list_repo_refs(repo).tags[0].target_commit == oid
    assert files(api, repo, "step-1") == {"a.json"}
    api.delete_tag(repo, tag="step-1")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(repo, revision="step-1")


def test_an_existing_branch_is_a_conflict(api: HfApi, repo: str):
    """create_branch twice gives 409, unless allowed."""
    api.create_branch(repo, branch="x")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch(repo, branch="x")
    api.create_branch(repo, branch="x", exist_ok=True)
    assert status(caught) == 409


@pytest.mark.parametrize("call", ["repo_info", "list_repo_files", "list_repo_commits"])
def test_an_unknown_revision_says_so(api: HfApi, repo: str, call: str):
    """A revision that does not exist is RevisionNotFound wherever it is used."""
    with pytest.raises(RevisionNotFoundError):
        getattr(api, call)(repo, revision="nope")


def test_commit_to_a_missing_branch_is_refused(api: HfApi, repo: str, add):
    """A commit makes no branch."""
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(repo, [add("a.json")], commit_message="a", revision="nope")


def test_squash_keeps_files_and_drops_history(api: HfApi, repo: str, add):
    """super_squash_history leaves one commit with the same files."""
    for name in ("a.json", "b.bin"):
        api.create_commit(repo, [add(name, b"\0")], commit_message=name)
    api.super_squash_history(repo, commit_message="all")
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["all"]
    assert files(api, repo) == {"a.json", "b.bin"}


def test_a_broken_card_is_refused_before_anything_lands(api: HfApi, repo: str, add):
    """README.md with invalid metadata raises in the client; a good one loads as ModelCard."""
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit(repo, [add("README.md", b"---\ntags: {\n---\n")], commit_message="x")
    good = b"---\ntags:\n- ckptd\n---\n# run\n"
    api.create_commit(repo, [add("README.md", good)], commit_message="y")
    assert ModelCard.load(api.hf_hub_download(repo, "README.md")).data.tags == ["ckptd"]
