"""`GenerationMixin`: sequences from a model with a language modelling head.

Greedy decoding and sampling, token by token, with a key-value cache or without, for decoders and for
encoder-decoder models. Tokens, and what a seed draws, are those of transformers; what there is not
(beam search, assistants, stop strings) is refused, never approximated.

`generation_inputs` prepares a call, `sampling` holds what is done with logits; here are the loop
and the public methods.

Shapes: B sequences, T tokens, V vocabulary, N new tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ckptd.models.generation import generation_inputs, generation_rules, sampling, stopping
from ckptd.models.generation.generation_config import GenerationConfig
from ckptd.models.generation.generation_inputs import Request
from ckptd.models.layers.outputs import ModelOutput


@dataclass(eq=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """What a decoder made: `sequences` (B, T) int64, and a tuple entry a new token for the rest.

    `scores` (B, V) float32 after all processors, `logits` (B, V) float32 as the model gave them,
    `attentions` and `hidden_states` as its forward returned them.
    """

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass(eq=False)
class GenerateEncoderDecoderOutput(ModelOutput):
    """What an encoder-decoder model made; see `GenerateDecoderOnlyOutput`."""

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[Any, ...] | None = None
    cross_attentions: tuple[Any, ...] | None = None
    decoder_hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


@dataclass(slots=True)
class _Record:
    """What was asked for beside the tokens, one entry a step."""

    config: GenerationConfig
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    attentions: list[Any] = field(default_factory=list)
    cross_attentions: list[Any] = field(default_factory=list)
    hidden_states: list[Any] = field(default_factory=list)

    def add(self, answer: Any, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> None:
        """Keep what the settings ask for of one step."""
        if not self.config.return_dict_in_generate:
            return
        prefix = "decoder_" if hasattr(answer, "decoder_attentions") else ""
        if self.config.output_scores:
            self.scores.append(scores_BV)
        if self.config.output_logits:
            self.logits.append(logits_BV)
        if self.config.output_attentions:
            self.attentions.append(getattr(answer, f"{prefix}attentions"))
            self.cross_attentions.append(getattr(answer, "cross_attentions", None))
        if self.config.output_hidden_states:
            self.hidden_states.append(getattr(answer, f"{prefix}hidden_states"))


class GenerationMixin:
    """Gives a model class `generate`; the model also derives from `PreTrainedModel`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[sampling.Processor] | None = None,
        stopping_criteria: Iterable[stopping.Criterion] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return sequences of token ids `(B, T)` int64 that continue the inputs.

        A decoder's sequences start with its prompt (not where it came as `inputs_embeds`), those of
        an encoder-decoder model with the decoder's start token. Rows that end early are filled with
        the pad token. With `return_dict_in_generate`, a `GenerateDecoderOnlyOutput` or
        `GenerateEncoderDecoderOutput`. The model's training mode, its configurations and the
        caller's are left alone; sampling draws from torch's global generator.

        Args:
            inputs: ids `(B, T)`; batches are padded at the left. None: one `bos_token_id`.
            generation_config: settings for this call; those it leaves open are the model's.
            logits_processor: callables `(ids_BT, logits_BV) -> logits_BV`, after the settings' own
                and before those of sampling.
            stopping_criteria: callables `(ids_BT, scores) -> bool or (B,) bool`, beside length and
                `eos_token_id`; `scores` is None unless `output_scores` is set.
            streamer: an object with `put(ids)` and `end()`; gets the prompt, then every step.
            kwargs: settings by name, which come first, and arguments of the model's forward, such
                as `attention_mask` (inferred from pad tokens where absent), `position_ids`,
                `past_key_values` (with the whole sequence, or the whole mask).

        Raises:
            ValueError: what is not supported, a setting out of range, an argument that the model
                does not know, or no room for a new token.
        """
        refused = {
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus or None,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        _require_absent(refused)
        for unused in ("tokenizer", "assistant_tokenizer", "trust_remote_code"):
            kwargs.pop(unused, None)
        if (cache := kwargs.pop("cache", None)) is not None:
            kwargs.setdefault("past_key_values", cache)
        config, model_kwargs = generation_inputs.settled(self, generation_config, kwargs)
        request = generation_inputs.prepared(self, inputs, config, model_kwargs)
        steps = sampling.processors(config, _start(self, request), logits_processor or ())
        criteria = stopping.criteria(
            config,
            eos_tokens=request.eos_tokens,
            max_positions=getattr(cast(Any, self).config, "max_position_embeddings", None),
            custom=stopping_criteria or (),
        )
        return _decoded(cast(Any, self), request, steps, criteria, streamer)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the model's forward for one step.

        Only the last `next_sequence_length` tokens are given (all where it is None), with as many
        positions; the mask stays whole. `inputs_embeds` stand for the prompt in the first step.
        Tensors are moved to the model's device.
        """
        model = cast(Any, self)
        seq2seq = bool(model.config.is_encoder_decoder)
        prefix = "decoder_" if seq2seq else ""
        last = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        made: dict[str, Any] = dict(kwargs)
        if inputs_embeds is not None and is_first_iteration and not seq2seq:
            made["inputs_embeds"] = inputs_embeds[:, last]
            num_tokens = made["inputs_embeds"].shape[1]
        else:
            made[f"{prefix}input_ids"] = input_ids[:, last].contiguous()
            num_tokens = input_ids[:, last].shape[1]
        made["past_key_values"] = past_key_values
        made["attention_mask"] = attention_mask
        for name in (f"{prefix}position_ids", "token_type_ids"):
            if made.get(name) is not None:
                made[name] = made[name][..., -num_tokens:]
        found = {name: value for name, value in made.items() if value is not None}
        return generation_inputs.moved(found, model.device)

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """Return the score of each new token, `(B, N)` float32.

        Args:
            sequences: `(B, T)` as `generate` returned them, T at least N.
            scores: N tensors `(B, V)` as `generate` returned them.
            beam_indices: there are no beams here.
            normalize_logits: whether to return log-probabilities.

        Raises:
            ValueError: beam indices were given.
        """
        if beam_indices is not None:
            raise ValueError("beam_indices: beam search is not supported")
        scores_BVN = torch.stack(tuple(scores), dim=-1)
        if normalize_logits:
            scores_BVN = scores_BVN.log_softmax(dim=1)
        new_BN = sequences[:, sequences.shape[1] - len(scores) :]
        return scores_BVN.gather(1, new_BN[:, None, :])[:, 0, :]


