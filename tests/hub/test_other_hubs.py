"""A push to Hubs that do it another way: redirects, absent fields, other words for the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ckptd import errors
from ckptd.hub import answers, dialect, translate
from ckptd.hub.local import server
from ckptd.hub.local.options import Choices
from tests.hub import other_hub
from tests.hub.other_hub import Answer, OtherHub, Redirect, to
from tests.hub.test_faults import REPO, TARGET, TITLE, Node
from tests.hub.test_faults import node as node

FULL = replace(TARGET, revision="step-100", git_tag="v100")
"""A push that makes every kind of request but those of pull requests."""


@pytest.fixture
def other(node: Node) -> Iterator[OtherHub]:
    """The node before another Hub, whose own is behind it."""
    with other_hub.running(node.hub.url) as found:
        node.options["endpoint"] = found.url
        yield found


def reform(change: Callable[[Any], Any]) -> Callable[[Answer], Answer]:
    """Return a change of the JSON value of an answer."""
    return lambda answer: answer.says(change(json.loads(answer.body)))


def only(*names: str) -> Callable[[Any], Any]:
    """Return a change that leaves nothing but these keys, of a mapping or of each in a list."""

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(one) for one in value]
        return {name: value[name] for name in names if name in value}

    return cut


def assert_landed(node: Node, revision: str = "main") -> None:
    """Assert that there is one commit of the push, with every byte."""
    assert node.titles(revision).count(TITLE) == 1
    assert node.whole(revision)


# Redirects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("reads_body", [True, False], ids=["read", "unread"])
async def test_an_upload_that_is_sent_elsewhere_arrives_there(
    node: Node, other: OtherHub, status: int, *, reads_body: bool
) -> None:
    """Whichever redirect a PUT meets, the whole file is sent to where it leads, and counted once."""
    other.redirect = Redirect("PUT", "^/lfs/", status, reads_body=reads_body)
    big = node.file("model.safetensors", b"big" + bytes(3_000_000))
    await node.push([big])
    assert_landed(node)
    assert other.count("PUT", "^/elsewhere/lfs/") == 1
    sent = [event.done_bytes or 0 for event in node.events if event.done_bytes is not None]
    assert max(sent, default=0) <= big.nbytes


async def test_an_upload_that_is_sent_to_another_host_arrives_there(
    node: Node, other: OtherHub
) -> None:
    """A redirect may name a host of its own; no token goes there."""
    with other_hub.running(node.hub.url) as storage:
        other.redirect = Redirect("PUT", "^/lfs/", 307, to=storage.url)
        await node.push()
    assert_landed(node)
    assert storage.count("PUT", "^/lfs/") == 2
    assert not any("authorization" in headers for _, _, headers in storage.seen)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize(
    "part",
    [
        "/repos/create",
        "/branch/",
        "/preupload/",
        "/objects/batch",
        "/lfs-verify",
        "/commit/",
        "/tag/",
        "/validate-yaml",
    ],
)
async def test_a_request_that_is_sent_elsewhere_is_made_there(
    node: Node, other: OtherHub, part: str, status: int
) -> None:
    """A POST stays a POST with its body, as it does at a Hub behind a front of another name."""
    other.redirect = Redirect("POST", part, status)
    await node.push(target=FULL)
    assert_landed(node, "step-100")
    assert node.waits == []


@pytest.mark.parametrize("status", [300, 302, 304, 307])
@pytest.mark.parametrize(("method", "part"), [("PUT", "^/lfs/"), ("POST", "/commit/")])
async def test_a_redirect_to_nowhere_is_no_success(
    node: Node, other: OtherHub, method: str, part: str, status: int
) -> None:
    """3xx without a place to go is not taken for an upload that arrived or a commit that was made."""
    other.redirect = Redirect(method, part, status, to="")
    with pytest.raises((errors.HubUnavailable, ExceptionGroup)) as caught:
        await node.push(attempts=2)
    assert "redirect" in str(_first(caught.value).hint)
    assert TITLE not in node.titles()


def _first(error: BaseException) -> errors.CkptdError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.CkptdError)
    return error


async def test_redirects_that_go_round_end(node: Node, other: OtherHub) -> None:
    """An upload that is sent from place to place for ever is given up as unavailable."""
    other.redirect = Redirect("PUT", "^/", 307, to="/round")
    with pytest.raises((errors.HubUnavailable, ExceptionGroup)) as caught:
        await node.push(attempts=1)
    assert isinstance(_first(caught.value), errors.HubUnavailable)


async def test_parts_that_are_sent_elsewhere_arrive_there(
    node: Node, tmp_path: Path, hub_tokens: Any
) -> None:
    """The same for the parts of a large file: each from where it begins, no byte more."""
    choices = Choices(multipart_over_bytes=1_000_000)
    with (
        server.running(root=tmp_path / "parts", tokens=hub_tokens, choices=choices) as node.hub,
        other_hub.running(node.hub.url) as found,
    ):
        node.options["endpoint"] = found.url
        found.redirect = Redirect("PUT", "^/lfs/", 307)
        await node.push([node.file("model.safetensors", bytes(range(256)) * 14_000)])
        assert_landed(node)
        assert found.count("PUT", "^/elsewhere/") == 4


# The LFS batch ----------------------------------------------------------------------------------


def _each(change: Callable[[Any], Any]) -> Callable[[Answer], Answer]:
    return reform(lambda value: value | {"objects": [change(one) for one in value["objects"]]})


def _actions(change: Callable[[Any], Any]) -> Callable[[Answer], Answer]:
    return _each(lambda one: one | {"actions": change(one["actions"])} if "actions" in one else one)


def _relative(action: Any) -> Any:
    return action | {"href": "/" + action["href"].split("/", 3)[3]}


@pytest.mark.parametrize(
    "change",
    [
        _each(lambda one: one | {"error": None}),
        _each(lambda one: one | {"oid": one["oid"].upper()}),
        _each(lambda one: one | {"oid": "sha256:" + one["oid"]}),
        _each(lambda one: {k: v for k, v in one.items() if k != "size"}),
        _each(lambda one: one | {"size": str(one["size"]), "authenticated": True, "x": [1]}),
        _actions(lambda found: {name: _relative(one) for name, one in found.items()}),
        _actions(lambda found: {name: one | {"header": None} for name, one in found.items()}),
        _actions(lambda found: {name: one | {"expires_in": 60} for name, one in found.items()}),
        _actions(lambda found: {"upload": found["upload"]}),
        _actions(lambda found: {"upload": found["upload"], "verify": None, "download": {}}),
        reform(lambda value: {"objects": [*value["objects"], {"oid": "0" * 64, "size": 1}]}),
        reform(lambda value: {"objects": value["objects"][::-1], "hash_algo": "sha256"}),
    ],
    ids=[
        "error null",
        "capitals",
        "prefix",
        "no size",
        "more fields",
        "relative links",
        "header null",
        "expires",
        "no verify",
        "verify null",
        "unasked",
        "no transfer",
    ],
)
async def test_a_batch_may_be_answered_in_other_words(
    node: Node, other: OtherHub, change: Callable[[Answer], Answer]
) -> None:
    """What a batch answer may leave out or say besides makes no difference to what arrives."""
    other.reword = to("POST", "/objects/batch", change)
    await node.push()
    assert node.waits == []
    assert_landed(node)


@pytest.mark.parametrize(
    "there",
    [{}, {"actions": None}, {"actions": {}}, {"actions": {"upload": None}}],
    ids=["none", "null", "empty", "upload null"],
)
async def test_what_the_hub_has_may_be_told_in_four_ways(
    node: Node, other: OtherHub, there: dict[str, Any]
) -> None:
    """Content without anything to do is there already: nothing is sent, and the commit has it."""
    files = node.files()
    publisher = node.publisher()
    await publisher.open()
    for file in files:
        await publisher.upload(file)
    puts = other.count("PUT", "")
    other.reword = to(
        "POST",
        "/objects/batch",
        _each(lambda one: {"oid": one["oid"], "size": one["size"]} | there),
    )
    await node.push(files)
    assert other.count("PUT", "") == puts == 2
    assert_landed(node)


async def test_a_batch_that_is_silent_about_a_file_is_asked_again(
    node: Node, other: OtherHub
) -> None:
    """A file that the answer leaves out is not taken for uploaded."""
    silent = reform(lambda value: value | {"objects": []})
    other.reword = to("POST", "/objects/batch", silent, times=1)
    await node.push()
    assert len(node.waits) == 1
    assert_landed(node)


@pytest.mark.parametrize(
    "change",
    [
        reform(lambda value: [value]),
        reform(lambda value: {"objects": {}}),
        reform(lambda value: {"message": "hello"}),
        _each(lambda one: {"id": one["oid"]}),
        _actions(lambda found: {"upload": {"header": {}}}),
        _actions(lambda found: {"upload": found["upload"] | {"header": {"chunk_size": "x"}}}),
        _actions(
            lambda found: {"upload": found["upload"] | {"header": {"chunk_size": 1, "1": "/"}}}
        ),
        lambda answer: answer.page(),
        lambda answer: replace(answer, status=204, body=b""),
    ],
)
async def test_a_batch_of_no_known_form_may_pass_next_time(
    node: Node, other: OtherHub, change: Callable[[Answer], Answer]
) -> None:
    """An answer that nobody can use is the Hub's fault, and asked for again; the push lands once."""
    other.reword = to("POST", "/objects/batch", change, times=1)
    await node.push()
    assert len(node.waits) == 1
    assert_landed(node)


