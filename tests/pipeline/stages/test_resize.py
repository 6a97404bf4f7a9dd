"""Stage `resize` from end to end, with transformers' own resize of the same model as the judge."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ckptd import errors
from ckptd.models import configuration
from tests.pipeline.stages.conftest import FAMILIES, ROWS, config_of, run, weights_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW_ROWS = 112
NOISE = 1e-5
"""More than the spread of new rows around the mean (3e-5 of a standard deviation of 0.05)."""


def resized_by_transformers(saved, path):
    """Return the folder in which transformers saves its own resize of the saved model."""
    model = type(saved.model).from_pretrained(saved.path)
    torch.manual_seed(1)
    model.resize_token_embeddings(NEW_ROWS)
    model.save_pretrained(path)
    return path


def old_part(value: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return value[tuple(slice(length) for length in old.shape)]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_tensor_and_the_config_are_as_transformers_makes_them(name, family, tmp_path) -> None:
    """The same shapes and sizes; old rows bit for bit; new ones as far from theirs as the noise."""
    saved = family(name)
    theirs_path = resized_by_transformers(saved, tmp_path / "theirs")
    run(saved.path, "- tie\n- resize: {pad_to_multiple_of: 16}", tmp_path / "ours")
    ours, theirs = weights_of(tmp_path / "ours"), weights_of(theirs_path)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for tensor, old in saved.weights.items():
        assert torch.equal(old_part(ours[tensor], old), old), tensor
        if name != "marian":  # its new rows are not made from the mean
            assert torch.allclose(ours[tensor], theirs[tensor], rtol=0, atol=NOISE), tensor
    integers = [configuration.integers(config_of(tmp_path / p)) for p in ("ours", "theirs")]
    assert integers[0] == integers[1]
    loaded = saved.load(tmp_path / "ours")
    # Another number of columns may be summed in another order.
    assert torch.allclose(saved.logits(loaded), saved.logits(saved.model), rtol=0, atol=NOISE)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "initializer_range"),
        ("bert", "initializer_range"),
        ("bart", "init_std"),
        ("gptj", "initializer_range"),
        ("opt", "init_std"),
        ("t5", "initializer_factor"),
    ],
)
def test_without_the_mean_new_rows_have_the_initial_spread(name, key, family, tmp_path) -> None:
    """`mean_resizing: false`: normal around zero, as spread as transformers makes them."""
    saved = family(name)
    rows = ROWS + 2000
    source = saved.modified(tmp_path / "source", config={key: 0.3})
    model = saved.load(source)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "theirs")
    run(source, f"- resize: {{to: {rows}, mean_resizing: false}}", tmp_path / "ours")
    theirs = weights_of(tmp_path / "theirs")
    for tensor, ours in weights_of(tmp_path / "ours").items():
        if ours.shape == saved.weights[tensor].shape:
            continue
        new, expected = ours[ROWS:].flatten(), theirs[tensor][ROWS:].flatten()
        if ours.dim() == 1 or ours.shape[0] == 1:
            assert torch.equal(ours, theirs[tensor]), tensor
        else:
            assert abs(new.std() / expected.std() - 1) < 0.03, tensor
            assert abs(new.mean()) < 0.03 * new.std(), tensor


def test_new_rows_spread_as_transformers_documents(family, tmp_path) -> None:
    """Around the mean, the covariance is that of the old rows (over n) times 1e-9."""
    saved = family("llama")
    wide = {n: v.double() for n, v in saved.weights.items()}  # float32 would round the noise
    source = saved.modified(tmp_path / "source", change=wide)
    run(source, "- resize: {to: 20099}", tmp_path / "out")
    old, new = wide[EMBEDDING], weights_of(tmp_path / "out")[EMBEDDING][ROWS:]
    scaled = (new - old.mean(0)) / 1e-9**0.5
    expected = torch.cov(old.T, correction=0)
    # The means are summed in float32 steps: their error counts here, their spread does not.
    found = torch.cov(scaled.T)
    assert torch.linalg.matrix_norm(found - expected) < 0.1 * torch.linalg.matrix_norm(expected)


def test_fewer_rows_than_columns_get_the_mean_itself(family, tmp_path) -> None:
    """Where the covariance cannot be positive definite, every new row is the mean, as in theirs."""
    saved = family("llama")
    few = {n: saved.weights[n][:20] for n in (EMBEDDING, HEAD)}
    source = saved.modified(tmp_path / "source", change=few, config={"vocab_size": 20})
    run(source, "- resize: {to: 32}", tmp_path / "out")
    model = saved.load(source)
    model.resize_token_embeddings(32)
    for tensor, value in ((EMBEDDING, model.model.embed_tokens), (HEAD, model.lm_head)):
        ours = weights_of(tmp_path / "out")[tensor]
        assert (ours[20:] == ours[20]).all()
        assert torch.allclose(ours, value.weight, rtol=1e-6, atol=1e-8)


def test_bfloat16_rows_are_rounded_once(family, tmp_path) -> None:
    """The new rows of a bfloat16 model are transformers' to one unit in the last place."""
    saved = family("llama")
    half = {name: value.bfloat16() for name, value in saved.weights.items()}
    source = saved.modified(tmp_path / "source", change=half, config={"dtype": "bfloat16"})
    run(source, "- resize: {to: 128}", tmp_path / "out")
    model = saved.load(source)
    model.resize_token_embeddings(128)
    ours = weights_of(tmp_path / "out")[EMBEDDING]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours[:ROWS], half[EMBEDDING])
    step = torch.finfo(torch.bfloat16).eps
    assert torch.allclose(ours.float(), model.model.embed_tokens.weight.float(), rtol=step)


