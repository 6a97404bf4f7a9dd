"""What this process knows of the histories of repos: which pushes their commits carry.

What lies below a commit never changes. So a commit below which everything was read once need not be
passed again, on whatever ref it is met, and a push costs a look at what is new since the last one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from ckptd.hub import push
from ckptd.hub.facts import Commit

MOST_REPOS = 64


@dataclass(frozen=True, slots=True)
class History:
    """A commit, and the push ids that it and the commits below it carry."""

    top: str
    pushes: set[str]


class Histories:
    """The last history that was read of each of some repos."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], History] = OrderedDict()

    def top(self, endpoint: str, repo_id: str, *, without: str) -> str | None:
        """Return a commit at and below which no commit carries the push id `without`."""
        known = self._known.get((endpoint, repo_id))
        return None if known is None or without in known.pushes else known.top

    def keep(
        self, endpoint: str, repo_id: str, commits: Iterable[Commit], *, top: str | None
    ) -> None:
        """Keep what was read: `commits`, newest first, down to `top` or to the first of all."""
        key = (endpoint, repo_id)
        before = self._known.pop(key, None)
        known = before.pushes if before is not None and before.top == top else set()
        newest = top
        for number, commit in enumerate(commits):
            newest = commit.oid if number == 0 else newest
            known.update(push.carried(commit.text))
        if newest is not None:
            self._known[key] = History(newest, known)
        while len(self._known) > MOST_REPOS:
            self._known.popitem(last=False)


OF_THIS_PROCESS = Histories()
