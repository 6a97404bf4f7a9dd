"""A git tag on a commit that stands already: for a step whose bytes an earlier one has published.

This module imports the Hub's client (some tenths of a second, tens of MB): the daemon loads it when
the first such step comes. Setting a tag twice is safe, and a tag is never moved.
"""

from __future__ import annotations

from ckptd import errors
from ckptd.hub.client import HubClient


async def put(*, endpoint: str | None, repo_id: str, tag: str, commit: str) -> bool:
    """Put `tag` on exactly this commit; return whether it was not there yet.

    Raises:
        HubRejected: another commit has the tag.
        HubError: the Hub refused or cannot be reached; `retry` says whether it may pass.
    """
    hub = HubClient(endpoint=endpoint)
    if await _stands(hub, repo_id, tag, commit):
        return False
    try:
        await hub.create_tag(repo_id, tag, at=commit)
    except errors.HubConflict:  # made between the look and the call, by whom, this tells
        return not await _stands(hub, repo_id, tag, commit)
    return True


async def _stands(hub: HubClient, repo_id: str, tag: str, commit: str) -> bool:
    there = (await hub.tags(repo_id)).get(tag)
    if there is not None and there != commit:
        raise errors.HubRejected(
            f"git tag {tag} stands on commit {there}, not on {commit}",
            repo_id=repo_id,
            hint="tags are never moved: delete it, or use another `git_tag`",
        )
    return there is not None