# Fields and statuses ----------------------------------------------------------------------------


def _fields(method: str, part: str, *names: str) -> Any:
    return pytest.param(to(method, part, reform(only(*names))), id=f"{part}: {', '.join(names)}")


@pytest.mark.parametrize(
    "reword",
    [
        _fields("GET", "/whoami-v2", "name"),
        _fields("GET", "/api/models/acme/run$", "id"),
        _fields("GET", "/api/models/acme/run$", "modelId"),
        _fields("GET", "/api/models/acme/run$"),
        _fields("GET", "/revision/", "sha"),
        _fields("GET", "/revision/", "id"),
        _fields("GET", "/refs", "tags", "branches"),
        _fields("GET", "/commits/", "id", "message"),
        _fields("GET", "/commits/", "id", "title", "message"),
        _fields("POST", "/repos/create"),
        _fields("POST", "/commit/", "commitOid"),
        _fields("POST", "/commit/", "commitUrl"),
        _fields("POST", "/commit/"),
        pytest.param(
            to("GET", "/tree/", reform(lambda items: [
                only("path", "size", "oid", "lfs")(one)
                | ({"lfs": only("oid", "size")(one["lfs"])} if one.get("lfs") else {})
                for one in items if one["type"] == "file"
            ])),
            id="/tree/: no type, no pointerSize",
        ),
        pytest.param(
            to("GET", "/tree/", reform(lambda items: [
                one | ({"lfs": {"sha256": one["lfs"]["oid"]}} if one.get("lfs") else {"lfs": None})
                for one in items
            ])),
            id="/tree/: sha256",
        ),
        pytest.param(
            to("POST", "/preupload/", reform(lambda value: {
                "files": [only("path", "uploadMode")(one) for one in value["files"]]
            })),
            id="/preupload/: path, uploadMode",
        ),
        pytest.param(
            to("POST", "/commit/", reform(lambda value: value | {
                "commitUrl": "/acme/run/commit/" + value["commitOid"]
            })),
            id="/commit/: a relative link",
        ),
        pytest.param(
            to("POST", "/commit/", reform(lambda value: value | {"commitUrl": None})),
            id="/commit/: null",
        ),
    ],
)  # fmt: skip
async def test_optional_fields_may_be_absent(
    node: Node, other: OtherHub, reword: other_hub.Reword
) -> None:
    """What a push can do without, a Hub need not say: one commit, its tag on it, every byte."""
    other.reword = reword
    done = await node.push(target=FULL)
    assert node.tags() == {"v100": done.commit}
    assert_landed(node, "step-100")


