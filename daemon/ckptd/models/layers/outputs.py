"""What a model's forward returns: one dataclass a kind of answer.

Each is at once an ordered mapping (`out["logits"]`), an object (`out.logits`) and a sequence
(`out[0]`, `out[:2]`, `out.to_tuple()`). Fields that are None are absent from the mapping and from
the sequence, present as attributes. The names and the order of the fields are those of transformers.

Shapes in the docstrings: B batch, T query positions, D hidden size, V vocabulary, C labels, L layers.
`hidden_states` holds L + 1 tensors (B, T, D): what the first layer read, then what each layer wrote,
the last of them after the final norm. `attentions` holds L tensors (B, heads, T, keys).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from ckptd.models.layers.cache import Cache, EncoderDecoderCache

Tensors = tuple[torch.Tensor, ...]


class ModelOutput(OrderedDict[str, Any]):
    """The common behaviour; subclasses are dataclasses whose fields all default to None.

    A mapping given as the only argument fills the fields by name, so that `type(out)(dict(out))`
    is a copy (what accelerate and FSDP do with outputs).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        first = getattr(self, names[0])
        if isinstance(first, Mapping) and all(getattr(self, name) is None for name in names[1:]):
            setattr(self, names[0], None)
            for name, value in first.items():
                self[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            return
        if value is not None:
            super().__setitem__(name, value)
        elif super().__contains__(name):
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        object.__setattr__(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"a field of {type(self).__name__} cannot be deleted; set it to None")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]

    def setdefault(self, *_: Any, **__: Any) -> Any:
        """Not available: an output's fields are fixed."""
        raise TypeError(f"{type(self).__name__} has no setdefault; its fields are fixed")

    def pop(self, *_: Any, **__: Any) -> Any:
        """Not available: an output's fields are fixed."""
        raise TypeError(f"{type(self).__name__} has no pop; set a field to None instead")

    def update(self, *_: Any, **__: Any) -> None:
        """Not available: an output's fields are fixed."""
        raise TypeError(f"{type(self).__name__} has no update; set its fields instead")

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """An encoder's answer: `last_hidden_state` (B, T, D)."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class BaseModelOutputWithPooling(ModelOutput):
    """An encoder's answer with `pooler_output` (B, D), one vector a sequence."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """A decoder's answer with the cache that its next call reads."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class BaseModelOutputWithCrossAttentions(ModelOutput):
    """A decoder's answer without cache; `cross_attentions` as `attentions`, over the encoder."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(eq=False)
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """A decoder's answer with cache and the attention it paid to the encoder."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | EncoderDecoderCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(eq=False)
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """What BERT's body answers: it may serve as an encoder or as a decoder."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    past_key_values: Cache | EncoderDecoderCache | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(eq=False)
class MoeModelOutputWithPast(ModelOutput):
    """A mixture's answer; `router_logits` holds one (B * T, experts) a sparse layer."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    router_logits: Tensors | None = None


@dataclass(eq=False)
class CausalLMOutput(ModelOutput):
    """`loss` (scalar float32) and `logits` (B, T, V), without cache."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """`loss` (scalar float32) of the next token and `logits` (B, T, V)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """As `CausalLMOutputWithPast`, of a decoder that may read an encoder."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | EncoderDecoderCache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass(eq=False)
class MoeCausalLMOutputWithPast(ModelOutput):
    """As `CausalLMOutputWithPast`; `aux_loss` is how unevenly the experts were used."""

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    router_logits: Tensors | None = None


@dataclass(eq=False)
class MaskedLMOutput(ModelOutput):
    """`loss` over the masked positions and `logits` (B, T, V)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class NextSentencePredictorOutput(ModelOutput):
    """`logits` (B, 2): whether the second sentence follows."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class MultipleChoiceModelOutput(ModelOutput):
    """`logits` (B, choices)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class SequenceClassifierOutput(ModelOutput):
    """`logits` (B, C)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """`logits` (B, C), read at the last token of each sequence."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    """`logits` (B, T, C)."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class QuestionAnsweringModelOutput(ModelOutput):
    """`start_logits` and `end_logits` (B, T) of the span that answers."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class ImageClassifierOutput(ModelOutput):
    """`logits` (B, C) of images."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class MaskedImageModelingOutput(ModelOutput):
    """`reconstruction` (B, channels, height, width) of the masked patches."""

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass(eq=False)
class Seq2SeqModelOutput(ModelOutput):
    """`last_hidden_state` (B, T, D) of the decoder, and what both halves recorded."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass(eq=False)
class Seq2SeqLMOutput(ModelOutput):
    """`loss` and `logits` (B, T, V) of the decoder, and what both halves recorded."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass(eq=False)
class Seq2SeqSequenceClassifierOutput(ModelOutput):
    """`logits` (B, C), read in the decoder, and what both halves recorded."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass(eq=False)
class Seq2SeqQuestionAnsweringModelOutput(ModelOutput):
    """`start_logits` and `end_logits` (B, T) of the decoder, and what both halves recorded."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    past_key_values: EncoderDecoderCache | None = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None
