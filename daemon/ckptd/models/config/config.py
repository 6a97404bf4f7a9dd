"""What a model is: `PreTrainedConfig`, the content of a config.json as an object.

Owns: declared fields with defaults, aliases, labels, nested configurations. Does not own: reading
and writing files (config_file), which keys are saved (config_content), what rotary keys are called
(rope_config), which class belongs to a model_type (auto, registry). Files of transformers 4 and 5
are read, those written are of 5. Nothing here imports torch, so a configuration is cheap.

An architecture declares annotated class attributes and, where values depend on others, a method
`__post_init__` that calls `super().__post_init__()`. Keys of the file that no field takes are in
`self._extra` until `__post_init__` returns, which may take some out; those left become attributes
as they are. A class with a field `rope_parameters` gets it in the form of transformers 5; its
`rope_keys` says how old files name the settings.
"""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

from ckptd.models import registry
from ckptd.models.config import (
    config_content,
    config_file,
    config_runtime,
    config_values,
    rope_config,
)

_BASE_FIELDS = (
    "transformers_version",
    "architectures",
    "output_hidden_states",
    "return_dict",
    "dtype",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
)
"""What every instance holds. Other annotated names of the base class are fallbacks for reading."""

_NOT_KEPT = ("_commit_hash", "_attn_implementation_internal", "_experts_implementation_internal")
_TEXT_PARTS = frozenset({"text_encoder", "decoder", "generator", "text_config"})
_NOT_GIVEN = object()

log = logging.getLogger(__name__)


