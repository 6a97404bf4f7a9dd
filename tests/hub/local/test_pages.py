"""What a person sees in a browser."""

from __future__ import annotations

import re

import httpx2
from huggingface_hub import HfApi

EVIL = "<script>alert(1)</script>"


def test_pages_show_repos_refs_files_pulls_and_card(hub, api: HfApi, repo: str, add):
    """From the index every link of a repo leads to a page or a file."""
    card = f"---\ntags: [x]\n---\n# A card {EVIL}\n".encode()
    made = api.create_commit(
        repo, [add("README.md", card), add("w.bin", b"\0")], commit_message="a"
    )
    api.create_tag(repo, tag="step-1")
    api.create_commit(repo, [add("c.json")], commit_message="a pull", create_pr=True)
    todo, seen = ["/"], {}
    while todo:
        path = todo.pop()
        if path not in seen:
            answer = seen[path] = httpx2.get(hub.url + path)
            assert answer.status_code in ({200, 401} if "login" in path else {200}), path
            if answer.headers["Content-Type"].startswith("text/html"):
                todo += re.findall(r'href="([^"]+)"', answer.text)
    page = seen[f"/{repo}"].text
    for text in ("step-1", "refs/pr/1", "w.bin", "a pull", made.oid[:12], "# A card"):
        assert text in page
    assert f"/{repo}/tree/refs%2Fpr%2F1" in seen


def test_whatever_people_write_is_escaped(hub, api: HfApi, repo: str, add):
    """Titles, messages, paths, comments, refs and cards cannot bring markup into a page."""
    api.create_commit(
        repo,
        [
            add("README.md", f"---\nlicense: mit\n---\n{EVIL}".encode()),
            add(f"a/{EVIL.replace('/', '')}.json"),
        ],
        commit_message=EVIL,
        commit_description=EVIL,
    )
    api.create_branch(repo, branch="<b>")
    api.create_discussion(repo, title=EVIL, description=EVIL)
    oid = api.repo_info(repo).sha
    for path in ("/", f"/{repo}", f"/{repo}/commit/{oid}", f"/{repo}/discussions/1"):
        answer = httpx2.get(hub.url + path)
        assert "<script" not in answer.text
        assert "<b>" not in answer.text
        assert "&lt;script&gt;" in answer.text
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_a_browser_is_asked_for_the_token_of_a_private_repo(hub, api: HfApi):
    """Hidden without a token, shown with the token as password."""
    api.create_repo("acme/secret", private=True)
    hidden = httpx2.get(f"{hub.url}/acme/secret")
    shown = httpx2.get(f"{hub.url}/acme/secret", auth=("me", hub.token))
    assert (hidden.status_code, shown.status_code) == (401, 200)
    assert "Basic" in hidden.headers["WWW-Authenticate"]
    assert "acme/secret" not in httpx2.get(hub.url).text
    assert "acme/secret" in httpx2.get(hub.url, auth=("me", hub.token)).text


def test_a_page_that_is_not_there_is_404(hub, repo: str):
    """Unknown pages and API paths are 404; a repo's unknown revision is a page that says so."""
    assert httpx2.get(f"{hub.url}/a/b/c/d/e/f").status_code == 404
    assert httpx2.get(f"{hub.url}/api/nope").status_code == 404
    assert httpx2.get(f"{hub.url}/{repo}/tree/nope").status_code == 404
