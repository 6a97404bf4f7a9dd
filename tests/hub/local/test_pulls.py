"""Discussions and pull requests, with the real client."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from ckptd.hub.local import server
from ckptd.hub.local.options import Choices


def test_a_pull_request_goes_from_draft_to_merged(api: HfApi, repo: str, add):
    """Draft, commit to refs/pr/1 with parent check, open, merge: main then has the files."""
    base = api.repo_info(repo).sha
    pull = api.create_pull_request(repo, title="step 10", description="push-id")
    assert (pull.num, pull.status, pull.git_reference) == (1, "draft", "refs/pr/1")
    oid = api.create_commit(
        repo, [add("m.bin", b"\0")], commit_message="m", revision="refs/pr/1", parent_commit=base
    ).oid
    assert not api.file_exists(repo, "m.bin")
    api.change_discussion_status(repo, 1, "open", comment="ready")
    api.merge_pull_request(repo, 1)
    done = api.get_discussion_details(repo, 1)
    assert done.status == "merged"
    assert done.merge_commit_oid == api.repo_info(repo).sha
    assert [event.type for event in done.events] == [
        "comment",
        "commit",
        "comment",
        "status-change",
        "status-change",
    ]
    assert done.events[1].oid == oid
    assert api.file_exists(repo, "m.bin")
    assert api.list_repo_commits(repo)[0].title == "step 10 (#1)"


def test_a_commit_can_open_its_own_pull_request(api: HfApi, repo: str, add):
    """create_commit(create_pr=True) answers with the URL of an open pull request."""
    made = api.create_commit(repo, [add("a.json")], commit_message="add a", create_pr=True)
    assert made.pr_num == 1
    assert made.pr_revision == "refs/pr/1"
    assert api.get_discussion_details(repo, 1).status == "open"
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", made.oid)]


def test_merging_joins_changes_of_both_sides(api: HfApi, repo: str, add):
    """main moved on: the merge keeps its files, takes the pull request's, and its deletions."""
    api.create_commit(repo, [add("old.json"), add("kept.json")], commit_message="a")
    api.create_commit(
        repo,
        [CommitOperationDelete("old.json"), add("new.json")],
        commit_message="pr",
        create_pr=True,
    )
    api.create_commit(repo, [add("main.json")], commit_message="b")
    api.merge_pull_request(repo, 1)
    assert set(api.list_repo_files(repo)) == {
        ".gitattributes",
        "kept.json",
        "main.json",
        "new.json",
    }


def test_a_conflict_is_named_and_nothing_merges(api: HfApi, repo: str, add):
    """The same path changed on both sides: 409, listed in filesWithConflicts, main untouched."""
    api.create_commit(repo, [add("a.json", b"1")], commit_message="pr", create_pr=True)
    head = api.create_commit(repo, [add("a.json", b"2")], commit_message="main").oid
    with pytest.raises(HfHubHTTPError) as caught:
        api.merge_pull_request(repo, 1)
    assert caught.value.response.status_code == 409
    assert api.get_discussion_details(repo, 1).conflicting_files == ["a.json"]
    assert api.repo_info(repo).sha == head


def test_a_closed_pull_request_takes_no_commits(api: HfApi, repo: str, add):
    """After closing, a commit to its ref gets 403, until it is open again."""
    api.create_pull_request(repo, title="closed")
    api.change_discussion_status(repo, 1, "closed")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(repo, [add("a.json")], commit_message="a", revision="refs/pr/1")
    assert caught.value.response.status_code == 403
    api.change_discussion_status(repo, 1, "open")
    api.create_commit(repo, [add("a.json")], commit_message="a", revision="refs/pr/1")


def test_a_draft_is_not_merged(api: HfApi, repo: str):
    """Merging a draft is refused."""
    api.create_pull_request(repo, title="draft")
    with pytest.raises(HfHubHTTPError) as caught:
        api.merge_pull_request(repo, 1)
    assert caught.value.response.status_code == 400


def test_discussions_are_listed_by_type_and_status(tmp_path: Path, hub_tokens):
    """get_repo_discussions filters, newest first, over several pages."""
    choices = Choices(discussions_page=2)
    with server.running(root=tmp_path / "h", tokens=hub_tokens, choices=choices) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("acme/run")
        api.create_discussion("acme/run", title="a question")
        for number in range(3):
            api.create_pull_request("acme/run", title=f"pull {number}")
        api.change_discussion_status("acme/run", 2, "closed")
        pulls = api.get_repo_discussions("acme/run", discussion_type="pull_request")
        closed = api.get_repo_discussions("acme/run", discussion_status="closed")
        assert [pull.num for pull in pulls] == [4, 3, 2]
        assert [item.num for item in closed] == [2]
        assert len(list(api.get_repo_discussions("acme/run"))) == 4


def test_comments_and_titles(api: HfApi, repo: str):
    """comment_discussion and rename_discussion stand in the events."""
    api.create_discussion(repo, title="a question", description="why?")
    said = api.comment_discussion(repo, 1, "because <b>")
    api.rename_discussion(repo, 1, "an answer")
    details = api.get_discussion_details(repo, 1)
    assert said.content == "because <b>"
    assert "&lt;b&gt;" in said.rendered
    assert (details.title, len(details.events)) == ("an answer", 3)
