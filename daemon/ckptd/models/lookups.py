"""Finding the parts of a model that every class calls a little differently.

`LookupsMixin` finds and replaces embeddings, head, encoder and decoder by the names that models use;
`annotated_config` finds the configuration class of a model class that only annotates it.
Pure attribute access; no weights are touched.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from ckptd.models.config.config import PreTrainedConfig

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_VISION = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
_ENCODERS: dict[str | None, tuple[str, ...]] = {
    None: ("text_encoder", "encoder"),
    "image": _VISION,
    "video": _VISION,
    "audio": ("audio_tower", "audio_encoder", "speech_encoder"),
}
"""Attributes that hold an encoder, by modality, in the order of asking."""
_DECODERS = ("language_model", "text_model", "decoder", "text_decoder")


class Recordable:
    """What a forward can record: output names and the modules they come from.

    Read on a class or an object, it is the class's `_can_record_outputs`, the name under which code
    for transformers declares it; a class may also override it with a dictionary, as the page says.
    """

    def __get__(self, model: object, owner: type) -> dict[str, Any]:
        """Return the dictionary, empty where the class declares nothing."""
        found: dict[str, Any] | None = getattr(owner, "_can_record_outputs", None)
        return dict(found or {})


class LookupsMixin(_Module):
    """Embeddings, head, encoder and decoder of a model."""

    base_model_prefix = ""
    _input_embed_layer = "embed_tokens"

    @property
    def base_model(self) -> nn.Module:
        """The model without its head: itself where it has none."""
        found = getattr(self, self.base_model_prefix, self) if self.base_model_prefix else self
        assert isinstance(found, nn.Module)
        return found

    def get_input_embeddings(self) -> Any:
        """Return the module that embeds the input.

        Raises:
            NotImplementedError: it has none under a known name; the class must override this.
        """
        holder = self._embedding_holder()
        if holder is not None:
            return getattr(holder, self._input_embed_layer)
        inner = getattr(self, "language_model", None) or self.base_model
        if inner is not self and hasattr(inner, "get_input_embeddings"):
            return inner.get_input_embeddings()  # type: ignore[operator]
        raise NotImplementedError(
            f"{type(self).__name__} has no {self._input_embed_layer!r}: override "
            "get_input_embeddings"
        )

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put `value` where `get_input_embeddings` looks.

        Raises:
            NotImplementedError: there is no such place.
        """
        holder = self._embedding_holder()
        if holder is not None:
            setattr(holder, self._input_embed_layer, value)
            return
        inner = getattr(self, "language_model", None) or self.base_model
        if inner is self or not hasattr(inner, "set_input_embeddings"):
            raise NotImplementedError(
                f"{type(self).__name__} has no {self._input_embed_layer!r}: override "
                "set_input_embeddings"
            )
        inner.set_input_embeddings(value)  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head that gives logits over the vocabulary, or None."""
        head = getattr(self, "lm_head", None)
        return head if isinstance(head, nn.Module) else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put `new_embeddings` where the head is; nothing happens where there is none."""
        if getattr(self, "lm_head", None) is not None:
            self.lm_head = new_embeddings

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder (of a modality: "image", "video" or "audio"), else the model itself.

        Raises:
            ValueError: another modality.
        """
        found = self._named(_encoders(modality))
        if found is not None:
            return found
        inner = self.base_model
        if inner is not self and hasattr(inner, "get_encoder"):
            deeper = inner.get_encoder(modality=modality)  # type: ignore[operator]
            if deeper is not inner:
                assert isinstance(deeper, nn.Module)
                return deeper
        return self

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """Put `encoder` where `get_encoder` looks; nothing happens where there is no such place.

        Raises:
            ValueError: another modality.
        """
        names = _encoders(modality)
        if self._replaced(names, encoder):
            return
        inner = self.base_model
        if inner is not self and hasattr(inner, "set_encoder"):
            inner.set_encoder(encoder, modality=modality)  # type: ignore[operator]

    def get_decoder(self) -> nn.Module:
        """Return the decoder (or the language model), else the model itself."""
        found = self._named(_DECODERS)
        if found is not None:
            return found
        inner = self.base_model
        if inner is not self and hasattr(inner, "get_decoder"):
            deeper = inner.get_decoder()  # type: ignore[operator]
            assert isinstance(deeper, nn.Module)
            return deeper
        return self

    def set_decoder(self, decoder: nn.Module) -> None:
        """Put `decoder` where `get_decoder` looks, also where that is the whole model below a head.

        Nothing happens on a model that is itself the decoder. (The original does nothing on one
        with a head, either, and so drops what it was given.)
        """
        if self._replaced(_DECODERS, decoder):
            return
        inner = self.base_model
        if inner is self or not hasattr(inner, "set_decoder"):
            return
        if inner.get_decoder() is inner:  # type: ignore[operator]
            setattr(self, self.base_model_prefix, decoder)
        else:
            inner.set_decoder(decoder)  # type: ignore[operator]

    def _embedding_holder(self) -> Any:
        """Return the module that has the input embedding as an attribute, or None."""
        places = (self, getattr(self, "embeddings", None), getattr(self, "model", None))
        return next((place for place in places if hasattr(place, self._input_embed_layer)), None)

    def _named(self, names: tuple[str, ...]) -> nn.Module | None:
        found = (getattr(self, name, None) for name in names)
        return next((one for one in found if isinstance(one, nn.Module)), None)

    def _replaced(self, names: tuple[str, ...], module: nn.Module) -> bool:
        name = next((one for one in names if hasattr(self, one)), None)
        if name is not None:
            setattr(self, name, module)
        return name is not None


def annotated_config(cls: type) -> type[PreTrainedConfig] | None:
    """Return the class that `cls` annotates its `config` with; None where it says nothing usable."""
    found = inspect.get_annotations(cls).get("config")
    if isinstance(found, str):
        found = getattr(sys.modules.get(cls.__module__), found, None)
    is_config = isinstance(found, type) and issubclass(found, PreTrainedConfig)
    return found if is_config else None


def _encoders(modality: str | None) -> tuple[str, ...]:
    if modality not in _ENCODERS:
        raise ValueError(
            f"unknown modality {modality!r}: one of image, video, audio, or None for text"
        )
    return _ENCODERS[modality]
