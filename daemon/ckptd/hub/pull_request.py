"""Exactly one pull request of a push: a draft that carries the push id, opened after its commit.

The draft comes first because its number is durable: whatever is lost afterwards, the next life
finds it by the push id in its first comment. Candidates are pull requests with our title, or drafts
by our account; only their details are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd import errors
from ckptd.hub import attempts, push
from ckptd.hub.client import HubClient
from ckptd.hub.facts import PullRequest

LISTED = 1000
"""Pull requests looked at by title, author and status."""
READ = 50
"""Candidates whose first comment is read, newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Finds, makes and opens the pull request of one push."""

    hub: HubClient
    target: push.Target
    push_id: str
    account: str
    """The Hub's name for whoever the token belongs to."""
    attempts: attempts.Attempts

    async def ensure(self) -> PullRequest:
        """Return our pull request, making a draft unless there is one.

        A lost answer is followed by a search, never by a second draft.

        Raises:
            errors.HubRejected: somebody closed it.
        """
        found = await self.attempts.run(self._find_or_make)
        if found.status == "closed":
            raise self._closed(found.num)
        return found

    async def open(self, num: int) -> None:
        """Make the pull request visible as ready; nothing happens when it is, or was merged.

        Raises:
            errors.HubRejected: somebody closed it meanwhile.
        """

        async def once() -> bool:
            status = (await self.hub.pull_request(self.target.repo_id, num)).status
            if status == "closed":
                raise self._closed(num)
            if status != "draft":
                return False
            try:
                await self.hub.open_pull_request(self.target.repo_id, num)
            except (errors.HubRejected, errors.HubForbidden, errors.HubConflict):
                # Closed or merged between the look and the call?
                if (await self.hub.pull_request(self.target.repo_id, num)).status == status:
                    raise
                return await once()
            return True

        if await self.attempts.run(once):
            self.attempts.report(push.HubEvent(happening=push.Happening.PR_OPENED, pr_num=num))

    async def require_live(self, num: int) -> None:
        """Raise HubRejected where somebody closed or merged it before its commit was in it."""
        repo_id = self.target.repo_id
        found = await self.attempts.run(lambda: self.hub.pull_request(repo_id, num))
        if found.status == "closed":
            raise self._closed(num)
        if found.status == "merged":
            raise errors.HubRejected(
                f"pull request #{num} of this push was merged before its files were in it",
                repo_id=repo_id,
                hint="retry the job under another commit_message, or without create_pr",
            )

    def _closed(self, num: int) -> errors.HubRejected:
        return errors.HubRejected(
            f"pull request #{num} of this push was closed by somebody",
            repo_id=self.target.repo_id,
            hint="reopen it on the Hub, then retry the job, to let the push go on",
        )

    async def _find_or_make(self) -> PullRequest:
        found = await self._find()
        if found is not None:
            return found
        num = await self.hub.create_pull_request(
            self.target.repo_id,
            title=push.title(self.target),
            description=push.description(self.target, self.push_id),
        )
        self.attempts.report(push.HubEvent(happening=push.Happening.PR_CREATED, pr_num=num))
        return await self.hub.pull_request(self.target.repo_id, num)

    async def _find(self) -> PullRequest | None:
        title = push.title(self.target)
        listed = await self.hub.pull_requests(self.target.repo_id, limit=LISTED)
        candidates = [
            pr
            for pr in listed
            if pr.title == title or (pr.status == "draft" and pr.author == self.account)
        ]
        for pr in sorted(candidates, key=lambda pr: -pr.num)[:READ]:
            details = await self.hub.pull_request(self.target.repo_id, pr.num)
            if push.carries(details.text, self.push_id):
                return details
        return None
