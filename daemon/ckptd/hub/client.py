"""The Hub as ckptd sees it: one awaitable call per thing a push needs, our values, our errors.

A thin adapter around `huggingface_hub.HfApi` for model repos. Each method is one attempt of one
call in a worker thread: it does not retry, decide or remember; `publisher` does. What the client
raises leaves as `errors.HubError` (see `translate`).

Cancellation: a call cannot be taken out of its thread, so a cancelled one is abandoned: the await
ends at once, the thread goes on until its answer or its timeout, and holds its place in the limiter
for as long. An abandoned write may still happen on the Hub; publishing is idempotent for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import anyio.to_thread
from huggingface_hub import HfApi, get_session
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils._validators import validate_repo_id

from ckptd import __version__, errors
from ckptd.hub import (
    answers,
    dialect,
    ledger,
    push,
    session,
    streaming,
    tokens,
    transfer,
    translate,
)
from ckptd.hub.facts import Account, Commit, PullRequest, RepoFacts
from ckptd.telemetry import logs

T = TypeVar("T")


def configure(timeouts: session.Timeouts | None = None) -> None:
    """Set up huggingface_hub for this process (see `session`); `HubClient` calls it."""
    session.configure(timeouts)


class HubClient:
    """Calls to one Hub with one token, safe to share between the pushes of a process.

    Args:
        endpoint: base URL; None takes HF_ENDPOINT or the public Hub.
        token: None looks where `tokens` says, again after each 401: a token that was replaced
            meanwhile is used at once.
        max_uploads: files on their way at the same time.
        timeouts: per socket operation; they hold for the whole process.
        upload_limit: most bytes a second, all uploads of the process together; None for no cap.

    Raises:
        errors.HubUnauthorized: the token's file may not be used, see `tokens`.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        max_uploads: int = 4,
        timeouts: session.Timeouts | None = None,
        upload_limit: int | None = None,
    ) -> None:
        configure(timeouts)
        base = endpoint.rstrip("/") if endpoint else None
        self._is_given = token is not None
        if token is None:
            found = tokens.find()
            token = found.text if found is not None else None
        else:
            logs.keep_secret(token)
        # False: without it, the library would look for a token where `tokens` would not.
        self._api = HfApi(
            endpoint=base,
            token=token or False,
            library_name="ckptd",
            library_version=__version__,
        )
        self.endpoint: str = self._api.endpoint
        session.limit_uploads(upload_limit, endpoint=self.endpoint)
        self.uploads = anyio.CapacityLimiter(max_uploads)
        """Threads that send file content."""
        self.calls = anyio.CapacityLimiter(8)
        """Threads for everything else, so that short calls never wait behind an upload."""

    async def whoami(self) -> Account:
        """Return the account behind the token (asked once per client).

        Raises:
            errors.HubUnauthorized: there is no token, or it is not (any more) a good one.
        """
        if self._api.token is False:
            raise translate.no_token("checking the token")
        answer: Mapping[str, Any] = await self._call(
            "checking the token", lambda: self._api.whoami(cache=True)
        )
        token = (answer.get("auth") or {}).get("accessToken") or {}
        return Account(
            name=str(answer.get("name", "")),
            role=str(token.get("role") or ""),
            token_name=str(token.get("displayName") or ""),
        )

    async def repo(self, repo_id: str) -> RepoFacts:
        """Return what the repo is. Raises errors.HubNotFound when there is no such repo."""
        return await self._call(
            "looking up the repo",
            lambda: answers.repo(self._get(self._url(repo_id)).json(), asked=repo_id),
            repo_id=repo_id,
        )

    async def create_repo(self, repo_id: str, *, private: bool | None) -> None:
        """Make a model repo. Raises errors.HubConflict when it exists or is just being made."""
        await self._call(
            "creating the repo",
            lambda: self._api.create_repo(repo_id, private=private, repo_type="model"),
            repo_id=repo_id,
        )

    async def head(self, repo_id: str, revision: str) -> str | None:
        """Return the commit `revision` points to; None for an empty repo."""

        def look() -> str | None:
            data = self._get(self._url(repo_id, "revision", revision)).json()
            there = answers.head(data)
            if there is None:  # an empty repo, or a Hub that does not say
                there = answers.branch_head(self._get(self._url(repo_id, "refs")).json(), revision)
            return there

        return await self._call(f"looking up revision {revision}", look, repo_id=repo_id)

    async def create_branch(self, repo_id: str, branch: str, *, at: str | None) -> None:
        """Make a branch at a commit. Raises errors.HubConflict when it exists."""
        await self._call(
            f"creating branch {branch}",
            lambda: self._api.create_branch(repo_id, branch=branch, revision=at),
            repo_id=repo_id,
        )

    async def tree(self, repo_id: str, revision: str) -> dict[str, ledger.RemoteFile]:
        """Return every file of a revision by path."""

        def look() -> dict[str, ledger.RemoteFile]:
            found: dict[str, ledger.RemoteFile] = {}
            link: str | None = self._url(repo_id, "tree", revision) + "?recursive=true"
            while link is not None:
                page = self._get(link)
                found |= answers.files(page.json())
                link = answers.next_page(page)
            return found

        return await self._call(f"listing the files of {revision}", look, repo_id=repo_id)

    async def read(self, repo_id: str, revision: str, path_in_repo: str) -> bytes:
        """Return the content of a small file. Raises errors.HubNotFound when it is absent."""
        place = f"{quote(revision, safe='')}/{quote(path_in_repo)}"
        return await self._call(
            f"reading {path_in_repo} of {revision}",
            lambda: answers.content(
                self._get(f"{self.endpoint}/{repo_id}/resolve/{place}"), path_in_repo
            ),
            repo_id=repo_id,
        )

    async def validate_card(self, repo_id: str, text: str) -> None:
        """Let the Hub check a model card, where it checks any.

        Raises:
            errors.HubRejected: with what it does not like.
        """

        card = {"content": text, "repoType": "model"}
        await self._call(
            "checking README.md",
            lambda: self._post(f"{self.endpoint}{dialect.VALIDATE}", card),
            repo_id=repo_id,
        )

    async def serves_xet(self, repo_id: str, revision: str, *, create_pr: bool) -> bool:
        """Say whether this Hub gives Xet upload tokens for the revision; False where it knows none.

        Raises:
            errors.HubForbidden: the token may not write there: known before anything is uploaded.
        """
        where = "None?create_pr=1" if create_pr else quote(revision, safe="")
        try:
            await self._call(
                "asking for an upload token",
                lambda: self._get(f"{self._url(repo_id, 'xet-write-token')}/{where}"),
                repo_id=repo_id,
            )
        except errors.HubError as error:
            if error.status not in dialect.NO_SUCH_ROUTE | {400}:
                raise
            return False
        return True

    async def upload(
        self,
        files: Sequence[push.LocalFile],
        *,
        repo_id: str,
        revision: str,
        create_pr: bool,
        meter: session.Meter = lambda _: None,
    ) -> list[ledger.Record]:
        """Upload the large ones of `files`, read the small ones, and return a record of each.

        Safe to repeat: what the Hub has is not sent again, and a known sha256 is not computed
        again. `meter` is called from the worker thread.

        Raises:
            errors.SourceChanged: a file is not, or did not stay, what its `LocalFile` says.
            errors.HubError: the upload failed.
        """
        names = files[0].path_in_repo if len(files) == 1 else f"{len(files)} files"
        preupload = transfer.preupload if files[0].content is None else streaming.preupload

        def send() -> list[ledger.Record]:
            with session.metered(meter):
                return preupload(
                    self._api, files, repo_id=repo_id, revision=revision, create_pr=create_pr
                )

        what = f"uploading {names} to {revision}"
        return await self._call(what, send, repo_id=repo_id, limiter=self.uploads)

    async def commit(
        self,
        records: Sequence[ledger.Record],
        *,
        deleted: Sequence[str],
        repo_id: str,
        revision: str,
        parent: str | None,
        title: str,
        description: str,
    ) -> str:
        """Make one commit of uploaded files on top of `parent` and return its oid.

        Raises:
            errors.HubConflict: `parent` is not the head any more.
            errors.HubUnavailable: no clear answer: the commit may have been made or not.
        """
        info = await self._call(
            f"committing to {revision}",
            lambda: self._api.create_commit(
                repo_id,
                transfer.operations(records, deleted),
                commit_message=title,
                commit_description=description,
                revision=revision,
                parent_commit=parent,
            ),
            repo_id=repo_id,
        )
        return info.oid

    async def commits(
        self, repo_id: str, revision: str, *, after: str | None = None
    ) -> tuple[list[Commit], str | None]:
        """Return commits of a revision, newest first, as many as the Hub tells at once.

        With them comes what names the next ones (`after`), None where there are none.
        """

        def look() -> tuple[list[Commit], str | None]:
            page = self._get(after or self._url(repo_id, "commits", revision))
            return answers.commits(page.json()), answers.next_page(page)

        return await self._call(f"listing the commits of {revision}", look, repo_id=repo_id)

    async def pull_requests(self, repo_id: str, *, limit: int) -> list[PullRequest]:
        """Return the pull requests as the Hub lists them, newest first, `limit` at most."""

        def look() -> list[PullRequest]:
            found: list[PullRequest] = []
            seen, page_number, more = 0, 0, True
            while more and len(found) < limit:
                link = f"{self._url(repo_id, 'discussions')}?type=pull_request&p={page_number}"
                data = self._get(link).json()
                page = data["discussions"]
                found += answers.pull_requests(page)
                seen, page_number = seen + len(page), page_number + 1
                more = bool(page) and seen < data.get("count", seen + 1)
            return found[:limit]

        return await self._call("listing pull requests", look, repo_id=repo_id)

    async def pull_request(self, repo_id: str, num: int) -> PullRequest:
        """Return one pull request with its first comment."""

        def look() -> PullRequest:
            link = self._url(repo_id, "discussions", str(num)) + "?diff=1"
            return answers.pull_request(self._get(link).json())

        return await self._call(f"reading pull request #{num}", look, repo_id=repo_id)

    async def create_pull_request(self, repo_id: str, *, title: str, description: str) -> int:
        """Make a draft pull request against main and return its number."""
        wanted = {"title": title, "description": description, "pullRequest": True}
        return await self._call(
            "creating a pull request",
            lambda: int(self._post(self._url(repo_id, "discussions"), wanted).json()["num"]),
            repo_id=repo_id,
        )

    async def open_pull_request(self, repo_id: str, num: int) -> None:
        """Turn a draft into an open pull request."""
        await self._call(
            f"opening pull request #{num}",
            lambda: self._post(
                self._url(repo_id, "discussions", str(num), "status"), {"status": "open"}
            ),
            repo_id=repo_id,
        )

    async def tags(self, repo_id: str) -> dict[str, str]:
        """Return the git tags of the repo and the commits they point to."""
        return await self._call(
            "listing tags",
            lambda: answers.tags(self._get(self._url(repo_id, "refs")).json()),
            repo_id=repo_id,
        )

    async def create_tag(self, repo_id: str, tag: str, *, at: str) -> None:
        """Put a git tag on a commit. Raises errors.HubConflict when the name is taken."""
        await self._call(
            f"creating tag {tag}",
            lambda: self._api.create_tag(repo_id, tag=tag, revision=at),
            repo_id=repo_id,
        )

    async def _call(
        self,
        what: str,
        call: Callable[[], T],
        *,
        repo_id: str | None = None,
        limiter: anyio.CapacityLimiter | None = None,
    ) -> T:
        """Run a blocking client call in a worker thread, with its errors translated."""

        def run() -> T:
            used = self._api.token
            try:
                with translate.translated(what, repo_id=repo_id):
                    return call()
            except errors.HubUnauthorized:
                if not self._has_other_token(used):
                    raise
            with translate.translated(what, repo_id=repo_id):
                return call()

        limiter = limiter if limiter is not None else self.calls
        return await anyio.to_thread.run_sync(run, limiter=limiter, abandon_on_cancel=True)

    def _has_other_token(self, refused: str | bool | None) -> bool:
        """Say whether there is another token now than the one that was refused, and take it."""
        if self._is_given:
            return False
        found = tokens.find()
        if found is None:
            return False
        self._api.token = found.text
        return found.text != refused

    def _headers(self) -> dict[str, str]:
        return self._api._build_hf_headers()  # noqa: SLF001 - the one way to the caller's token

    def _url(self, repo_id: str, *parts: str) -> str:
        """Return the address of something of a repo; each part is one segment of it."""
        validate_repo_id(repo_id)
        segments = "".join(f"/{quote(part, safe='')}" for part in parts)
        return f"{self.endpoint}/api/models/{repo_id}{segments}"

    def _get(self, url: str) -> Any:
        response = get_session().get(url, headers=self._headers())
        hf_raise_for_status(response)
        return response

    def _post(self, url: str, value: Mapping[str, Any]) -> Any:
        response = get_session().post(url, json=value, headers=self._headers())
        hf_raise_for_status(response)
        return response
