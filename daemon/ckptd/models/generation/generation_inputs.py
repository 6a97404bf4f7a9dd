"""From the arguments of `generate` to what its loop starts with.

Settings are merged (call before `generation_config` before the model's own before the defaults),
masks, positions and special tokens are inferred, an encoder runs once, rows are repeated for
`num_return_sequences`, lengths are counted, the cache is made. The rules, and what is refused, are
those of transformers. The model and the caller's configuration are not changed.

Shapes: B sequences, T tokens of the prompt, S positions of an encoder's input, D hidden size, K ids.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ckptd.models.generation import generation_rules
from ckptd.models.generation.generation_config import GenerationConfig, warn_once
from ckptd.models.layers import cache, outputs

_ALWAYS_ACCEPTED = {"output_attentions", "output_hidden_states", "output_router_logits"}


@dataclass(slots=True, kw_only=True)
class Request:
    """One call of `generate`, ready for its loop."""

    config: GenerationConfig
    """A copy with every setting decided; `max_length` counts all tokens of `ids_BT` to come."""
    ids: torch.Tensor
    """`(B, T)` int64: the prompt of a decoder, or what the decoder of an encoder-decoder begins with."""
    model_kwargs: dict[str, Any]
    """What the model's forward is given besides the ids."""
    eos_tokens: torch.Tensor | None
    """`(K,)` int64, what ends a sequence."""
    pad_token: int | None
    """What fills finished rows; None where no token ends a sequence and none was set."""
    mask_length: int
    """Positions that the attention mask spoke of before it was dropped for being all ones."""