class PreTrainedConfig(config_runtime.RuntimeChoices, config_file.ConfigFile):
    """The configuration of a model: every key of its config.json as an attribute.

    Keyword arguments fill the declared fields, in any class derived from this one; unknown keys
    are kept as attributes and saved back. `attribute_map` gives aliases (`{"hidden_size":
    "n_embd"}`), which read and write the real name. A nested dict becomes the class that
    `sub_configs` names for it. `dtype` is a torch.dtype where torch is loaded, else its name.

    This class itself, with `model_type` given, stands for any architecture: it keeps every key of
    the file, and its nested text configuration works with `get_text_config`.

    Raises:
        ValueError: contradictory values (`validate_architecture`, layer types, `problem_type`), or
            a `dtype` that torch does not have.
        KeyError: `rope_parameters` lack a key that their type needs.
        TypeError: positional arguments, or a field without a default is not given.
    """

    model_type: ClassVar[str] = ""
    base_config_key: ClassVar[str] = ""
    sub_configs: ClassVar[dict[str, Any]] = {}
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init: ClassVar[bool] = False
    rope_keys: ClassVar[rope_config.RopeKeys] = rope_config.RopeKeys()
    _auto_class: ClassVar[str | None] = None
    _fields: ClassVar[tuple[str, ...]] = _BASE_FIELDS
    _alias_defaults: ClassVar[dict[str, Any]] = {}

    transformers_version: str | None = None
    architectures: list[str] | None = None
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    dtype: Any = None
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None

    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sep_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._fields = tuple(dict.fromkeys((*cls._fields, *config_values.declared_names(cls))))
        for alias, name in cls.attribute_map.items():
            if alias in cls.__dict__ and alias in cls._fields:
                cls._alias_defaults = {**cls._alias_defaults, alias: cls.__dict__[alias]}
            setattr(cls, alias, _alias(name))

    def __init__(self, **kwargs: Any) -> None:
        self._given = frozenset(kwargs)
        for name in self._fields:
            setattr(self, name, self._field_value(name, kwargs))
        for name in (*_NOT_KEPT, *(["model_type"] if self.model_type else [])):
            kwargs.pop(name, None)
        self._name_or_path = str(kwargs.pop("name_or_path", ""))
        self._output_attentions = kwargs.pop("output_attentions", False)
        self._attn_implementation_internal = None
        self._experts_implementation_internal = None
        kernels = {
            f"_{name}": kwargs.pop(name)
            for name in ("attn_implementation", "experts_implementation")
            if name in kwargs
        }
        self._extra = kwargs
        self.__post_init__()
        for name, value in {**vars(self).pop("_extra"), **kernels}.items():
            setattr(self, name, value)
        self.validate()

    def _field_value(self, name: str, kwargs: dict[str, Any]) -> Any:
        """Take a field out of the arguments; else return a copy of its default."""
        if name in kwargs:
            return kwargs.pop(name)
        default = self._alias_defaults.get(name, getattr(type(self), name, _NOT_GIVEN))
        if default is _NOT_GIVEN:
            raise TypeError(f"{type(self).__name__} needs a value for {name}")
        return copy.deepcopy(default)

    def __post_init__(self) -> None:
        """Bring dtype, nested configurations, labels and rotary settings into their one form."""
        old_dtype = self._extra.pop("torch_dtype", None)
        self.dtype = config_values.as_dtype(self.dtype if self.dtype is not None else old_dtype)
        for name, config_class in self.sub_configs.items():
            given = self._extra.pop(name, vars(self).get(name))
            setattr(self, name, _nested(config_class, given))
        self._settle_labels()
        if "rope_parameters" in self._fields:
            self._settle_rope(self._extra)
        if self._is_generic:
            self._extra = {key: _wrapped(key, item) for key, item in self._extra.items()}
        else:
            for name in config_values.GENERATION_KEYS:
                self._extra.pop(name, None)

    @property
    def _is_generic(self) -> bool:
        """Whether this is the base class, standing for an architecture that has no class here."""
        return type(self) is PreTrainedConfig

    def _settle_labels(self) -> None:
        """Two labels where nothing is said; keys of `id2label` are integers, as JSON cannot have."""
        count = self._extra.get("num_labels")
        if self.id2label is None:
            self.num_labels = 2 if count is None else count
        else:
            if count is not None and count != len(self.id2label):
                log.warning("num_labels=%s, id2label has %s entries", count, len(self.id2label))
            self.id2label = {int(key): label for key, label in self.id2label.items()}
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type 'single_label_classification' needs num_labels > 1: "
                "give two labels for a binary task, or 'regression' for one number"
            )

    def _settle_rope(self, old: dict[str, Any]) -> None:
        """`rope_parameters` in the form of transformers 5; keys used are taken out of `old`."""
        vars(self)["rope_parameters"] = rope_config.standardised(
            vars(self)["rope_parameters"],
            old=old,
            keys=self.rope_keys,
            layer_types=getattr(self, "layer_types", None),
            max_positions=getattr(self, "max_position_embeddings", None),
            original_max_positions=getattr(self, "original_max_position_embeddings", None),
        )

    def validate(self) -> None:
        """Check what can be checked without weights; runs after construction and before saving.

        Raises:
            ValueError: values contradict each other.
        """
        layers = getattr(self, "layer_types", None)
        count = getattr(self, "num_hidden_layers", None)
        if isinstance(layers, list) and isinstance(count, int) and len(layers) != count:
            raise ValueError(
                f"layer_types has {len(layers)} entries, expected {count} (num_hidden_layers)"
            )
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Check sizes against each other; an architecture with such rules overrides this."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(key for key in vars(self) if key != "_given")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PreTrainedConfig):
            return NotImplemented
        mine, theirs = self.to_dict(), other.to_dict()
        return {**mine, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def num_labels(self) -> int | None:
        """The number of entries of `id2label`; setting another number makes new labels."""
        return None if self.id2label is None else len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if self.num_labels != num_labels:
            self.id2label = {index: f"LABEL_{index}" for index in range(num_labels)}
            self.label2id = {label: index for index, label in self.id2label.items()}

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """Return the configuration of the text model, which is this one where none is nested.

        Looked for: `text_encoder`, `decoder`, `generator`, `text_config`; with `decoder=True` or
        `encoder=True` only those of that side. A flat encoder-decoder gives a copy for one side.

        Raises:
            ValueError: more than one nested configuration could be meant.
        """
        return config_content.text_part(self, decoder=decoder, encoder=encoder)

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy of every value, as JSON can hold it."""
        return config_content.full(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what config.json says: everything but common keys at their common defaults."""
        keep: frozenset[str] = self._given if self._is_generic else frozenset()
        return config_content.difference(self, base=_base_content(), keep=keep)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set each key as an attribute."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Note that this class is to be found through `auto_class`.

        Raises:
            ValueError: there is no auto class of that name.
        """
        cls._auto_class = registry.check_auto_class(auto_class)


@functools.cache
def _base_content() -> dict[str, Any]:
    """What a configuration says that nobody has filled."""
    return PreTrainedConfig().to_dict()


def _alias(name: str) -> property:
    """Return a property that reads and writes the attribute `name`."""

    def write(config: PreTrainedConfig, value: Any) -> None:
        setattr(config, name, value)

    return property(operator.attrgetter(name), write, doc=f"The common name of `{name}`.")


def _nested(config_class: Any, given: Any) -> Any:
    """Return a nested configuration as an object of its class; defaults where none is given."""
    if isinstance(given, PreTrainedConfig):
        return given
    if hasattr(config_class, "for_model"):
        return None if given is None else config_class.from_dict(given)
    return config_class(**(given or {}))


def _wrapped(key: str, value: Any) -> Any:
    """Return a generic configuration for a dict that is one, anything else as it is."""
    is_config = isinstance(value, dict) and (
        key in _TEXT_PARTS or (key.endswith("_config") and "model_type" in value)
    )
    return PreTrainedConfig(**value) if is_config else value