DISCUSSION = ("num", "title", "status", "events")


@pytest.mark.parametrize(
    "reword",
    [
        to("GET", r"/discussions\?", reform(lambda value: {
            "discussions": [only("num", "title", "status")(one) for one in value["discussions"]]
        })),
        to("GET", r"/discussions/1", reform(only(*DISCUSSION))),
        to("GET", r"/discussions/1", reform(lambda value: value | {"author": None, "diff": None})),
        to("POST", r"/discussions$", reform(only("num"))),
        to("POST", r"/status$", reform(lambda value: {})),
        to("POST", r"/status$", lambda answer: replace(answer, status=204, body=b"")),
    ],
    ids=["list", "details", "no author", "made", "opened", "opened, empty"],
)  # fmt: skip
async def test_a_pull_request_may_be_told_of_in_few_words(
    node: Node, other: OtherHub, reword: other_hub.Reword
) -> None:
    """One pull request, open and whole, and a second life finds it, whatever is left out."""
    other.reword = reword
    wanted = replace(TARGET, create_pr=True)
    done = [await node.push(target=wanted) for _ in range(2)]
    assert [one.created for one in done] == [True, False]
    assert [(pr.num, pr.status) for pr in node.api.get_repo_discussions(REPO)] == [(1, "open")]
    assert_landed(node, "refs/pr/1")


