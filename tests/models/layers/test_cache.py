"""Caches keep what later queries may see, and can be cut, reordered and repeated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from ckptd.models.layers.cache import Cache, DynamicCache, EncoderDecoderCache, sliding_windows

HEADS, SIZE = 2, 4


def _states(num_positions: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, HEADS, num_positions, SIZE)
    return torch.randn(shape), torch.randn(shape)


def _config(**values: Any) -> Any:
    config = SimpleNamespace(num_hidden_layers=2, **values)
    config.get_text_config = lambda: config
    return config


def test_updates_give_everything_so_far() -> None:
    """Each update returns all positions written, in order, for keys and values."""
    cache = DynamicCache()
    first, second = _states(3), _states(2)
    cache.update(*first, 0)
    found = cache.update(*second, 0)
    assert cache.get_seq_length() == 5
    assert cache.get_seq_length(1) == 0
    for got, parts in zip(found, zip(first, second, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts, dim=2))


def test_an_empty_cache_is_still_a_cache() -> None:
    """A cache without layers counts none, and an encoder-decoder cache keeps the very object."""
    own = DynamicCache()
    assert len(own) == 0
    assert EncoderDecoderCache(own).self_attention_cache is own


@pytest.mark.parametrize("pieces", [[1] * 9, [9], [3, 1, 5], [4, 4, 1]])
def test_a_sliding_layer_returns_what_transformers_returns(pieces: list[int]) -> None:
    """With a window of 4, keys returned equal transformers', and `num_keys` foretells how many."""
    config = transformers.MistralConfig(sliding_window=4, num_hidden_layers=1)
    theirs, ours = transformers.DynamicCache(config=config), DynamicCache(config=config)
    for piece in pieces:
        key, value = _states(piece)
        foretold = ours.num_keys(piece)
        found, expected = ours.update(key, value, 0)[0], theirs.update(key, value, 0)[0]
        assert torch.equal(found, expected)
        assert found.shape[2] == foretold
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.layers[0].num_kept == 3


def test_what_slid_out_is_freed() -> None:
    """After a long prompt a sliding layer holds no view of all of it."""
    cache = DynamicCache(config=_config(sliding_window=4))
    cache.update(*_states(1000), 0)
    keys = cache.layers[0].keys
    assert keys is not None
    assert keys.untyped_storage().nbytes() == 3 * HEADS * 3 * SIZE * 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [None, None]),
        ({"sliding_window": 7}, [7, 7]),
        (
            {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
            [None, 7],
        ),
    ],
)
def test_windows_of_layers(values: dict[str, Any], expected: list[int | None]) -> None:
    """A window counts for the layers that slide, or for all where the kinds are not told."""
    assert sliding_windows(_config(**values)) == expected


@pytest.mark.parametrize(("length", "left"), [(2, 2), (-2, 3), (9, 5), (0, 0)])
def test_cropping(length: int, left: int) -> None:
    """A cache is cut to a length, or by a number of positions when that is negative."""
    cache = DynamicCache()
    key, value = _states(5)
    cache.update(key, value, 0)
    cache.crop(length)
    assert cache.get_seq_length() == left
    assert torch.equal(cache.layers[0].keys, key[:, :, :left])


def test_a_window_that_has_slid_cannot_go_back() -> None:
    """Cropping to positions that slid out of the window is refused."""
    cache = Cache([4])
    cache.update(*_states(6), 0)
    with pytest.raises(ValueError, match="keeps only the last 3"):
        cache.crop(5)


def test_rows_are_reordered_and_repeated() -> None:
    """Rows follow an index, may become fewer, and are repeated side by side."""
    cache = EncoderDecoderCache()
    key, value = _states(2)
    cache.update(key, value, 0)
    cache.cross_attention_cache.update(key, value, 0)
    cache.reorder(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        assert torch.equal(part.layers[0].keys, key[[2, 2, 0, 0]])


def test_a_given_cross_attention_cache_counts_as_written() -> None:
    """Layers that hold the encoder's keys are not written again."""
    cross = Cache()
    cross.update(*_states(2), 1)
    assert EncoderDecoderCache(None, cross).is_updated == {0: False, 1: True}


def test_reset_forgets_all_but_the_windows() -> None:
    """After a reset nothing is held, and layers still slide."""
    cache = Cache([4])
    cache.update(*_states(6), 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.update(*_states(6), 0)
    assert cache.layers[0].num_kept == 3