def settled(
    model: Any, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Return the merged settings and the arguments that are for the model.

    `max_length` stays None where nobody set it, `min_length` likewise.

    Raises:
        ValueError: settings that do not fit together, that `generate` does not follow, or arguments
            that neither it nor the model knows.
    """
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    own = model.generation_config
    if own is not None:
        config.update(defaults_only=True, allow_custom_entries=True, **own.to_dict())
    lengths = ("max_length", "min_length")
    config.update(
        defaults_only=True,
        **{n: v for n, v in generation_rules.DEFAULTS.items() if n not in lengths},
    )
    kept = {n: v for n, v in kwargs.items() if not (v is None and n in lengths)}
    model_kwargs = config.update(**kept)
    generation_rules.require_served(vars(config))
    if given is not None and len(model_kwargs) < len(kept):
        warn_once("generate: settings given beside generation_config override it")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            model_kwargs[name] = True
    return config, _known(model, model_kwargs)


def _known(model: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the model, without the unknown ones that are None.

    Raises:
        ValueError: an unknown one has a value.
    """
    names = _parameters(model.prepare_inputs_for_generation) | _parameters(model.forward)
    names |= _ALWAYS_ACCEPTED
    if model.config.is_encoder_decoder:
        names |= _parameters(model.get_encoder().forward)
        names |= {f"decoder_{name}" for name in _parameters(model.get_decoder().forward)}
        names.add("decoder_input_ids")
    unknown = [n for n, v in model_kwargs.items() if v is not None and n not in names]
    if unknown:
        raise ValueError(
            f"generate() got arguments that {type(model).__name__} does not use: {unknown} (misspelt"
            " settings end up here too)"
        )
    return {name: value for name, value in model_kwargs.items() if name in names}


def _parameters(function: Any) -> set[str]:
    """Return the names of a function's parameters."""
    return set(inspect.signature(function).parameters)


def prepared(
    model: Any,
    inputs: torch.Tensor | None,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Request:
    """Return what the loop starts with; runs the encoder of an encoder-decoder model.

    Raises:
        ValueError: the inputs contradict each other or leave no room for a new token.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    masked = model_kwargs.get("attention_mask") is not None
    main, name = _main_input(model, inputs, config, model_kwargs)
    eos_K, pad = _special_tokens(config, main.device)
    mask_length = -1
    if not seq2seq:
        _complain_about_padding(main, model_kwargs.get("attention_mask"), config, pad)
        if name == "inputs_embeds":
            config.use_cache = True
        mask_length = _place(model, main, config, model_kwargs, masked=masked, eos=eos_K, pad=pad)
        ids_BT = main if name == "input_ids" else model_kwargs.pop("input_ids")
    else:
        _encode(model, main, name, model_kwargs)
        ids_BT = _decoder_start(config, main, name, model_kwargs)
    ids_BT = _repeated(ids_BT, model_kwargs, config.num_return_sequences or 1)
    embedded = main.shape[1] if name == "inputs_embeds" and not seq2seq else 0
    _count_lengths(model, config, ids_BT.shape[1], embedded if embedded != ids_BT.shape[1] else 0)
    if "logits_to_keep" in _parameters(model.forward):
        model_kwargs.setdefault("logits_to_keep", 1)
    model_kwargs["use_cache"] = bool(config.use_cache)
    _provide_cache(model, config, model_kwargs)
    return Request(
        config=config,
        ids=ids_BT,
        model_kwargs=model_kwargs,
        eos_tokens=eos_K,
        pad_token=pad,
        mask_length=mask_length,
    )


def _main_input(
    model: Any,
    inputs: torch.Tensor | None,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> tuple[torch.Tensor, str]:
    """Return the model's main input and its name: ids, embeddings, or one bos token a row."""
    name = model.main_input_name
    by_name = model_kwargs.pop(name, None)
    if by_name is not None and inputs is not None:
        raise ValueError(f"give the prompt as `inputs` or as `{name}`, not both")
    inputs = by_name if inputs is None else inputs
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is None:
        model_kwargs.pop("inputs_embeds", None)
        inputs = _initial(model, config, model_kwargs) if inputs is None else inputs
        if name == "input_ids" and inputs.dim() != 2:
            raise ValueError(f"input_ids must be (batch, tokens), not {tuple(inputs.shape)}")
        return inputs, name
    if model.config.is_encoder_decoder:
        if inputs is not None:
            raise ValueError("give input_ids or inputs_embeds to an encoder, not both")
        return embeds, "inputs_embeds"
    none_yet = torch.empty((len(embeds), 0), dtype=torch.long, device=embeds.device)
    model_kwargs["input_ids"] = none_yet if inputs is None else inputs
    return embeds, "inputs_embeds"


def _initial(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the ids of a call that gave none."""
    encoded = model_kwargs.get("encoder_outputs")
    if model.config.is_encoder_decoder and encoded is not None:
        return torch.full(encoded[0].shape[:2], -100, dtype=torch.long, device=model.device)
    if config.bos_token_id is None:
        raise ValueError("generate() needs input_ids, or a bos_token_id to start from")
    tensors = (value for value in model_kwargs.values() if isinstance(value, torch.Tensor))
    rows = next((len(tensor) for tensor in tensors), 1)
    return torch.full((rows, 1), config.bos_token_id, dtype=torch.long, device=model.device)


def _special_tokens(
    config: GenerationConfig, device: torch.device
) -> tuple[torch.Tensor | None, int | None]:
    """Return the ids that end a sequence and the one that fills finished rows."""
    ended = config.eos_token_id
    if ended is None or ended == []:
        return None, config.pad_token_id
    eos_K = torch.as_tensor(ended, device=device).reshape(-1)
    if eos_K.is_floating_point() or bool((eos_K < 0).any()):
        warn_once(f"generate: eos_token_id={ended!r} is no token, only the length ends a sequence")
    return eos_K, int(eos_K[0]) if config.pad_token_id is None else config.pad_token_id


def _complain_about_padding(
    main: torch.Tensor, mask: torch.Tensor | None, config: GenerationConfig, pad: int | None
) -> None:
    """Log, once, that padding stands at the right of a batch, or cannot be told from the text."""
    if len(main) <= 1 or main.dim() != 2 or pad is None:
        return
    given = mask is not None and mask.shape == main.shape
    last_B = mask[:, -1] == 0 if mask is not None and given else main[:, -1] == pad
    if bool(last_B.any()):
        warn_once(
            "generate: right-padding was detected; a decoder-only model needs padding_side='left'"
        )
    if mask is None and config.pad_token_id is None:
        warn_once("generate: a batch without attention_mask and pad_token_id: padding is not seen")


def _place(
    model: Any,
    main: torch.Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    masked: bool,
    eos: torch.Tensor | None,
    pad: int | None,
) -> int:
    """Infer a decoder's attention mask and positions; return how many positions the mask spans.

    A mask of ones is dropped in the end: the model is faster without one.
    """
    accepted = _parameters(model.forward)
    ids_BT = model_kwargs.get("input_ids")
    known = ids_BT if ids_BT is not None and ids_BT.shape[1] > 0 else main
    mask_BT = model_kwargs.get("attention_mask") if masked else _inferred(known, eos=eos, pad=pad)
    assert mask_BT is not None
    if main.dim() == 2 and mask_BT.dim() > 2:
        raise ValueError(f"attention_mask must be (batch, tokens), not {tuple(mask_BT.shape)}")
    if "position_ids" in accepted and model_kwargs.get("position_ids") is None:
        positions_BT = mask_BT.long().cumsum(-1) - 1
        model_kwargs["position_ids"] = positions_BT.masked_fill(mask_BT == 0, 0)
    model_kwargs.pop("attention_mask", None)
    if "attention_mask" in accepted and not bool((mask_BT == 1).all()):
        model_kwargs["attention_mask"] = mask_BT
    return mask_BT.shape[1]


def _inferred(known: torch.Tensor, *, eos: torch.Tensor | None, pad: int | None) -> torch.Tensor:
    """Return a mask `(B, T)` int64 that leaves out pad tokens where they can mean nothing else."""
    ids = known.dim() == 2 and known.dtype in (torch.int32, torch.int64)
    ambiguous = eos is not None and pad is not None and bool((eos == pad).any())
    if not ids or pad is None or ambiguous:
        return torch.ones(known.shape[:2], dtype=torch.long, device=known.device)
    return known.ne(pad).long()


def _encode(model: Any, main: torch.Tensor, name: str, model_kwargs: dict[str, Any]) -> None:
    """Run the encoder, unless the caller did; its answer becomes `encoder_outputs`."""
    given = model_kwargs.get("encoder_outputs")
    if isinstance(given, tuple):
        model_kwargs["encoder_outputs"] = outputs.BaseModelOutput(*given)
    model_kwargs.pop("inputs_embeds", None)
    if given is not None:
        return
    encoder = model.get_encoder()
    accepted = _parameters(encoder.forward)
    chosen = {n: v for n, v in model_kwargs.items() if n in accepted and n != "use_cache"}
    for shared in ("past_key_values", "input_ids"):
        chosen.pop(shared, None)
    chosen[name] = main
    if "return_dict" in accepted or "kwargs" in accepted:
        chosen["return_dict"] = True
    model_kwargs["encoder_outputs"] = encoder(**moved(chosen, model.device))


def moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a model's arguments with the tensors on its device; the caller's may be elsewhere."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def _decoder_start(
    config: GenerationConfig, main: torch.Tensor, name: str, model_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return what the decoder begins with, `(B, T)`: its start token, then what the caller gave."""
    start = config.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    if start is None:
        raise ValueError("an encoder-decoder model needs decoder_start_token_id or bos_token_id")
    start_B = torch.as_tensor(start, dtype=torch.long, device=main.device)
    if start_B.dim() == 1 and len(start_B) != len(main):
        raise ValueError(f"decoder_start_token_id has {len(start_B)} ids for {len(main)} sequences")
    start_B1 = start_B.reshape(-1, 1).expand(len(main), 1)
    ids_BT: torch.Tensor | None = model_kwargs.pop("decoder_input_ids", None)
    if ids_BT is None and name != "input_ids":
        ids_BT = model_kwargs.pop("input_ids", None)
    if ids_BT is None:
        return start_B1.clone()
    if bool((ids_BT[:, 0] != start_B1[:, 0]).all()):
        ids_BT = torch.cat([start_B1, ids_BT], dim=-1)
        mask_BT = model_kwargs.get("decoder_attention_mask")
        if mask_BT is not None:
            ones_B1 = torch.ones_like(mask_BT[:, :1])
            model_kwargs["decoder_attention_mask"] = torch.cat([ones_B1, mask_BT], dim=-1)
    return ids_BT


def _repeated(ids_BT: torch.Tensor, model_kwargs: dict[str, Any], times: int) -> torch.Tensor:
    """Repeat every row of the ids and of the model's arguments for `num_return_sequences`."""
    if times == 1:
        return ids_BT
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor):
            model_kwargs[name] = value.repeat_interleave(times, dim=0)
        elif isinstance(value, outputs.ModelOutput):
            rows = {
                field: part.repeat_interleave(times, dim=0) if torch.is_tensor(part) else part
                for field, part in value.items()
            }
            model_kwargs[name] = type(value)(**rows)
    return ids_BT.repeat_interleave(times, dim=0)


def _count_lengths(model: Any, config: GenerationConfig, num_tokens: int, embedded: int) -> None:
    """Decide `max_length` and `min_length` in tokens of the ids, `num_tokens` of which are there.

    `embedded` is the length of a prompt that came as embeddings and is not in the ids.
    """
    default = config.max_length is None
    if config.max_new_tokens is not None:
        if not default:
            warn_once("generate: max_new_tokens and max_length are both set; max_new_tokens counts")
        config.max_length = num_tokens + config.max_new_tokens
    elif config.max_length is None:
        new = int(generation_rules.DEFAULTS["max_length"])
        positions = getattr(model.config, "max_position_embeddings", None)
        config.max_length = min(num_tokens + new, positions or num_tokens + new)
        warnings.warn(
            f"generate() without a length gives up to {new} new tokens; set max_new_tokens",
            UserWarning,
            stacklevel=5,
        )
    else:
        config.max_length -= embedded
    if config.min_new_tokens is not None:
        if config.min_length is not None:
            warn_once("generate: min_new_tokens and min_length are both set; min_new_tokens counts")
        config.min_length = num_tokens + config.min_new_tokens
    else:
        config.min_length = max((config.min_length or 0) - embedded, 0)
    if num_tokens >= config.max_length:
        which = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        raise ValueError(
            f"{which} has {num_tokens} tokens and max_length is {config.max_length}: no room for a"
            " new one; raise max_length or set max_new_tokens"
        )
    if config.min_length > config.max_length:
        warnings.warn(
            f"the minimum of {config.min_length} tokens is more than the maximum of"
            f" {config.max_length}; the maximum holds",
            UserWarning,
            stacklevel=5,
        )


def _provide_cache(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Make an empty cache, unless the caller brought one or wants none."""
    given = model_kwargs.get("past_key_values")
    if isinstance(given, tuple):
        raise ValueError("past_key_values must be a Cache, not a tuple")
    if given is not None or not config.use_cache:
        return
    made: Any = cache.DynamicCache(config=model.config.get_text_config(decoder=True))
    if model.config.is_encoder_decoder:
        made = cache.EncoderDecoderCache(made, cache.DynamicCache())
    model_kwargs["past_key_values"] = made
