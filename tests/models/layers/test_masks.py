"""Masks say exactly which key each query may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptd.models.layers import masks

CPU = torch.device("cpu")


def _seen(mask: torch.Tensor | None) -> torch.Tensor:
    assert mask is not None
    return mask if mask.dtype == torch.bool else mask == 0


def _causal(attention_mask: torch.Tensor | None, **values: Any) -> torch.Tensor | None:
    return masks.causal_mask(attention_mask, dtype=torch.float32, device=CPU, **values)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("past", "kept"), [(0, 0), (6, 6), (6, 2)])
def test_causal_by_definition(
    past: int, kept: int, window: int | None, implementation: str
) -> None:
    """Key k is seen by query q if it is no later, within the window, and no padding."""
    queries = 4
    padding = torch.ones(2, past + queries, dtype=torch.int64)
    padding[0, :2], padding[1, -1] = 0, 0
    found = _seen(
        _causal(
            padding,
            num_queries=queries,
            num_keys=kept + queries,
            past=past,
            window=window,
            implementation=implementation,
        )
    )
    for row in range(2):
        for at in range(queries):
            for slot in range(kept + queries):
                query, key = past + at, past - kept + slot
                expected = key <= query and bool(padding[row, key])
                if window is not None:
                    expected = expected and key > query - window
                assert bool(found[row, 0, at, slot]) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"num_queries": 5, "num_keys": 5, "past": 0},
        {"num_queries": 5, "num_keys": 5, "past": 0, "window": 5},
        {"num_queries": 1, "num_keys": 8, "past": 7},
        {"num_queries": 1, "num_keys": 4, "past": 7, "window": 4},
    ],
)
def test_none_where_plain_causal_suffices(values: dict[str, Any]) -> None:
    """No mask is made where every key is a token and causality says the rest."""
    ones = torch.ones(2, values["past"] + values["num_queries"])
    assert _causal(None, **values) is None
    assert _causal(ones, **values) is None


def test_a_second_piece_of_the_prompt_needs_a_mask() -> None:
    """Several queries after a past are not square, so the mask is spelled out."""
    found = _causal(None, num_queries=2, num_keys=5, past=3)
    assert _seen(found)[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_hidden_keys_are_finite() -> None:
    """An additive mask holds zero or the dtype's minimum, in the dtype asked for."""
    mask = masks.causal_mask(
        None, num_queries=2, num_keys=3, past=1, dtype=torch.bfloat16, device=CPU
    )
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.bfloat16).min}


def test_a_mask_too_short_is_refused() -> None:
    """The attention mask must cover the cache and the new positions."""
    with pytest.raises(ValueError, match="covers 2 positions, expected 5"):
        _causal(torch.ones(1, 2), num_queries=2, num_keys=5, past=3)


def test_a_mask_too_long_is_cut() -> None:
    """Positions beyond the present ones (a mask of a static length) do not matter."""
    long = torch.ones(1, 9)
    long[0, 5:] = 0
    assert _causal(long, num_queries=5, num_keys=5, past=0) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_callers_own_mask_passes(dtype: torch.dtype) -> None:
    """Four dimensions are taken as they are; kept keys are the last ones."""
    seen = torch.rand(2, 1, 3, 6) > 0.5
    own: torch.Tensor = seen.to(dtype)
    if dtype == torch.float32:
        own = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    found = _causal(own, num_queries=3, num_keys=4, past=3)
    assert torch.equal(_seen(found), seen[..., -4:])


def test_packed_sequences_do_not_see_each_other() -> None:
    """Where positions start anew, a sequence begins that sees nothing before it."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    found = _causal(None, num_queries=5, num_keys=5, past=0, position_ids=positions)
    expected = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool().tril()
    assert torch.equal(_seen(found)[0, 0], expected)


def test_positions_that_go_on_need_no_mask() -> None:
    """Positions that only start elsewhere are one sequence."""
    positions = torch.arange(3, 8)[None]
    assert _causal(None, num_queries=5, num_keys=5, past=0, position_ids=positions) is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bidirectional(implementation: str) -> None:
    """An encoder's mask hides padding from every query; two and three dimensions are read."""
    padding = torch.tensor([[1, 1, 0], [1, 1, 1]])
    by_query = padding[:, None, :].expand(-1, 4, -1)
    for given in (padding, by_query):
        found = masks.bidirectional_mask(
            given, num_queries=4, dtype=torch.float32, device=CPU, implementation=implementation
        )
        assert torch.equal(_seen(found).expand(2, 1, 4, 3), by_query[:, None].bool())


def test_bidirectional_without_padding_is_none() -> None:
    """Where everything is seen there is no mask."""
    for given in (None, torch.ones(2, 3)):
        assert (
            masks.bidirectional_mask(given, num_queries=3, dtype=torch.float32, device=CPU) is None
        )


def test_bidirectional_window() -> None:
    """A window looks both ways, keys that far away being hidden."""
    found = masks.bidirectional_mask(None, num_queries=4, dtype=torch.float32, device=CPU, window=2)
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    assert torch.equal(_seen(found)[0, 0], distance < 2)