@pytest.mark.parametrize("status", [201, 202])
@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("POST", "/repos/create"),
        ("POST", "/branch/"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/lfs-verify"),
        ("POST", "/commit/"),
        ("POST", "/tag/"),
        ("POST", "/validate-yaml"),
        ("GET", "/tree/"),
    ],
)
async def test_any_status_of_success_is_one(
    node: Node, other: OtherHub, method: str, part: str, status: int
) -> None:
    """201 and 202 with a body are as good as 200."""
    other.reword = to(method, part, lambda answer: replace(answer, status=status))
    done = await node.push(target=FULL)
    assert node.waits == []
    assert node.tags() == {"v100": done.commit}
    assert_landed(node, "step-100")


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("POST", "/repos/create"),
        ("POST", "/branch/"),
        ("PUT", "/lfs/"),
        ("POST", "/lfs-verify"),
        ("POST", "/commit/"),
        ("POST", "/tag/"),
        ("POST", "/validate-yaml"),
    ],
)
@pytest.mark.parametrize("status", [200, 204])
async def test_an_empty_answer_to_what_was_done_is_enough(
    node: Node, other: OtherHub, method: str, part: str, status: int
) -> None:
    """Nothing in the answer: what was done is looked up where it matters, and never done twice."""
    other.reword = to(method, part, lambda answer: replace(answer, status=status, body=b""))
    done = await node.push(target=FULL)
    assert node.tags() == {"v100": done.commit}
    assert_landed(node, "step-100")


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("GET", "/whoami-v2"),
        ("GET", "/api/models/acme/run$"),
        ("GET", "/revision/"),
        ("GET", "/refs"),
        ("GET", "/commits/"),
        ("GET", "/tree/"),
        ("POST", "/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("POST", "/commit/"),
    ],
)
@pytest.mark.parametrize("status", [200, 502, 503])
async def test_a_web_page_in_place_of_an_answer_passes(
    node: Node, other: OtherHub, method: str, part: str, status: int
) -> None:
    """A front's page, with whatever status, is no answer: asked again, done once."""
    other.reword = to(method, part, lambda answer: answer.page(status), times=2)
    done = await node.push(target=FULL)
    assert node.tags() == {"v100": done.commit}
    assert_landed(node, "step-100")


async def test_a_web_page_in_place_of_the_card_is_not_published(
    node: Node, other: OtherHub
) -> None:
    """A login page that comes with 200 for README.md is not merged and committed as the card."""
    node.api.create_repo(REPO)
    node.foreign(README__md=b"---\nlicense: mit\n---\nTheir words\n")
    other.reword = to("GET", "/resolve/", lambda answer: answer.page(), times=2)
    await node.push()
    url = f"{node.hub.url}/{REPO}/resolve/main/README.md"
    text = httpx2.get(url, headers={"authorization": f"Bearer {node.hub.token}"}).text
    assert text.endswith("Their words\n")
    assert "<html" not in text


@pytest.mark.parametrize("status", [404, 405, 410, 501])
async def test_a_hub_that_checks_no_cards_takes_them(
    node: Node, other: OtherHub, status: int
) -> None:
    """Without the route that checks a card, the card goes into the commit unchecked."""
    other.reword = to("POST", "/validate-yaml", lambda answer: answer.page(status))
    await node.push()
    assert node.waits == []
    assert_landed(node)


# Form of the answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        other_hub.zipped,
        other_hub.shouted,
        other_hub.whispered,
        lambda answer: replace(answer, chunked=True),
        lambda answer: replace(other_hub.zipped(answer), chunked=True, piece_bytes=7),
        lambda answer: replace(answer, piece_bytes=1),
        lambda answer: replace(answer, headers=[*answer.headers, ("Connection", "close")]),
    ],
    ids=["gzip", "capitals", "small letters", "chunks", "gzip in chunks", "byte by byte", "close"],
)
async def test_answers_may_come_in_any_form(
    node: Node, other: OtherHub, change: Callable[[Answer], Answer]
) -> None:
    """Packed, in chunks, byte by byte, with headers in any case: the same push."""

    def reword(method: str, path: str, answer: Answer) -> Answer:
        return answer if method == "HEAD" or answer.status == 204 else change(answer)

    other.reword = reword
    done = await node.push(target=FULL)
    assert node.waits == []
    assert node.tags() == {"v100": done.commit}
    assert_landed(node, "step-100")