def test_a_tied_pair_that_is_there_twice_stays_equal(family, tmp_path) -> None:
    """Without `tie`, embedding and equal head grow by equal rows."""
    saved = family("llama")
    twice = {HEAD: saved.weights[EMBEDDING].clone()}
    run(saved.modified(tmp_path / "source", change=twice), "- resize: {to: 300}", tmp_path / "out")
    out = weights_of(tmp_path / "out")
    assert torch.equal(out[EMBEDDING], out[HEAD])


def test_the_seed_decides_the_new_rows_and_nothing_else(family, tmp_path) -> None:
    """Equal seeds give equal files, another seed other new rows."""
    source = family("llama").path
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(source, f"- resize: {{to: 200, seed: {seed}}}", tmp_path / name)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    old, new = weights_of(tmp_path / "a")[HEAD], weights_of(tmp_path / "c")[HEAD]
    assert torch.equal(old[:ROWS], new[:ROWS])


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("to: 100", 100),
        ("to: 100, pad_to_multiple_of: 64", 128),
        ("pad_to_multiple_of: 64", 128),
        ("pad_to_multiple_of: 33", 99),
        ("to: 99", 99),
        ("to: 64, allow_shrink: true", 64),
        ("to: 65, pad_to_multiple_of: 64, allow_shrink: true", 128),
    ],
)
def test_the_number_of_rows_is_what_the_options_say(options, rows, family, tmp_path) -> None:
    """`to` is rounded up to the multiple; without it the rows that are there are."""
    saved = family("llama")
    run(saved.path, f"- resize: {{{options}}}", tmp_path / "out")
    out = weights_of(tmp_path / "out")
    assert len(out[EMBEDDING]) == len(out[HEAD]) == rows
    assert config_of(tmp_path / "out")["vocab_size"] == rows
    kept = min(rows, ROWS)
    assert torch.equal(out[HEAD][:kept], saved.weights[HEAD][:kept])
    saved.load(tmp_path / "out")


def test_padding_starts_from_the_rows_not_from_the_config(family, tmp_path) -> None:
    """A matrix that is already padded beyond `vocab_size` is not cut, and the config follows."""
    source = family("llama").modified(tmp_path / "source", config={"vocab_size": 90})
    run(source, "- resize: {pad_to_multiple_of: 9}", tmp_path / "out")
    assert len(weights_of(tmp_path / "out")[EMBEDDING]) == 99
    assert config_of(tmp_path / "out")["vocab_size"] == 99


def test_rows_are_never_lost_unasked(family, tmp_path) -> None:
    """Fewer rows than there are: refused, with the tensor and both numbers."""
    with pytest.raises(errors.StageRefused, match=r"at least 99 rows.*found 64") as caught:
        run(family("llama").path, "- resize: {to: 64}", tmp_path / "out")
    assert caught.value.tensor in (EMBEDDING, HEAD)


