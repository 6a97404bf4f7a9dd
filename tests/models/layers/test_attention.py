"""Attention's two implementations agree with each other and with the definition."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from ckptd.models.layers import attention

BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 4, 5, 7, 8


def _inputs(groups: int, queries: int = QUERIES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, queries), (groups, KEYS), (groups, KEYS))
    made = [torch.randn(BATCH, heads, n, SIZE, generator=generator) for heads, n in shapes]
    return made[0], made[1], made[2]


def _by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the result (B, T, H, D), one query and one head at a time."""
    out = torch.zeros(BATCH, query.shape[2], HEADS, SIZE)
    share = HEADS // key.shape[1]
    for row in range(BATCH):
        for head in range(HEADS):
            for at in range(query.shape[2]):
                scores = key[row, head // share] @ query[row, head, at] * scale
                scores[~seen[row, at]] = -math.inf
                out[row, at, head] = scores.softmax(-1) @ value[row, head // share]
    return out


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masked(implementation: str, groups: int, queries: int, kind: torch.dtype) -> None:
    """A boolean and an additive mask give what the definition gives, for any grouping of heads."""
    query, key, value = _inputs(groups, queries)
    seen = torch.rand(BATCH, queries, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
    seen[..., 0] = True
    mask = seen[:, None]
    if kind == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    found, _ = attention.attend(implementation, query, key, value, mask, scale=0.3)
    torch.testing.assert_close(found, _by_definition(query, key, value, seen, 0.3))


@pytest.mark.parametrize("queries", [1, 3, KEYS])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_causal_without_mask(implementation: str, queries: int) -> None:
    """Without a mask the last query sees all keys, each earlier one a key less."""
    query, key, value = _inputs(2, queries)
    seen = torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries)
    found, _ = attention.attend(implementation, query, key, value, None, scale=0.3, is_causal=True)
    expected = _by_definition(query, key, value, seen.expand(BATCH, -1, -1), 0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_that_see_nothing_are_finite(implementation: str) -> None:
    """Fully padded queries give finite values and gradients."""
    query, key, value = (part.requires_grad_() for part in _inputs(2))
    mask = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[0, :, :2] = False
    found, _ = attention.attend(implementation, query, key, value, mask, scale=0.3)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(part.grad.isfinite().all() for part in (query, key, value))


def test_biases_are_added() -> None:
    """A floating mask may hold any bias, a head or a query each (T5)."""
    query, key, value = _inputs(4)
    bias = torch.randn(1, HEADS, QUERIES, KEYS)
    eager, _ = attention.attend("eager", query, key, value, bias, scale=1.0)
    sdpa, _ = attention.attend("sdpa", query, key, value, bias, scale=1.0)
    torch.testing.assert_close(sdpa, eager)


def test_a_bias_by_head_survives_grouping() -> None:
    """In a decoding step with grouped heads, each head keeps its own bias."""
    query, key, value = _inputs(2, 1)
    bias = torch.randn(BATCH, HEADS, 1, KEYS)
    eager, _ = attention.attend("eager", query, key, value, bias, scale=1.0)
    sdpa, _ = attention.attend("sdpa", query, key, value, bias, scale=1.0)
    torch.testing.assert_close(sdpa, eager)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_are_given_where_wanted(implementation: str) -> None:
    """Weights (B, H, T, S) sum to one a query, whichever implementation was asked for."""
    query, key, value = _inputs(2)
    found, weights = attention.attend(
        implementation, query, key, value, None, scale=0.3, want_weights=True
    )
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, QUERIES))
    wide = value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(found, (weights @ wide).transpose(1, 2))


def test_scores_are_bounded_before_masking() -> None:
    """A soft-cap bends the scores, and masked keys stay hidden."""
    query, key, value = _inputs(4)
    seen = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    seen[..., -1] = False
    args = (query * 10, key, value, seen)
    _, weights = attention.attend("sdpa", *args, scale=1.0, softcap=2.0, want_weights=True)
    scores = torch.tanh(query * 10 @ key.transpose(2, 3) / 2.0) * 2.0
    torch.testing.assert_close(weights, scores.masked_fill(~seen, -math.inf).softmax(-1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_is_for_training(implementation: str) -> None:
    """Weights are dropped in training and never else."""
    query, key, value = _inputs(2)

    def run(training: bool) -> torch.Tensor:
        return attention.attend(
            implementation, query, key, value, None, scale=0.3, dropout=0.9, training=training
        )[0]

    assert torch.equal(run(training=False), run(training=False))
    assert not torch.allclose(run(training=True), run(training=False))


def test_heads_that_do_not_group_are_refused() -> None:
    """Query heads that are no multiple of key-value heads are refused."""
    query, key, value = _inputs(3)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        attention.attend("eager", query, key, value, None, scale=1.0)


def one(supports: bool) -> type:
    """Return a class that supports sdpa and flash attention, or neither."""
    return type("X", (), {"_supports_sdpa": supports, "_supports_flash_attn": supports})


@pytest.mark.parametrize(
    ("requested", "supports_sdpa", "expected"),
    [
        (None, True, "sdpa"),
        (None, False, "eager"),
        ("sdpa", True, "sdpa"),
        ("eager", True, "eager"),
        ("eager", False, "eager"),
    ],
)
def test_resolved_names(requested: str | None, supports_sdpa: bool, expected: str) -> None:
    """Nothing asked for means sdpa where the class supports it."""
    found = attention.resolve(requested, one(supports_sdpa))
    assert found == expected


@pytest.mark.parametrize(
    ("requested", "kind", "text"),
    [
        ("flash_attention_2", ImportError, "needs the package `flash_attn`"),
        ("flash_attention_3", ImportError, "needs the package `flash_attn_interface`"),
        ("kernels-community/flash-attn", ImportError, "package `kernels`"),
        ("kernels-community/flash-attn@v1:fn", ImportError, "package `kernels`"),
        ("quick", ValueError, 'attn_implementation="quick"` is not supported'),
        ("paged|sdpa", ValueError, "is not supported"),
    ],
)
def test_what_cannot_run_is_refused(requested: str, kind: type[Exception], text: str) -> None:
    """Missing packages are import errors that name the package, unknown names value errors."""
    if kind is ImportError and importlib.util.find_spec(text.split("`")[1]) is not None:
        pytest.skip("the package is installed here")
    with pytest.raises(kind, match=text):
        attention.resolve(requested, one(True))


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2"])
def test_what_does_not_fit_is_refused(name: str) -> None:
    """A class whose scores are altered refuses what cannot do that, whether installed or not."""
    with pytest.raises(ValueError, match=f"X does not support `{name}`"):
        attention.resolve(name, one(False))