@pytest.mark.parametrize("where", ["", "http://hub.internal:8080"], ids=["relative", "other host"])
async def test_pages_are_followed_on_the_same_hub(
    node: Node, tmp_path: Path, hub_tokens: Any, where: str
) -> None:
    """The next page may be named without a host, or with one that only the front knows."""

    def relink(method: str, path: str, answer: Answer) -> Answer:
        return replace(
            answer,
            headers=[
                (k, v.replace(f"http://127.0.0.1:{found.port}", where) if k == "link" else v)
                for k, v in answer.headers
            ],
        )

    choices = Choices(commits_page=2, tree_page=3)
    with (
        server.running(root=tmp_path / "paged", tokens=hub_tokens, choices=choices) as node.hub,
        other_hub.running(node.hub.url) as found,
    ):
        node.options["endpoint"] = found.url
        first = await node.push()
        for number in range(5):
            node.foreign(notes__txt=str(number).encode())
        found.reword = relink
        again = await node.push()
        assert found.count("GET", r"/commits/.*p=") >= 2
    assert (again.commit, again.created) == (first.commit, False)


async def test_a_page_that_names_itself_as_the_next_ends(node: Node, other: OtherHub) -> None:
    """A list whose next page is the same one is not asked for for ever."""

    def loop(method: str, path: str, answer: Answer) -> Answer:
        if "/commits/" not in path and "/tree/" not in path:
            return answer
        return replace(answer, headers=[*answer.headers, ("Link", f'<{path}>; rel="next"')])

    other.reword = loop
    await node.push()
    assert_landed(node)


# Pure -------------------------------------------------------------------------------------------


def test_a_link_in_a_batch_is_completed_from_where_the_answer_came() -> None:
    """Relative links, those of parts included, and those that only lack the scheme."""
    oid, url = "0" * 64, httpx2.URL("https://hub.example/a/b.git/info/lfs/objects/batch")
    header = {"chunk_size": "5", "1": "/parts/1", "2": "https://s.example/2?x=%2B"}
    upload = {"href": "//s.example/up", "header": header}
    made = dialect.batch(
        {"objects": [{"oid": oid, "size": 9, "actions": {"upload": upload}}]}, {oid: 9}, url
    )
    assert made["objects"][0]["actions"]["upload"] == {
        "href": "https://s.example/up",
        "header": {
            "chunk_size": "5",
            "1": "https://hub.example/parts/1",
            "2": "https://s.example/2?x=%2B",
        },
    }


@pytest.mark.parametrize(
    ("problem", "code"),
    [({"code": "507", "message": "full"}, 507), ({}, None), ("full", 0), ({"message": "x"}, 0)],
)
def test_a_problem_of_an_object_may_be_told_in_other_words(problem: Any, code: int | None) -> None:
    """A code as text, no code, a bare text; an empty one is none."""
    oid = "0" * 64
    made = dialect.batch(
        {"objects": [{"oid": oid, "error": problem}]}, {oid: 9}, httpx2.URL("http://h/")
    )
    assert made["objects"][0].get("error", {}).get("code") == code


def test_an_empty_page_of_a_list_is_a_list() -> None:
    """No commits, no tags, no files: nothing, and no error."""
    assert answers.commits([]) == []
    assert answers.tags({"branches": []}) == {}
    assert answers.files([{"type": "directory", "path": "a"}]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "Malformed response from server",
        "lfs_action is improperly formatted",
        "Invalid server response to upload large LFS file",
        "Invalid etag (`None`) returned for part 1",
    ],
)
def test_what_the_library_says_of_an_answer_may_pass(text: str) -> None:
    """A malformed answer is the Hub's fault: tried again, where a malformed request is not."""
    with pytest.raises(errors.HubUnavailable), translate.translated("x"):
        raise ValueError(text)
    with pytest.raises(errors.HubRejected), translate.translated("x"):
        raise ValueError("Repo id must be of another form")
