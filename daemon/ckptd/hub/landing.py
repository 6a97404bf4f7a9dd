"""Exactly one commit of a push on one ref, whatever is lost, repeated or overtaken on the way.

A commit request can fail after the commit was made, and another writer can be faster. So every
commit names its parent, which lets one of two win; its description carries the push id, so that a
commit whose answer was lost, or that an earlier life of this process made, is found instead of made
again; and what happens to the ref between two tries is read again before each of them.

Decision after a failure: own push id above the parent = it landed; head moved = commit again on the
new head (stale files and card read anew, foreign files kept); neither = wait and repeat.

What others commit while the push runs stays, weights included: only those that were there before,
and those of ckptd's own pushes, are stale.

An earlier life's commit is looked for down to the first commit of the ref, however many others came
on top of it: that costs a request for each page of the list, the first time in a process (`histories`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from ckptd import errors
from ckptd.hub import attempts, ledger, push, translate
from ckptd.hub.client import HubClient
from ckptd.hub.facts import Commit
from ckptd.hub.histories import OF_THIS_PROCESS, Histories

MOST_COMPARED = 50
"""Trees that are compared to tell whose weights are whose; of more, all that is new is kept."""
MOST_REBASES = 10
"""Then others are faster: the job comes back later, with the reason."""
MOST_RESENDS = 2
"""The first resend of collected uploads goes the usual way, the second one over LFS."""

CardFor = Callable[[str | None], Awaitable[ledger.Record | None]]
"""Returns the card to commit on top of the given head, or None where it needs no change."""
SendAgain = Callable[[int], Awaitable[list[ledger.Record]]]
"""Uploads the push's files once more from disk; is told which resend it is, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """The commit that holds the push, and whether this call made it."""

    oid: str
    created: bool
    records: tuple[ledger.Record, ...]
    """What must be found in it."""
    deleted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The state of a ref, and what a commit on top of it would change."""

    head: str | None
    records: tuple[ledger.Record, ...]
    deleted: tuple[str, ...]
    is_same: bool
    """The ref holds exactly the push already: a commit would be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lander:
    """Makes and finds the commit of one push."""

    hub: HubClient
    target: push.Target
    push_id: str
    attempts: attempts.Attempts
    since: str | None = None
    """The head when the push began; None where that does not matter."""
    histories: Histories = OF_THIS_PROCESS

    async def find(self, revision: str, *, parent: str | None = None) -> str | None:
        """Return the commit on `revision` that carries our push id, looking no further than `parent`."""
        place = (self.hub.endpoint, self.target.repo_id)
        known = self.histories.top(*place, without=self.push_id)
        passed: list[Commit] = []
        async with contextlib.aclosing(self._history(revision)) as history:
            async for commit in history:
                if commit.oid == parent:
                    return None
                if commit.oid == known:
                    break
                if push.carries(commit.text, self.push_id):
                    return commit.oid
                passed.append(commit)
            else:
                known = None
        if not revision.startswith("refs/"):  # a pull request ends, and is short
            self.histories.keep(*place, passed, top=known)
        return None

    async def base(
        self, revision: str, records: Sequence[ledger.Record], card_for: CardFor
    ) -> Base:
        """Read the ref and return what a commit of `records` on top of it would be."""
        repo_id = self.target.repo_id
        head = await self.attempts.run(lambda: self.hub.head(repo_id, revision))
        tree = {} if head is None else await self.attempts.run(lambda: self.hub.tree(repo_id, head))
        card = await card_for(head)
        deleted = ledger.stale_weights(records, tree)
        if deleted and head is not None and self.since not in (None, head):
            theirs = await self._of_others(revision, tree)
            self._tell_kept(sorted(theirs.intersection(deleted)))
            deleted = [path for path in deleted if path not in theirs]
        is_same = card is None and not deleted and not ledger.differences(records, tree)
        return Base(
            head=head,
            records=(*records, card) if card is not None else tuple(records),
            deleted=tuple(deleted),
            is_same=is_same and head is not None,
        )

    async def land(
        self,
        revision: str,
        records: Sequence[ledger.Record],
        *,
        card_for: CardFor,
        send_again: SendAgain,
    ) -> Landed:
        """Return the one commit of this push on `revision`, making it unless it exists.

        Safe to call again after any failure and after a kill.

        Raises:
            errors.HubConflict: others kept committing faster than we could.
            errors.HubUnavailable: patience is used up.
            errors.HubRejected: the Hub refuses the commit for good.
        """
        found = await self.find(revision)
        if found is not None:
            return _made_before(found, records)
        tries, rebases, resends = self.attempts.tries(), 0, 0
        while True:
            base = await self.base(revision, records, card_for)
            if base.is_same and base.head is not None:
                return Landed(oid=base.head, created=False, records=base.records)
            try:
                return self._landed(await self._commit(revision, base), base)
            except errors.HubRejected as error:
                found = await self._despite(error, revision, base)
                if found is not None:
                    return self._landed(found, base)
                if not translate.is_lost_upload(error) or resends >= MOST_RESENDS:
                    raise
                resends += 1
                records = await send_again(resends)
                continue
            except (errors.HubConflict, errors.HubUnavailable) as error:
                failure = error
            found = await self.find(revision, parent=base.head)
            if found is not None and isinstance(failure, errors.HubConflict):
                # A clear no to ours: another process has made the commit of the same push.
                return _made_before(found, records)
            if found is not None:
                return self._landed(found, base)
            head = await self.attempts.run(lambda: self.hub.head(self.target.repo_id, revision))
            if head != base.head:
                rebases += 1
                self._refuse_endless(revision, rebases, failure)
                if isinstance(failure, errors.HubConflict):
                    continue
            await tries.pause(failure)

    async def verify(self, landed: Landed) -> None:
        """Compare the commit's tree with what was sent: names, sizes, sha256 or git blob ids.

        Raises:
            errors.CheckFailed: names the first file that differs.
        """
        tree = await self.attempts.run(
            lambda: self.hub.tree(self.target.repo_id, landed.oid), absent_ok=True
        )
        wrong = ledger.differences(landed.records, tree)
        wrong += [f"{path} is still there" for path in landed.deleted if path in tree]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise errors.CheckFailed(
                f"{self.target.repo_id}@{landed.oid[:12]}: {wrong[0]}{more}",
                check="verify",
                hint="the commit is on the Hub but not what was sent: do not use it",
            )
        self._tell(push.Happening.VERIFIED, landed.oid)

    async def _commit(self, revision: str, base: Base) -> str:
        return await self.hub.commit(
            base.records,
            deleted=base.deleted,
            repo_id=self.target.repo_id,
            revision=revision,
            parent=base.head,
            title=push.title(self.target),
            description=push.description(self.target, self.push_id),
        )

    async def _despite(self, error: errors.HubRejected, revision: str, base: Base) -> str | None:
        """Return our commit where only the client's reading of the answer failed (no status)."""
        if error.status is not None:
            return None
        return await self.find(revision, parent=base.head)

    async def _history(self, revision: str) -> AsyncGenerator[Commit, None]:
        """Yield the commits of a ref, newest first; a page of the list is asked for when it is due."""
        after: str | None = None
        while True:
            page, after = await self.attempts.run(
                functools.partial(self.hub.commits, self.target.repo_id, revision, after=after)
            )
            for commit in page:
                yield commit
            if after is None:
                return

    async def _of_others(self, revision: str, tree: Mapping[str, ledger.RemoteFile]) -> set[str]:
        """Return the files of `tree` that others than ckptd have put there since the push began.

        Commits of others that follow each other are looked at as one, so that a storm of them costs
        no more than a single one.
        """
        commits = await self._since(revision)
        if commits is None:
            return await self._new_in(tree)
        last = len(commits) - 1
        seams = [
            at
            for at in range(last + 1)
            if at in (0, last)
            or push.is_ours(commits[at].text)
            or push.is_ours(commits[at + 1].text)
        ]
        if len(seams) > MOST_COMPARED:
            return await self._new_in(tree)
        theirs: set[str] = set()
        before: Mapping[str, ledger.RemoteFile] = await self._tree(commits[0].oid)
        for at in seams[1:]:
            after = await self._tree(commits[at].oid)
            changed = _changed(before, after)
            theirs = theirs - changed if push.is_ours(commits[at].text) else theirs | changed
            before = after
        return theirs.intersection(tree)

    async def _since(self, revision: str) -> list[Commit] | None:
        """Return the commits since the push began, with the one before them, oldest first.

        None where the history was rewritten.
        """
        found: list[Commit] = []
        async with contextlib.aclosing(self._history(revision)) as history:
            async for commit in history:
                found.append(commit)
                if commit.oid == self.since:
                    return found[::-1]
        return None

    async def _new_in(self, tree: Mapping[str, ledger.RemoteFile]) -> set[str]:
        """Return what is in `tree` and was not there, or not so, when the push began."""
        assert self.since is not None
        try:
            return _changed(await self._tree(self.since), tree)
        except errors.HubNotFound:
            return set()  # it went with the history: nobody can tell what is new

    async def _tree(self, oid: str) -> Mapping[str, ledger.RemoteFile]:
        return await self.attempts.run(functools.partial(self.hub.tree, self.target.repo_id, oid))

    def _tell_kept(self, paths: Sequence[str]) -> None:
        if paths:
            text = f"kept {', '.join(paths)}: pushed by somebody else during this push"
            self.attempts.report(push.HubEvent(happening=push.Happening.KEPT, text=text))

    def _landed(self, oid: str, base: Base) -> Landed:
        self._tell(push.Happening.COMMITTED, oid)
        return Landed(oid=oid, created=True, records=base.records, deleted=base.deleted)

    def _refuse_endless(self, revision: str, rebases: int, failure: errors.HubError) -> None:
        if rebases > MOST_REBASES:
            raise errors.HubConflict(
                f"{revision} moved {rebases} times while ckptd tried to commit to it",
                repo_id=self.target.repo_id,
                hint="other writers are faster; give this pipeline a revision of its own",
            ) from failure
        text = f"{revision} was moved by somebody else; committing on top of it"
        self.attempts.report(push.HubEvent(happening=push.Happening.REBASED, text=text))

    def _tell(self, happening: push.Happening, oid: str) -> None:
        self.attempts.report(push.HubEvent(happening=happening, commit=oid))


def _changed(
    before: Mapping[str, ledger.RemoteFile], after: Mapping[str, ledger.RemoteFile]
) -> set[str]:
    return {path for path, file in after.items() if before.get(path) != file}


def _made_before(oid: str, records: Sequence[ledger.Record]) -> Landed:
    """Return a commit that this call did not make; only what is surely in it is looked for."""
    large = tuple(record for record in records if record.content is None)
    return Landed(oid=oid, created=False, records=large)
