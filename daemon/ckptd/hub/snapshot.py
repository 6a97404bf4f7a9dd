"""A model of the Hub in the local cache: resolved to a commit, then fetched; all calls block.

Files are those of huggingface_hub's own cache, shared with everything else on the machine: what is
there already is not fetched again. A download that was cut off goes on with the files that are not
whole yet; within one file only what the library resumes while it is being fetched.
Endpoint, token and timeouts are those that pushes use. Where HF_HUB_OFFLINE forbids the network, a
branch is the commit that it was when it was last fetched, and only what is in the cache is found.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import DryRunFileInfo, HfApi
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import tqdm

from ckptd import __version__, errors
from ckptd.hub import session, tokens, translate

Report = Callable[[int, int], None]
"""Is told the bytes that are here, of those to be fetched; from any thread."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BYTES_BAR = "huggingface_hub.snapshot_download"
"""What the library calls its bar of bytes that are written; another one counts the network's."""
_MAY_READ = (
    "the base model is not open to this token: accept its terms on the Hub, and set HF_TOKEN (or log "
    "in with `hf auth login`) to a token that may read it"
)


def commit_of(repo_id: str, revision: str, *, endpoint: str | None) -> str:
    """Return the commit that `revision` is now; a commit is itself, and nobody is asked.

    Raises:
        errors.HubError: no such repo or revision for this token, or no connection.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    if is_offline_mode():
        return _cached_commit(repo_id, revision)
    with _translated(f"looking up {repo_id}@{revision}", repo_id):
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
    instead: Sequence[str] = (),
    unwanted: Sequence[str] = (),
    report: Report = lambda done, total: None,
) -> Path:
    """Return the folder of the repo at `commit`, with every file that matches `wanted`.

    A repo without safetensors is fetched with what matches `instead`, too.

    Raises:
        errors.HubError: no such repo for this token, no connection, or a file cannot be fetched.
        errors.StorageFailed: the cache cannot be written.
    """
    api = _api(endpoint)
    options: dict[str, Any] = {
        "revision": commit,
        "ignore_patterns": list(unwanted),
        "max_workers": 2,
    }
    patterns, total = list(wanted), 0
    with _translated(f"fetching {repo_id}@{commit[:12]}", repo_id):
        if not is_offline_mode():
            options["allow_patterns"] = [*wanted, *instead]
            files = api.snapshot_download(repo_id, dry_run=True, **options)
            if not any(file.filename.endswith(".safetensors") for file in files):
                patterns += instead
            total = sum(one.file_size or 0 for one in files if _is_missing(one, patterns))
        if total:
            report(0, total)
        options["allow_patterns"] = patterns
        found = api.snapshot_download(repo_id, tqdm_class=_bar(report, total), **options)
    return Path(found)


def _is_missing(file: DryRunFileInfo, patterns: Sequence[str]) -> bool:
    wanted = any(fnmatch.fnmatchcase(file.filename, pattern) for pattern in patterns)
    return wanted and file.will_download


def read(
    repo_id: str, revision: str, name: str, *, endpoint: str | None, online: bool = True
) -> bytes | None:
    """Return a small file of the repo; None where repo or file are not there for this token.

    Not `online`, only the cache is looked into.

    Raises:
        errors.HubError: no connection, or the Hub cannot answer.
        errors.StorageFailed: the cache cannot be written.
    """
    try:
        with _translated(f"fetching {name} of {repo_id}", repo_id):
            path = _api(endpoint).hf_hub_download(
                repo_id, name, revision=revision, local_files_only=not online
            )
    except (errors.HubNotFound, errors.HubUnauthorized, errors.HubForbidden):
        return None
    except errors.HubError:
        if is_offline_mode() or not online:
            return None
        raise
    return Path(path).read_bytes()


def _cached_commit(repo_id: str, revision: str) -> str:
    """Return the commit of a branch as the cache has it.

    Raises:
        errors.HubRejected: it was never fetched.
    """
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / repo_folder_name(
        repo_id=repo_id, repo_type="model"
    )
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = ""
    if not _COMMIT.fullmatch(commit):
        raise errors.HubRejected(
            f"{repo_id}@{revision} is not in the cache, and HF_HUB_OFFLINE forbids the network",
            repo_id=repo_id,
            hint="unset HF_HUB_OFFLINE, or fetch the model once (`hf download`)",
        )
    return commit


@contextlib.contextmanager
def _translated(what: str, repo_id: str) -> Iterator[None]:
    """Run a client call; failures leave as ours, those of the cache's disk, too."""
    try:
        with translate.translated(what, repo_id=repo_id):
            try:
                yield
            except LocalEntryNotFoundError as error:
                raise _absent(what, repo_id, error) from error
    except (errors.HubUnauthorized, errors.HubForbidden) as error:
        raise type(error)(f"{what}: not allowed", status=error.status, hint=_MAY_READ) from error
    except OSError as error:
        raise errors.StorageFailed(
            f"{repo_id} cannot be kept: {error.strerror or error}",
            path=huggingface_hub.constants.HF_HUB_CACHE,
            hint="the cache is where HF_HOME or HF_HUB_CACHE says",
        ) from error


def _absent(what: str, repo_id: str, error: LocalEntryNotFoundError) -> errors.HubError:
    """Return our error for files that are not in the cache, while the Hub cannot be asked."""
    if is_offline_mode():
        return errors.HubRejected(
            f"{what}: not in the cache, and HF_HUB_OFFLINE forbids the network",
            repo_id=repo_id,
            hint="unset HF_HUB_OFFLINE, or fetch the model once (`hf download`)",
        )
    cause = error.__cause__
    why = type(error if cause is None else cause).__name__
    return errors.HubUnavailable(f"{what}: no answer ({why})", repo_id=repo_id)


def _bar(report: Report, total: int) -> type[Any]:
    """Return a progress bar that shows nothing and tells `report` the bytes."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts = options.pop("name", None) == _BYTES_BAR
            self._done = 0
            silent: Any = super().__init__  # it has no types
            silent(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                self._done += int(n)
                report(max(0, min(self._done, total)), total)
            return None

    return Bar


def _api(endpoint: str | None) -> HfApi:
    session.configure()
    found = tokens.find()
    return HfApi(
        endpoint=endpoint.rstrip("/") if endpoint else None,
        token=False if found is None else found.text,
        library_name="ckptd",
        library_version=__version__,
    )
