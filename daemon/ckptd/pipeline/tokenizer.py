"""How many rows a tokenizer needs: its highest token id plus one, from its files alone.

tokenizer.json (the fast tokenizers' file) or one of the older vocabularies gives the base; added
tokens come from wherever they are kept. The highest id counts, not the number of tokens: ids may
have holes, and a row must exist for each id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptd.checkpoint import index
from ckptd.checkpoint.beside import SideFile
from ckptd.errors import StageRefused


def num_ids(side_files: Sequence[SideFile], source_path: Path) -> int:
    """Return the number of rows the tokenizer among `side_files` needs.

    Raises:
        StageRefused: there is no tokenizer, or none of a kind whose size can be read.
        CheckpointCorrupt: one of its files is not JSON.
    """
    files = {file.relpath: file.path for file in side_files}
    base = [*_base_ids(files)]
    if not base:
        raise StageRefused(
            "there is no tokenizer whose size can be read",
            stage="resize",
            path=source_path,
            expected="tokenizer.json, vocab.json or vocab.txt",
            found=", ".join(name for name in files if "token" in name or "vocab" in name) or "none",
            hint="give the number of rows with `to`, or the tokenizer with `assets:`",
        )
    return max([*base, *_added_ids(files)]) + 1


def _base_ids(files: Mapping[str, Path]) -> Iterator[int]:
    if "tokenizer.json" in files:
        value = index.read_json(files["tokenizer.json"])
        model = value.get("model")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
        if isinstance(vocabulary, Mapping):
            yield from _integers(vocabulary.values())
        elif isinstance(vocabulary, list):
            yield len(vocabulary) - 1
        added = value.get("added_tokens")
        for token in added if isinstance(added, list) else ():
            if isinstance(token, Mapping):
                yield from _integers([token.get("id")])
    elif "vocab.json" in files:
        yield from _integers(index.read_json(files["vocab.json"]).values())
    elif "vocab.txt" in files:
        yield len(files["vocab.txt"].read_bytes().splitlines()) - 1


def _added_ids(files: Mapping[str, Path]) -> Iterator[int]:
    if "added_tokens.json" in files:
        yield from _integers(index.read_json(files["added_tokens.json"]).values())
    if "tokenizer_config.json" in files:
        decoder = index.read_json(files["tokenizer_config.json"]).get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            yield from (int(key) for key in decoder if str(key).isdecimal())


def _integers(values: Any) -> Iterator[int]:
    return (value for value in values if type(value) is int)
