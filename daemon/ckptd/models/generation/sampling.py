"""From a model's logits to the next token: pure functions, logits in, logits out.

A token that may not come has the logit -inf. The order in which the functions are applied, and the
arithmetic, are those of transformers, so that the same seed draws the same tokens.

Shapes: B sequences, T tokens so far, V vocabulary, K listed tokens, N length of an n-gram. Logits are
float32 `(B, V)`, token ids int64. Nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ckptd.models.generation.generation_config import GenerationConfig

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(ids_BT, logits_BV) -> logits_BV`, what `generate(logits_processor=[...])` takes as well."""


def divided(logits_BV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the logits at a temperature: below 1 sharper, above 1 flatter."""
    return logits_BV / temperature


def top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits of each row, and all that equal the smallest of them."""
    kept = min(k, logits_BV.shape[-1])
    lowest_B1 = torch.topk(logits_BV, kept).values[..., -1:]
    return logits_BV.masked_fill(logits_BV < lowest_B1, -math.inf)


def top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest most probable tokens whose probabilities add up to p, at least one."""
    ascending = torch.sort(logits_BV, descending=False)
    below_BV = ascending.values.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    below_BV[..., -1] = False
    dropped_BV = below_BV.scatter(-1, ascending.indices, below_BV)
    return logits_BV.masked_fill(dropped_BV, -math.inf)


def min_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the tokens at least p times as probable as the most probable one of the row."""
    probabilities_BV = logits_BV.softmax(dim=-1)
    threshold_B1 = p * probabilities_BV.amax(dim=-1, keepdim=True)
    dropped_BV = probabilities_BV < threshold_B1
    best_B1 = probabilities_BV.argmax(dim=-1, keepdim=True)
    return logits_BV.masked_fill(dropped_BV.scatter(-1, best_B1, False), -math.inf)


def penalized(
    logits_BV: torch.Tensor,
    ids_BT: torch.Tensor,
    penalty: float,
    padding_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Make the tokens that a row has already less likely, with a penalty above 1.

    Positive logits are divided by the penalty, negative ones multiplied. `padding_B` is the number of padding tokens at the left of each row; they do not count. Ids past
    the vocabulary are passed over.
    """
    vocabulary = logits_BV.shape[-1]
    if padding_B is not None:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        ids_BT = ids_BT.masked_fill(positions_T < padding_B[:, None], vocabulary)
    seen_BV = _marked(logits_BV, ids_BT)
    lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def without_repeated(logits_BV: torch.Tensor, ids_BT: torch.Tensor, n: int) -> torch.Tensor:
    """Forbid each token that would complete an n-gram which the row has already."""
    if ids_BT.shape[1] < n:
        return logits_BV
    grams_BWN = ids_BT.unfold(1, n, 1)
    ending_B1N = ids_BT[:, None, ids_BT.shape[1] + 1 - n :]
    again_BW = (grams_BWN[..., :-1] == ending_B1N).all(dim=-1)
    completing_BW = grams_BWN[..., -1].masked_fill(~again_BW, logits_BV.shape[-1])
    return logits_BV.masked_fill(_marked(logits_BV, completing_BW), -math.inf)


def without(logits_BV: torch.Tensor, tokens_K: torch.Tensor) -> torch.Tensor:
    """Forbid the tokens; ids past the vocabulary are passed over."""
    vocabulary_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    listed_V = torch.isin(vocabulary_V, tokens_K.to(logits_BV.device))
    return logits_BV.masked_fill(listed_V, -math.inf)


def only(logits_BV: torch.Tensor, tokens_K: torch.Tensor) -> torch.Tensor:
    """Forbid every token but these, which become equally likely.

    Raises:
        IndexError: an id is past the vocabulary.
    """
    forced_BV = torch.full_like(logits_BV, -math.inf)
    forced_BV[:, tokens_K.to(logits_BV.device)] = 0
    return forced_BV


def chosen(logits_BV: torch.Tensor, *, sample: bool) -> torch.Tensor:
    """Return the next token of each row, `(B,)`: the likeliest, or drawn with torch's generator."""
    if not sample:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial(logits_BV.softmax(dim=-1), num_samples=1).squeeze(1)


def _marked(logits_BV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return a mask like the logits, true at the ids of each row that are in the vocabulary."""
    rows, vocabulary = logits_BV.shape
    marks = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=logits_BV.device)
    marks.scatter_(1, ids_BT.to(logits_BV.device).clamp(max=vocabulary), True)
    return marks[:, :vocabulary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What the processors must know of the sequences before the first token is chosen."""

    num_tokens: int
    """T at the start: the prompt of a decoder, or what the decoder of an encoder-decoder begins with."""
    left_padding: torch.Tensor | None
    """`(B,)`, padding tokens at the left of each row; None where there are none."""
    eos_tokens: torch.Tensor | None
    """`(K,)`, tokens that end a sequence; None where nothing does."""


def processors(
    config: GenerationConfig, start: Start, custom: Iterable[Processor] = ()
) -> list[Processor]:
    """Return what is to be done with each step's logits, in order.

    First what the settings forbid or weaken, then the caller's own processors, then, when sampling,
    temperature, top-k, top-p and min-p. `config.max_length` counts all tokens here.

    Raises:
        ValueError: a setting is out of its range.
    """
    steps = [*_weakened(config, start), *_forbidden(config, start), *custom]
    if config.do_sample:
        steps += _narrowed(config)
    if config.renormalize_logits:
        steps.append(lambda _, logits_BV: logits_BV.log_softmax(dim=-1))
    return steps


def applied(
    steps: Iterable[Processor], ids_BT: torch.Tensor, logits_BV: torch.Tensor
) -> torch.Tensor:
    """Return the logits after every processor."""
    for step in steps:
        logits_BV = step(ids_BT, logits_BV)
    return logits_BV


def _weakened(config: GenerationConfig, start: Start) -> list[Processor]:
    """Return the processors that look at the tokens so far."""
    steps: list[Processor] = []
    penalty, n = config.repetition_penalty, config.no_repeat_ngram_size
    if penalty is not None and penalty != 1:
        _require(penalty > 0, "repetition_penalty", penalty, "above 0")
        steps.append(lambda ids, logits: penalized(logits, ids, penalty, start.left_padding))
    if n:
        _require(n > 0, "no_repeat_ngram_size", n, "0 or more")
        steps.append(lambda ids, logits: without_repeated(logits, ids, n))
    return steps


def _forbidden(config: GenerationConfig, start: Start) -> list[Processor]:
    """Return the processors that forbid or force tokens at certain lengths."""
    steps: list[Processor] = []
    least = max(config.min_length or 0, start.num_tokens + (config.min_new_tokens or 0))
    eos_K = start.eos_tokens
    if eos_K is not None and least > start.num_tokens:
        steps.append(_when(lambda num_tokens: num_tokens < least, without, eos_K))
    if config.forced_bos_token_id is not None:
        bos_K = torch.tensor([config.forced_bos_token_id])
        steps.append(_when(lambda num_tokens: num_tokens == 1, only, bos_K))
    if config.forced_eos_token_id is not None and config.max_length is not None:
        last, forced = config.max_length - 1, config.forced_eos_token_id
        forced_K = torch.tensor([forced] if isinstance(forced, int) else forced)
        steps.append(_when(lambda num_tokens: num_tokens == last, only, forced_K))
    if config.suppress_tokens is not None:
        suppressed_K = torch.tensor(list(config.suppress_tokens), dtype=torch.long)
        steps.append(_when(lambda _: True, without, suppressed_K))
    if config.begin_suppress_tokens is not None:
        after_bos = start.num_tokens <= 1 and config.forced_bos_token_id is not None
        first = start.num_tokens + after_bos
        begin_K = torch.tensor(list(config.begin_suppress_tokens), dtype=torch.long)
        steps.append(_when(lambda num_tokens: num_tokens == first, without, begin_K))
    return steps


def _narrowed(config: GenerationConfig) -> list[Processor]:
    """Return the processors of sampling."""
    steps: list[Processor] = []
    temperature, k, p, least = config.temperature, config.top_k, config.top_p, config.min_p
    if temperature is not None and temperature != 1:
        _require(temperature > 0, "temperature", temperature, "above 0 (greedy: do_sample=False)")
        steps.append(lambda _, logits: divided(logits, temperature))
    if k is not None and k != 0:
        _require(k > 0, "top_k", k, "0 (off) or more")
        steps.append(lambda _, logits: top_k(logits, k))
    if p is not None and p < 1:
        _require(p >= 0, "top_p", p, "from 0 to 1")
        steps.append(lambda _, logits: top_p(logits, p))
    if least is not None:
        _require(0 <= least <= 1, "min_p", least, "from 0 to 1")
        steps.append(lambda _, logits: min_p(logits, least))
    return steps


def _when(
    wanted: Callable[[int], bool],
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokens_K: torch.Tensor,
) -> Processor:
    """Return a processor that acts only at the lengths `wanted`."""

    def step(ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        return change(logits_BV, tokens_K) if wanted(ids_BT.shape[1]) else logits_BV

    return step


def _require(fits: bool, name: str, value: float, expected: str) -> None:
    """Refuse a setting out of its range."""
    if not fits:
        raise ValueError(f"{name} must be {expected}, not {value}")