def _require_absent(arguments: dict[str, Any]) -> None:
    """Refuse arguments of `generate` that nobody here follows."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"generate() does not support {', '.join(given)}; it does {generation_rules.SUPPORTED}"
        )


def _start(model: Any, request: Request) -> sampling.Start:
    """Return what the processors must know: lengths, endings, and where each row's padding stops."""
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    mask_BT: Any = request.model_kwargs.get(name)
    fits = isinstance(mask_BT, torch.Tensor) and mask_BT.shape == request.ids.shape
    return sampling.Start(
        num_tokens=request.ids.shape[1],
        left_padding=mask_BT.ne(0).int().argmax(dim=1) if fits else None,
        eos_tokens=request.eos_tokens,
    )


def _decoded(
    model: Any,
    request: Request,
    steps: list[sampling.Processor],
    criteria: list[stopping.Criterion],
    streamer: Any,
) -> Any:
    """Add tokens until every sequence is finished; see `GenerationMixin.generate`."""
    config, ids_BT, pad = request.config, request.ids, request.pad_token
    fills = pad is not None and any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    record = _Record(config)
    live_B = torch.ones(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    num_given: int | None = _num_unseen(model, request)
    first = True
    if streamer is not None:
        streamer.put(ids_BT.cpu())
    while bool(live_B.any()):
        answer = _step(model, ids_BT, num_given, request.model_kwargs, first=first)
        num_given, first = (1 if config.use_cache else None), False
        logits_BV = answer.logits[:, -1].to(ids_BT.device, torch.float32, copy=True)
        scores_BV = sampling.applied(steps, ids_BT, logits_BV)
        record.add(answer, logits_BV, scores_BV)
        del answer
        next_B = sampling.chosen(scores_BV, sample=bool(config.do_sample))
        if fills:
            next_B = torch.where(live_B, next_B, next_B.new_tensor(pad))
        ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(next_B.cpu())
        seen = tuple(record.scores) if record.scores else None
        for criterion in criteria:
            live_B = live_B & ~torch.as_tensor(criterion(ids_BT, seen), device=live_B.device)
    if streamer is not None:
        streamer.end()
    return _answer(model, request, ids_BT, record) if config.return_dict_in_generate else ids_BT


def _num_unseen(model: Any, request: Request) -> int | None:
    """Return how many of the prompt's last tokens a cache brought by the caller has not seen.

    None stands for all that was given: with a mask longer than the ids, these are the new ones.

    Raises:
        ValueError: the cache has seen everything.
    """
    cache = request.model_kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    if not past:
        return None
    embeds = request.model_kwargs.get("inputs_embeds")
    given = request.ids.shape[1] if embeds is None else embeds.shape[1]
    whole = model.config.is_encoder_decoder or embeds is not None or request.mask_length == given
    if not whole:
        return None
    if given <= past:
        raise ValueError(
            f"the cache holds {past} positions and the prompt {given} tokens: give the whole"
            " sequence, or the new tokens with the attention_mask of all"
        )
    return int(given - past)


def _step(
    model: Any,
    ids_BT: torch.Tensor,
    num_given: int | None,
    model_kwargs: dict[str, Any],
    *,
    first: bool,
) -> Any:
    """Return the model's answer to the sequences so far; make `model_kwargs` fit the next token."""
    inputs = model.prepare_inputs_for_generation(
        ids_BT, next_sequence_length=num_given, is_first_iteration=first, **model_kwargs
    )
    answer = model(**inputs, return_dict=True)
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    made = getattr(answer, "past_key_values", None)
    if made is not None:
        model_kwargs["past_key_values"] = made
    for name, added in ((f"{prefix}position_ids", 1), ("token_type_ids", 0)):
        if (known := model_kwargs.get(name)) is not None:
            model_kwargs[name] = torch.cat([known, known[..., -1:] + added], dim=-1)
    if (mask_BT := model_kwargs.get(f"{prefix}attention_mask")) is not None:
        ones_B1 = mask_BT.new_ones((len(mask_BT), 1))
        model_kwargs[f"{prefix}attention_mask"] = torch.cat([mask_BT, ones_B1], dim=-1)
    return answer


def _answer(model: Any, request: Request, ids_BT: torch.Tensor, record: _Record) -> ModelOutput:
    """Return the sequences with what was recorded beside them."""
    config = request.config
    scores = tuple(record.scores) if config.output_scores else None
    logits = tuple(record.logits) if config.output_logits else None
    attentions = tuple(record.attentions) if config.output_attentions else None
    hidden_states = tuple(record.hidden_states) if config.output_hidden_states else None
    past = request.model_kwargs.get("past_key_values")
    if not model.config.is_encoder_decoder:
        return GenerateDecoderOnlyOutput(
            sequences=ids_BT,
            scores=scores,
            logits=logits,
            attentions=attentions,
            hidden_states=hidden_states,
            past_key_values=past,
        )
    encoded = request.model_kwargs["encoder_outputs"]
    return GenerateEncoderDecoderOutput(
        sequences=ids_BT,
        scores=scores,
        logits=logits,
        encoder_attentions=getattr(encoded, "attentions", None),
        encoder_hidden_states=getattr(encoded, "hidden_states", None),
        decoder_attentions=attentions,
        cross_attentions=tuple(record.cross_attentions) if config.output_attentions else None,
        decoder_hidden_states=hidden_states,
        past_key_values=past,
    )
