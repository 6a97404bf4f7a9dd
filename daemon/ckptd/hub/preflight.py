"""What is checked, made and prepared around the commit: token, repo, revision, card, git tag.

`run` finds every reason to refuse a push that can be known before its first upload, because
afterwards a hundred gigabytes have been sent. Making what is absent (repo, branch) is part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ckptd import errors
from ckptd.hub import attempts, card, ledger, push
from ckptd.hub.client import HubClient
from ckptd.hub.facts import RepoFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What the checks found."""

    account: str
    """The Hub's name for whoever the token belongs to."""
    repo_id: str
    """The repo's name now."""
    head: str | None
    """The commit that the revision pointed to; None for an empty repo."""


def is_card(file: push.LocalFile) -> bool:
    """Say whether the file would be the repo's model card."""
    return file.path_in_repo == card.CARD_NAME


class Preflight:
    """The checks of one push, and the card it publishes."""

    def __init__(
        self,
        *,
        hub: HubClient,
        target: push.Target,
        push_id: str,
        attempts: attempts.Attempts,
    ) -> None:
        self._hub = hub
        self._target = target
        self._push_id = push_id
        self._attempts = attempts
        self._revision = target.revision or push.MAIN
        self._local_card: str | None = None
        self.card_section: str | None = None
        """What ckptd itself says in the card, where it says anything."""
        self._valid_card: str | None = None

    async def run(self) -> Opened:
        """Check everything, make what is absent, and return what was found; safe to call again.

        Raises:
            errors.HubError: the first thing that stands in the way.
        """
        self._check_target()
        account = await self._check_token()
        await self._ensure_repo()
        head = await self._ensure_revision()
        await self._check_tag(head)
        await self.card_for(head)
        return Opened(account=account, repo_id=self._target.repo_id, head=head)

    def take_local_card(self, files: Sequence[push.LocalFile]) -> None:
        """Keep the README.md of the push, if any: it is published where the revision has none."""
        for file in files:
            if is_card(file):
                self._local_card = _text(file.path.read_bytes(), str(file.path))

    async def card_for(self, head: str | None) -> ledger.Record | None:
        """Return the card to commit on top of `head`, validated; None where it needs no change.

        The card of the revision wins over one among the files: people write into it.

        Raises:
            errors.HubRejected: it cannot be merged, or the Hub does not take the result.
        """
        repo_id, tags = self._target.repo_id, self._target.card_tags
        there = None if head is None else await self._attempts.run(lambda: self._read_card(head))
        facts = self._target.card_facts
        if there is None and self._local_card is None and not (tags or facts or self.card_section):
            return None
        base = there if there is not None else self._local_card
        try:
            merged = card.merge(
                base,
                tags=tags,
                library=self._target.card_library,
                facts=facts,
                name=repo_id.rpartition("/")[2],
            )
            if self.card_section is not None:
                merged = card.with_section(merged, self.card_section)
        except errors.HubRejected as exc:
            where = f"{self._revision}: {exc.message}"
            raise errors.HubRejected(where, repo_id=repo_id, hint=exc.hint) from exc
        if merged == there:
            return None
        if merged != self._valid_card:
            await self._attempts.run(lambda: self._hub.validate_card(repo_id, merged))
            self._valid_card = merged
        content = merged.encode()
        return ledger.Record(
            path_in_repo=card.CARD_NAME,
            nbytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            content=content,
        )

    async def tag(self, tag: str, oid: str) -> None:
        """Put the git tag on exactly this commit; nothing happens when it is there already.

        Raises:
            errors.HubRejected: the name is taken by another commit.
        """

        async def once() -> bool:
            there = (await self._hub.tags(self._target.repo_id)).get(tag)
            if there == oid:
                return False
            if there is not None:
                raise self._taken(tag, there)
            try:
                await self._hub.create_tag(self._target.repo_id, tag, at=oid)
            except errors.HubConflict as exc:  # between the look and the call
                text = f"tag {tag} is being made by somebody else"
                raise errors.HubUnavailable(text, repo_id=self._target.repo_id) from exc
            return True

        if await self._attempts.run(once):
            self._tell(push.Happening.TAGGED, tag, oid)

    def _check_target(self) -> None:
        if self._target.create_pr and self._revision != push.MAIN:
            raise errors.HubRejected(
                f"a pull request goes against {push.MAIN}, not against {self._revision}",
                repo_id=self._target.repo_id,
                hint=f"set revision to {push.MAIN} or create_pr to false",
            )

    async def _check_token(self) -> str:
        account = await self._attempts.run(self._hub.whoami)
        if account.role == "read":
            name = f" {account.token_name!r}" if account.token_name else ""
            raise errors.HubForbidden(
                f"the token{name} of {account.name} may only read",
                repo_id=self._target.repo_id,
                hint="put one with write access in its place (HF_TOKEN_PATH or HF_TOKEN)",
            )
        return account.name

    async def _ensure_repo(self) -> None:
        """Make the repo where it is absent; follow it where it was renamed."""
        repo_id = self._target.repo_id

        async def once() -> tuple[RepoFacts, bool]:
            try:
                return await self._hub.repo(repo_id), False
            except errors.HubNotFound:
                pass
            try:
                await self._hub.create_repo(repo_id, private=self._target.private)
            except errors.HubConflict as exc:
                text = "the repo is being made by somebody else"
                raise errors.HubUnavailable(text, repo_id=repo_id) from exc
            except errors.HubRejected as exc:
                if exc.status is not None:
                    raise
                # Without a status only the client's reading of the answer failed: look again.
            try:
                return await self._hub.repo(repo_id), True
            except errors.HubNotFound as exc:
                text = "the repo was made a moment ago and cannot be seen yet"
                raise errors.HubUnavailable(text, repo_id=repo_id) from exc

        facts, is_new = await self._attempts.run(once)
        if is_new:
            self._tell(push.Happening.REPO_CREATED, repo_id)
        if facts.repo_id != repo_id:
            self._target = dataclasses.replace(self._target, repo_id=facts.repo_id)
            self._tell(push.Happening.REPO_MOVED, facts.repo_id)
        if self._target.private and not facts.is_private:
            raise errors.HubRejected(
                "private: true is asked for, but the repo is public",
                repo_id=facts.repo_id,
                hint="make the repo private on the Hub, or set private to null to publish openly",
            )

    async def _ensure_revision(self) -> str | None:
        """Return the head of the revision, made from main when it is absent."""
        repo_id, branch = self._target.repo_id, self._revision

        async def once() -> tuple[str | None, bool]:
            try:
                return await self._hub.head(repo_id, branch), False
            except errors.HubNotFound:
                if branch == push.MAIN or branch.startswith("refs/"):
                    raise
            start = await self._hub.head(repo_id, push.MAIN)
            try:
                await self._hub.create_branch(repo_id, branch, at=start)
            except errors.HubConflict as exc:
                text = f"branch {branch} is being made by somebody else"
                raise errors.HubUnavailable(text, repo_id=repo_id) from exc
            return start, True

        head, is_new = await self._attempts.run(once)
        if is_new:
            self._tell(push.Happening.BRANCH_CREATED, branch, head)
        return head

    async def _check_tag(self, head: str | None) -> None:
        """Refuse a tag that stands on a foreign commit, before anything is sent.

        On the head it may stay for now: the push may turn out to change nothing.
        """
        there = await self.foreign_tag()
        if there is not None and there != head:
            assert self._target.git_tag is not None
            raise self._taken(self._target.git_tag, there)

    async def foreign_tag(self) -> str | None:
        """Return the commit the wanted git tag stands on, unless that is this push's own."""
        tag, repo_id = self._target.git_tag, self._target.repo_id
        if tag is None:
            return None
        there = (await self._attempts.run(lambda: self._hub.tags(repo_id))).get(tag)
        if there is None:
            return None
        tagged, _ = await self._attempts.run(lambda: self._hub.commits(repo_id, there))
        return None if push.carries(tagged[0].text, self._push_id) else there

    async def check_tag_before_commit(self, unchanged_head: str | None) -> None:
        """Refuse to make a commit that could not get its tag.

        `unchanged_head` is the head that already holds exactly the files, None where there is none.

        Raises:
            errors.HubRejected: the tag stands on a commit that this push will not end at.
        """
        there = await self.foreign_tag()
        if there is not None and there != unchanged_head:
            assert self._target.git_tag is not None
            raise self._taken(self._target.git_tag, there)

    async def _read_card(self, head: str) -> str | None:
        try:
            content = await self._hub.read(self._target.repo_id, head, card.CARD_NAME)
        except errors.HubNotFound:
            return None
        return _text(content, f"{self._target.repo_id}@{self._revision}/{card.CARD_NAME}")

    def _taken(self, tag: str, there: str) -> errors.HubRejected:
        return errors.HubRejected(
            f"git tag {tag} exists and points to another commit ({there[:12]})",
            repo_id=self._target.repo_id,
            hint="ckptd moves no tags: delete it on the Hub, or choose another git_tag",
        )

    def _tell(self, happening: push.Happening, text: str, oid: str | None = None) -> None:
        self._attempts.report(push.HubEvent(happening=happening, text=text, commit=oid))


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as exc:
        raise errors.HubRejected(
            f"{where}: is not UTF-8 (byte {exc.start:,})", hint="save the card as UTF-8"
        ) from exc
