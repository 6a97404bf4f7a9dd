"""How many rows a tokenizer needs, with transformers' and tokenizers' own files."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ckptd import errors
from ckptd.checkpoint.beside import SideFile
from ckptd.pipeline import tokenizer

WORDS = {"<unk>": 0} | {f"w{number}": number for number in range(1, 50)}
MODELS = {
    "word level": lambda: models.WordLevel(WORDS, unk_token="<unk>"),
    "word piece": lambda: models.WordPiece(WORDS, unk_token="<unk>"),
    "bpe": lambda: models.BPE(WORDS, [], unk_token="<unk>"),
    "unigram": lambda: models.Unigram([(word, -1.0) for word in WORDS], unk_id=0),
}


def num_ids(folder):
    files = tuple(
        SideFile(relpath=path.name, path=path, nbytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
    )
    return tokenizer.num_ids(files, folder)


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("added", [0, 3])
def test_it_is_what_transformers_counts(kind, added, tmp_path) -> None:
    """Base vocabulary and added tokens of every kind of fast tokenizer."""
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(MODELS[kind]()), unk_token="<unk>")
    fast.add_tokens([AddedToken(f"<extra{number}>", special=True) for number in range(added)])
    fast.save_pretrained(tmp_path)
    assert num_ids(tmp_path) == len(fast) == 50 + added


def test_tokens_that_were_there_already_need_no_row(tmp_path) -> None:
    """Marking a word as special adds none."""
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(MODELS["bpe"]()), unk_token="<unk>")
    fast.add_special_tokens({"pad_token": "w1", "eos_token": "w2"})
    fast.save_pretrained(tmp_path)
    assert num_ids(tmp_path) == 50


def test_the_highest_id_counts_not_their_number(tmp_path) -> None:
    """Ids with holes: the last one needs its row, too."""
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 7}}, "added_tokens": [{"id": 90}]})
    )
    assert num_ids(tmp_path) == 91


def test_a_word_list_is_read(tmp_path) -> None:
    """vocab.txt has a token a line; added ones stand in tokenizer_config.json."""
    (tmp_path / "vocab.txt").write_text("".join(f"w{number}\n" for number in range(60)))
    assert num_ids(tmp_path) == 60
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"64": {}}}')
    assert num_ids(tmp_path) == 65


def test_a_word_map_is_read(tmp_path) -> None:
    """vocab.json gives the base; added ones stand in added_tokens.json."""
    (tmp_path / "vocab.json").write_text(json.dumps(WORDS))
    (tmp_path / "added_tokens.json").write_text('{"<image>": 55}')
    assert num_ids(tmp_path) == 56


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "chat.json"])
def test_without_a_base_vocabulary_it_is_refused(name, tmp_path) -> None:
    """Added tokens alone say nothing about the base; the message says what to do."""
    (tmp_path / name).write_text('{"<image>": 55, "added_tokens_decoder": {"7": {}}}')
    with pytest.raises(errors.StageRefused, match="give the number of rows with `to`"):
        num_ids(tmp_path)


def test_a_broken_file_is_named(tmp_path) -> None:
    """tokenizer.json cut off in the middle."""
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a"')
    with pytest.raises(errors.CheckpointCorrupt, match=r"tokenizer\.json"):
        num_ids(tmp_path)
