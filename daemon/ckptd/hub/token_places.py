"""The places where a token may lie, without the Hub's client: for the daemon, which never loads it.

`tokens` decides which of them counts, and whether it may be believed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PATH_VARIABLE = "HF_TOKEN_PATH"
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
CREDENTIAL_NAME = "hf-token"


def paths(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the files that may hold a token, whether they are there or not."""
    found = []
    if credentials := environ.get(CREDENTIALS_VARIABLE):
        found.append(Path(credentials, CREDENTIAL_NAME))
    if named := environ.get(PATH_VARIABLE):
        found.append(Path(named))
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{cache}/huggingface"
    found.append(Path(home, "token").expanduser())
    return found


def texts(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return every token there is, to be kept out of logs; a file that cannot be read has none."""
    found = [environ.get(name, "").strip() for name in VARIABLES]
    for path in paths(environ):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.is_file():
                found.append(path.read_text().strip())
    return [text for text in found if text]


def state(environ: Mapping[str, str] = os.environ) -> tuple[tuple[int, int, int, int], ...]:
    """Return what changes when a token file is replaced, rewritten or opened to this user."""
    seen = []
    for path in paths(environ):
        try:
            found = path.stat()
        except OSError:
            seen.append((0, 0, 0, 0))
        else:
            seen.append((found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return tuple(seen)
