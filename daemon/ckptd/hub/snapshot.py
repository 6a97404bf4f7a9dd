"""A model of the Hub in the local cache: resolved to a commit, then fetched; both calls block.

Files are those of huggingface_hub's own cache, shared with everything else on the machine: what is
there already is not fetched again, and a download that was cut off goes on where it stopped.
Endpoint, token and timeouts are those that pushes use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, get_token

from ckptd import __version__, errors
from ckptd.hub import session, translate

_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(repo_id: str, revision: str, *, endpoint: str | None) -> str:
    """Return the commit that `revision` is now; a commit is itself, and nobody is asked.

    Raises:
        errors.HubError: no such repo or revision for this token, or no connection.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    with translate.translated(f"looking up {repo_id}@{revision}", repo_id=repo_id):
        info = _api(endpoint).repo_info(repo_id, revision=revision)
    if not info.sha:
        raise errors.HubNotFound(f"{repo_id}@{revision} has no commit", repo_id=repo_id)
    return str(info.sha)


def fetch(
    repo_id: str,
    commit: str,
    *,
    endpoint: str | None,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
) -> Path:
    """Return the folder of the repo at `commit`, with every file that matches `wanted`.

    Raises:
        errors.HubError: no such repo for this token, no connection, or a file cannot be fetched.
        errors.StorageFailed: the cache cannot be written.
    """
    try:
        with translate.translated(f"fetching {repo_id}@{commit[:12]}", repo_id=repo_id):
            found = _api(endpoint).snapshot_download(
                repo_id,
                revision=commit,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
                max_workers=2,
            )
    except OSError as error:
        raise errors.StorageFailed(
            f"{repo_id} cannot be kept: {error.strerror or error}",
            path=huggingface_hub.constants.HF_HUB_CACHE,
            hint="the cache is where HF_HOME or HF_HUB_CACHE says",
        ) from error
    return Path(found)


def _api(endpoint: str | None) -> HfApi:
    session.configure()
    return HfApi(
        endpoint=endpoint.rstrip("/") if endpoint else None,
        token=get_token(),
        library_name="ckptd",
        library_version=__version__,
    )
