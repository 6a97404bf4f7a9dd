"""Where the token comes from: systemd credentials, a file that only we can read, the environment.

Read anew for each client and after each refusal, so that a token that is replaced is used without a
restart. In this order, the first that is there:

1. `HF_TOKEN` (or `HUGGING_FACE_HUB_TOKEN`) of the environment;
2. `hf-token` in `$CREDENTIALS_DIRECTORY` (systemd's LoadCredential);
3. the file that `HF_TOKEN_PATH` names;
4. the login of huggingface_hub (`hf auth login`), in whatever form it keeps it.

A file that others can read is refused, not read: its token must be taken for known. Every token
that is found here is hidden from logs and errors from then on, whatever it looks like.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants, get_token

from ckptd import errors
from ckptd.hub import token_places
from ckptd.telemetry import logs

LONGEST_TOKEN_BYTES = 64 * 1024
"""Tokens of trusted publishers are JWTs of some KB; more than this is another file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token and where it was found."""

    text: str = field(repr=False)
    origin: str


def find(environ: Mapping[str, str] = os.environ) -> Token | None:
    """Return the token to use now, None where there is none. Reads files.

    Raises:
        errors.HubUnauthorized: a file of it cannot be used, and why; its content is not told.
    """
    found = _find(environ)
    if found is not None:
        logs.keep_secret(found.text)
    return found


def _find(environ: Mapping[str, str]) -> Token | None:
    for variable in token_places.VARIABLES:
        if text := environ.get(variable, "").strip():
            return Token(text=text, origin=variable)
    credentials = environ.get(token_places.CREDENTIALS_VARIABLE)
    if credentials and (path := Path(credentials, token_places.CREDENTIAL_NAME)).exists():
        return Token(text=_read(path, guarded=True), origin=str(path))
    if named := environ.get(token_places.PATH_VARIABLE):
        path = Path(named)
        guarded = bool(credentials) and path.is_relative_to(credentials or "")
        return Token(text=_read(path, guarded=guarded), origin=str(path))
    login = Path(constants.HF_TOKEN_PATH)
    if login.exists():
        _read(login, guarded=False)
    stored = get_token()
    return Token(text=stored, origin=str(login)) if stored else None


def _read(path: Path, *, guarded: bool) -> str:
    """Return the token in a file; `guarded` ones are protected by systemd, whatever their mode."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        hint = "name a file that this user can read in HF_TOKEN_PATH, or set HF_TOKEN"
        raise _refused(path, exc.strerror or "cannot be read", hint) from exc
    try:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode):
            raise _refused(path, "is no regular file", "put the token into a plain file")
        if not guarded:
            _check_private(path, seen)
        content = os.read(descriptor, LONGEST_TOKEN_BYTES + 1)
    finally:
        os.close(descriptor)
    text = content.strip().decode("utf-8", "replace")
    if not text:
        raise _refused(path, "is empty", "write the token into it, and nothing else")
    is_one = text.isascii() and text.isprintable() and " " not in text
    if len(content) > LONGEST_TOKEN_BYTES or not is_one:
        raise _refused(path, "holds more than a token", "write the token into it, and nothing else")
    return text


def _check_private(path: Path, seen: os.stat_result) -> None:
    """Refuse a file that anybody but this user (and root) may read or replace."""
    if seen.st_uid not in (os.geteuid(), 0):
        why = f"belongs to user {seen.st_uid}"
        raise _refused(path, why, f"run `chown {os.geteuid()} {path}`")
    if open_bits := stat.S_IMODE(seen.st_mode) & 0o077:
        who = "others" if open_bits & 0o007 else "its group"
        why = f"is open to {who} (mode {stat.S_IMODE(seen.st_mode):04o})"
        raise _refused(path, why, f"run `chmod 600 {path}`, and replace the token if it was shared")


def _refused(path: Path, why: str, hint: str) -> errors.HubUnauthorized:
    return errors.HubUnauthorized(f"the token file {path} {why}", hint=hint)