def test_token_ids_beyond_the_rows_are_told(family, tmp_path) -> None:
    """A shrink that leaves the config's eos id without a row is a warning, not a secret."""
    source = family("llama").modified(tmp_path / "source", config={"eos_token_id": 98})
    outcome = run(source, "- resize: {to: 64, allow_shrink: true}", tmp_path / "out")
    assert any("eos_token_id is 98" in text for text in outcome.reports["resize"]["warnings"])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A real tokenizer of 104 words, three of which were added."""
    words = {f"w{number}": number for number in range(100)} | {"<unk>": 100}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    fast.add_tokens([AddedToken("<image>"), AddedToken("<tool>", special=True)])
    fast.add_special_tokens({"pad_token": "<pad>"})
    assert len(fast) == 104
    return fast


def test_to_tokenizer_gives_each_token_a_row(tokenizer, family, tmp_path) -> None:
    """As many rows as transformers counts tokens, rounded up where a multiple is asked for."""
    saved = family("llama")
    source = saved.modified(tmp_path / "source")
    tokenizer.save_pretrained(source)
    run(source, "- resize: {to_tokenizer: true}", tmp_path / "exact")
    run(source, "- resize: {to_tokenizer: true, pad_to_multiple_of: 64}", tmp_path / "padded")
    assert len(weights_of(tmp_path / "exact")[EMBEDDING]) == len(tokenizer)
    assert len(weights_of(tmp_path / "padded")[EMBEDDING]) == 128
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "exact")
    ids = torch.tensor([again("w1 <tool> <image>")["input_ids"]])
    assert int(ids.max()) >= ROWS
    with torch.no_grad():
        assert saved.load(tmp_path / "exact")(ids).logits.isfinite().all()


def test_to_tokenizer_never_cuts_a_padded_matrix_unasked(tokenizer, family, tmp_path) -> None:
    """More rows than tokens stay, unless `allow_shrink` is set."""
    saved = family("llama")
    big = {n: torch.randn(128, 32) for n in (EMBEDDING, HEAD)}
    source = saved.modified(tmp_path / "source", change=big, config={"vocab_size": 128})
    tokenizer.save_pretrained(source)
    run(source, "- resize: {to_tokenizer: true}", tmp_path / "kept")
    run(source, "- resize: {to_tokenizer: true, allow_shrink: true}", tmp_path / "cut")
    assert len(weights_of(tmp_path / "kept")[HEAD]) == 128
    assert len(weights_of(tmp_path / "cut")[HEAD]) == 104
    assert config_of(tmp_path / "cut")["vocab_size"] == 104


def test_without_a_tokenizer_to_tokenizer_is_refused(family, tmp_path) -> None:
    """Nothing beside the weights says how many tokens there are."""
    with pytest.raises(errors.StageRefused, match="no tokenizer"):
        run(family("llama").path, "- resize: {to_tokenizer: true}", tmp_path / "out")


def test_a_table_that_cannot_be_placed_is_refused_by_name(family, tmp_path) -> None:
    """A tensor with vocabulary rows that the class does not have would be left behind."""
    extra = {"draft.embed_tokens.weight": torch.randn(99, 32)}
    source = family("llama").modified(tmp_path / "source", change=extra)
    with pytest.raises(errors.StageRefused, match=r"draft\.embed_tokens\.weight"):
        run(source, "- resize: {to: 128}", tmp_path / "out")


def test_a_quantized_embedding_is_refused_by_name(family, tmp_path) -> None:
    """Rows of packed numbers cannot be made."""
    packed = {EMBEDDING: torch.ones(99, 32, dtype=torch.int8)}
    source = family("llama").modified(tmp_path / "source", change=packed)
    with pytest.raises(errors.StageRefused, match="quantized") as caught:
        run(source, "- resize: {to: 128}", tmp_path / "out")
    assert caught.value.tensor == EMBEDDING


def test_a_resized_vocabulary_divides_into_shards(family, tmp_path) -> None:
    """Old rows, new rows and a cast in one pass, over several files: transformers loads the same."""
    saved = family("gpt2")
    stages = "- resize: {to: 1000}\n- cast: {dtype: bfloat16}\n- reshard: {max_shard_size: 10KB}"
    run(saved.path, stages, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    model = saved.load(tmp_path / "out")
    table = model.transformer.wte.weight
    assert table.shape == (1000, 32)
    assert torch.equal(table[:ROWS], saved.weights["transformer.wte.weight"].bfloat16())
    assert torch.equal(model.lm_head.weight, table)
