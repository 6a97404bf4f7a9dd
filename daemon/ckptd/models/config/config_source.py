"""Where a config.json comes from: a file, a folder, or a repository on the Hub, and its content.

Owns: turning what a user names into a readable file, reading and writing JSON the way config.json
has it (special floats included), and the text of every failure on the way. Does not own: what the
keys mean. Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"

log = logging.getLogger(__name__)

_FLOAT_TAG = "__float__"
_TAGGED_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where to look: every argument of `from_pretrained` that says how a file is found.

    `revision` is a branch, a tag, a commit or `refs/pr/N`; `token` a string, True (the one stored by
    `hf auth login`) or None; `subfolder` lies inside the folder or the repository. `proxies` is
    accepted and not used: huggingface_hub 2 takes proxies from the environment (`HTTPS_PROXY`,
    `HTTP_PROXY`, `NO_PROXY`) or from `huggingface_hub.set_client_factory`, not call by call.
    """

    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = None
    revision: str | None = None
    subfolder: str = ""
    proxies: dict[str, str] | None = None

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> Source:
        """Take the arguments named here out of `kwargs`; None counts as not given."""
        taken = {name: kwargs.pop(name) for name in cls.__slots__ if name in kwargs}
        return cls(**{name: value for name, value in taken.items() if value is not None})


SOURCE_KEYS = frozenset(Source.__slots__)
"""The names of the arguments that say how a file is found."""


def find(name_or_path: str | os.PathLike[str], file_name: str, source: Source) -> Path:
    """Return the path of a file of the checkpoint; it is downloaded where it must be.

    A path to a file is that file, a folder holds `subfolder/file_name`, anything else names a
    repository on the Hub.

    Raises:
        OSError: there is no such file, folder, repository or revision, or the Hub cannot be reached
            and the file is not in the cache; the text says what was looked for and what to do.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = path / source.subfolder / file_name
        if not found.is_file():
            raise OSError(
                f"{found} does not exist: {str(path)!r} is a folder without {file_name}; "
                "name the folder that the checkpoint was saved into"
            )
        return found
    if _is_path(os.fspath(name_or_path)):
        raise OSError(f"{str(path)!r} does not exist: neither a file nor a folder has that name")
    return _downloaded(os.fspath(name_or_path), file_name, source)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object in the file at `path`, tagged floats (`{"__float__": ...}`) decoded.

    Raises:
        OSError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(
            f"{os.fspath(path)} is not a valid JSON file ({error}); "
            "copy it again from where the checkpoint was saved"
        ) from error
    if not isinstance(content, dict):
        raise OSError(
            f"{os.fspath(path)} holds a JSON {type(content).__name__}, expected an object with the "
            "keys of a configuration"
        )
    decoded: dict[str, Any] = _decoded(content)
    return decoded


def written(content: dict[str, Any]) -> str:
    """Return `content` as the text of a config.json: sorted, indented by 2, ending in a newline.

    Infinity and NaN, which JSON lacks, are tagged as transformers tags them.
    """
    return json.dumps(_encoded(content), indent=2, sort_keys=True) + "\n"


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path, and no repository can have it."""
    return (
        name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name in {"", ".", ".."}
    )


def _downloaded(repo_id: str, file_name: str, source: Source) -> Path:
    """Return a file of a repository in the local cache."""
    # The Hub's client costs a tenth of a second: only those who ask the Hub wait for it.
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    if source.proxies:
        log.warning("proxies are taken from the environment: set HTTPS_PROXY")
    revision = source.revision or "main"
    try:
        found = huggingface_hub.hf_hub_download(
            repo_id,
            file_name,
            subfolder=source.subfolder or None,
            revision=revision,
            cache_dir=None if source.cache_dir is None else Path(source.cache_dir),
            force_download=source.force_download,
            local_files_only=source.local_files_only,
            token=source.token,
        )
    except (
        hub_errors.HFValidationError,
        hub_errors.EntryNotFoundError,
        hub_errors.HfHubHTTPError,
    ) as error:
        inside = f"{source.subfolder}/{file_name}" if source.subfolder else file_name
        raise OSError(_refusal(error, repo_id, revision, inside)) from error
    return Path(found)


def _refusal(error: Exception, repo_id: str, revision: str, file_name: str) -> str:
    """Return what the Hub's client could not do, and what to do about it."""
    from huggingface_hub import errors as hub_errors

    where = f"{repo_id!r} at revision {revision!r}"
    texts = {
        hub_errors.HFValidationError: f"{repo_id!r} is neither a folder here nor a valid "
        "repository name (owner/name)",
        hub_errors.GatedRepoError: f"{where} is gated: ask for access on its page, then give a "
        "token that has it",
        hub_errors.RepositoryNotFoundError: f"{repo_id!r} is neither a folder here nor a "
        "repository on the Hub that this token can see; for a private one, give `token` or run "
        "`hf auth login`",
        hub_errors.RevisionNotFoundError: f"{repo_id!r} has no revision {revision!r}",
        hub_errors.LocalEntryNotFoundError: f"{file_name} of {where} is not in the cache and "
        "cannot be fetched now; check the connection, or `local_files_only`",
        hub_errors.EntryNotFoundError: f"{where} has no file {file_name}",
    }
    known = [text for kind, text in texts.items() if isinstance(error, kind)]
    status = getattr(getattr(error, "response", None), "status_code", "an error")
    return known[0] if known else f"the Hub answered {status} for {file_name} of {where}"


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return {_FLOAT_TAG: name}
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_FLOAT_TAG} and value[_FLOAT_TAG] in _TAGGED_FLOATS:
            return _TAGGED_FLOATS[value[_FLOAT_TAG]]
        return {key: _decoded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    return value
