"""Are the files beside the weights whole? Told from their content, as far as that can tell.

JSON that a model needs must be JSON; a tokenizer must have its vocabulary; a sentencepiece model
must end where its last field ends; nothing of these may be empty; a chat template must close what
it opens. Other text (a card, a list of merges) has no structure that would show a cut: only the
checkpoint before can, see `file_set`.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ckptd.checkpoint import index, sidefiles
from ckptd.checkpoint.listing import ListedFile
from ckptd.checkpoint.sidefiles import Fate
from ckptd.checkpoint.signs import template
from ckptd.errors import CheckpointCorrupt

_JSON = re.compile(
    r"^(config|generation_config|adapter_config|tokenizer|tokenizer_config|vocab|added_tokens"
    r"|special_tokens_map|chat_template|preprocessor_config|processor_config|image_processor_config"
    r"|video_preprocessor_config|feature_extractor_config|model_index|modules"
    r"|config_sentence_transformers|scheduler_config|[\w.]+\.index(\.\w+)?)\.json$"
)
_NEVER_EMPTY = re.compile(r"^(merges\.txt|vocab\.txt|.*\.(jinja|model|spm|tiktoken|json))$")
_VOCABULARIES = re.compile(
    r"^(tokenizer\.json|vocab.*|merges\.txt|.*\.(model|spm|tiktoken|bpe|vocab)|.*bpe.*|entity_vocab.*"
    r"|tokenization_.*\.py)$"
)
_BYTE_TOKENIZERS = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer", "Wav2Vec2")
"""Tokenizers without a file of their own."""
_MAX_DEPTH = 3
_MAX_TEMPLATE_BYTES = 4_000_000
_MAX_PIECES_BYTES = 100_000_000
_MAX_PIECES = 2_000_000
"""A sentencepiece model has some 250,000 pieces and 5 MB; what is far beyond is something else."""
_LONGEST_VARINT = 10
"""Bytes of a number in a protocol buffer, which has 64 bits."""


def check(path: Path, files: Iterable[ListedFile]) -> None:
    """Check the files beside the weights in the folder at `path`.

    Raises:
        CheckpointCorrupt: one of them is empty, or not whole.
        OSError: a file cannot be read.
    """
    for file in files:
        *folders, name = file.relpath.split("/")
        if len(folders) >= _MAX_DEPTH or any(part.startswith("checkpoint-") for part in folders):
            continue
        if file.size == 0 and _NEVER_EMPTY.match(name) and not name.startswith("."):
            raise CheckpointCorrupt(
                "is empty", path=path / file.relpath, hint="save again, or take it from the base"
            )
        if _JSON.match(name):
            _check_json(path / file.relpath)
        elif name.endswith((".model", ".spm")):
            _check_sentencepiece(path / file.relpath)


def doubts(path: Path, files: Iterable[ListedFile]) -> Iterator[str]:
    """Yield what looks as if more were to come beside the weights in the folder at `path`."""
    names = {file.relpath for file in files}
    if "tokenizer_config.json" in names and not any(_VOCABULARIES.match(name) for name in names):
        kind = index.read_json(path / "tokenizer_config.json").get("tokenizer_class")
        if not isinstance(kind, str) or not kind.startswith(_BYTE_TOKENIZERS):
            yield "tokenizer_config.json is there, and no vocabulary"
    for name in sorted(names):
        if name.endswith(".jinja") and not template.is_closed(_text(path / name)):
            yield f"{name} ends early"


def torn_state(folder: Path, files: Iterable[ListedFile]) -> Iterator[str]:
    """Yield which of the trainer's own files in `folder` are not whole, in words.

    They are not published, and nobody misses them; but torn, they say that the save has not ended.
    What cannot be read is left alone: it may be gone by now.
    """
    for file in files:
        if not file.relpath.endswith((".pt", ".pth", ".bin")):
            continue
        if sidefiles.fate(file.relpath) is not Fate.TRAINER_STATE:
            continue
        if file.size == 0 or _is_torn_zip(folder / file.relpath):
            yield f"{file.relpath} is not whole"


def is_zip(file: Path | BinaryIO) -> bool:
    """Return whether a file ends as a zip archive does."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # an end that names other disks
        return False


def _is_torn_zip(path: Path) -> bool:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
            return opened.read(4) == b"PK\x03\x04" and not is_zip(opened)
    except OSError:
        return False


def _text(path: Path) -> str:
    return path.read_bytes()[:_MAX_TEMPLATE_BYTES].decode("utf-8", "replace")


def _check_json(path: Path) -> None:
    """Anything that is JSON will do here: what must be in it, its readers say."""
    if path.stat().st_size > index.MAX_JSON_BYTES:
        return
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(
            f"not JSON: {error}", path=path, hint="save it again, or take it from the base model"
        ) from error


def _check_sentencepiece(path: Path) -> None:
    """Walk the fields of the protocol buffer: the last one must end with the file."""
    if path.stat().st_size > _MAX_PIECES_BYTES:
        return
    raw = path.read_bytes()
    if raw[:1] != b"\x0a":
        return  # not sentencepiece's: a name that others use, too
    try:
        end = _last_field_end(raw)
    except ValueError:
        return
    if end is not None and end > len(raw):
        raise CheckpointCorrupt(
            "is truncated", path=path, expected=f"at least {end} bytes", found=f"{len(raw)}",
            hint="save again, or take it from the base",
        )  # fmt: skip


def _last_field_end(raw: bytes) -> int | None:
    """Return where the last field says it ends; None where it is no protocol buffer of pieces."""
    at = 0
    for _ in range(_MAX_PIECES):
        if at >= len(raw):
            return at
        key, at = _varint(raw, at)
        match key & 7:
            case 0:
                _, at = _varint(raw, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(raw, at)
                at += length
            case 5:
                at += 4
            case _:
                return None
    return None


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at` and where it ends: past the end of `raw` where it is cut.

    Raises:
        ValueError: it is longer than any.
    """
    value = 0
    for shift in range(0, 7 * _LONGEST_VARINT, 7):
        if at >= len(raw):
            return value, at + 1
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("no number of a protocol buffer")
