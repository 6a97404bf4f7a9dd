"""The auto classes: the class that fits a config.json, found by its `model_type`.

Owns: the choice of a class, and what users register while the process runs. Does not own: which
classes exist (registry), loading itself (the classes found). No model code is imported before it is
needed, and code that a repository brings along is never run.

An architecture without a class here still loads: its configuration is a `PreTrainedConfig` with all
keys of the file, its model is the checkpoint-backed one, which does everything but a forward.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, NoReturn

from ckptd.models import registry
from ckptd.models.config import config_source
from ckptd.models.config.config import PreTrainedConfig

_BACKED: registry.Entry = ("ckptd.models.backed", "BackedModel")
_MODEL_ONLY = ("dtype", "torch_dtype", "quantization_config", "adapter_kwargs")
"""Arguments for the model that are no values of its configuration."""

_registered_configs: dict[str, type[PreTrainedConfig]] = {}

check_auto_class = registry.check_auto_class


class AutoConfig:
    """Finds the configuration class of a checkpoint. It has no instances."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            "AutoConfig has no instances: use AutoConfig.from_pretrained(folder or repository)"
        )

    @classmethod
    def for_model(cls, model_type: str, **kwargs: Any) -> Any:
        """Return a configuration of this model type, `kwargs` being its values.

        Raises:
            ValueError: no class here has this model type.
        """
        found = _config_class(model_type)
        if found is None:
            raise ValueError(f"no configuration class for model type {model_type!r}; {_known()}")
        return found(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration with this content, by its `model_type`; generic where unknown.

        `kwargs` are those of `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: there is no `model_type`.
        """
        model_type = config_dict.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ValueError(f"the configuration has no 'model_type'; {_known()}")
        if model_type == "mistral" and "layer_types" in config_dict:
            # Files of Ministral say "mistral"; only they have windows that differ by layer.
            config_dict = {**config_dict, "model_type": "ministral"}
            model_type = "ministral"
        found = _config_class(model_type) or PreTrainedConfig
        return found.from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Return the configuration of a folder, a config.json or a repository on the Hub.

        `kwargs` are those of `PreTrainedConfig.from_pretrained`. A `model_type` without a class
        here gives a `PreTrainedConfig` that keeps every key. `trust_remote_code` is accepted and
        changes nothing.

        Raises:
            OSError: config.json is not there or not JSON.
            ValueError: config.json has no `model_type`.
        """
        name = os.fspath(pretrained_model_name_or_path)
        content, kwargs = PreTrainedConfig.get_config_dict(name, **kwargs)
        if not isinstance(content.get("model_type"), str) or not content["model_type"]:
            raise ValueError(
                f"{name}: {config_source.CONFIG_NAME} has no 'model_type', which says what the "
                f"model is; add it; {_known()}"
            )
        return cls.from_dict(content, **{"name_or_path": name, **kwargs})

    @staticmethod
    def register(model_type: str, config: type[PreTrainedConfig], exist_ok: bool = False) -> None:
        """Make the auto classes use `config` for this model type in this process.

        Registering again replaces what was registered, so that a cell may be run twice.

        Raises:
            ValueError: `config.model_type` says something else, or the type is one of this
                package's and `exist_ok` is not set.
        """
        if config.model_type != model_type:
            raise ValueError(
                f"{config.__name__}.model_type is {config.model_type!r}, expected {model_type!r}"
            )
        if not exist_ok and model_type in registry.CONFIGS:
            raise ValueError(
                f"model type {model_type!r} is taken; pass exist_ok=True to replace it"
            )
        _registered_configs[model_type] = config


class _AutoModelClass:
    """What the auto classes of models share; each has a kind of head and what is registered."""

    _head: ClassVar[str]
    _registered: ClassVar[dict[type[PreTrainedConfig], Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._head = registry.AUTO_CLASSES.get(cls.__name__, "base")
        cls._registered = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} has no instances: use {name}.from_pretrained(folder or repository) or "
            f"{name}.from_config(config)"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the model of a folder or a repository on the Hub, with its weights.

        `kwargs` are those of `PreTrainedModel.from_pretrained`; values of the configuration among
        them override it. A model type without a class here gives the checkpoint-backed model.

        Raises:
            OSError: config.json or weights are not there or not readable.
            ValueError: config.json has no `model_type`, or the architecture has no such head.
        """
        config = kwargs.pop("config", None)
        where = {key: kwargs.pop(key) for key in config_source.SOURCE_KEYS & kwargs.keys()}
        if not isinstance(config, PreTrainedConfig):
            kept = {key: kwargs.pop(key) for key in _MODEL_ONLY if key in kwargs}
            name = pretrained_model_name_or_path if config is None else config
            config, kwargs = AutoConfig.from_pretrained(
                name, return_unused_kwargs=True, **where, **kwargs
            )
            config.name_or_path = os.fspath(pretrained_model_name_or_path)
            kwargs.update(kept)
        found, config = cls._found(config)
        model_class = registry.imported(_BACKED) if found is None else found
        return model_class.from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, **where, **kwargs
        )

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """Return a model with fresh weights; `dtype` and `attn_implementation` as in loading.

        Raises:
            ValueError: no class here builds this architecture with such a head.
        """
        kwargs.pop("trust_remote_code", None)
        found, config = cls._found(config)
        if found is None:
            cls._refuse(config)
        return found._from_config(config, **kwargs)

    @classmethod
    def register(
        cls, config_class: type[PreTrainedConfig], model_class: Any, exist_ok: bool = False
    ) -> None:
        """Make this auto class build `model_class` for configurations of `config_class`.

        Registering again replaces what was registered, so that a cell may be run twice.

        Raises:
            ValueError: the model names another `config_class`, or there is one in this package
                and `exist_ok` is not set.
        """
        own = getattr(model_class, "config_class", None)
        if own is not None and own.__name__ != config_class.__name__:
            raise ValueError(
                f"{model_class.__name__}.config_class is {own.__name__}, "
                f"expected {config_class.__name__}"
            )
        if not exist_ok and cls._native(config_class):
            raise ValueError(
                f"{cls.__name__} has a model for {config_class.__name__}; "
                "pass exist_ok=True to replace it"
            )
        cls._registered[config_class] = model_class

    @classmethod
    def _found(cls, config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
        """Return the model class of a configuration and the part of it that the class takes.

        None is the class of an architecture that only a checkpoint can build.
        """
        config_class = type(config)
        if config_class is PreTrainedConfig:
            return None, config
        found = cls._registered.get(config_class)
        if found is None:
            entry = cls._native(config_class)
            if entry is None:
                cls._refuse(config)
            found = registry.imported(entry)
        text_class = config.sub_configs.get("text_config")
        if text_class is not None and getattr(found, "config_class", None) is text_class:
            config = config.get_text_config()
        return found, config

    @classmethod
    def _native(cls, config_class: type[PreTrainedConfig]) -> registry.Entry | None:
        """Return the entry for a configuration class of this package."""
        entry = registry.CONFIGS.get(config_class.model_type)
        if entry != (config_class.__module__, config_class.__name__):
            return None
        return registry.MODELS[cls._head].get(config_class.model_type)

    @classmethod
    def _refuse(cls, config: PreTrainedConfig) -> NoReturn:
        names = sorted({*registry.MODELS[cls._head], *(c.model_type for c in cls._registered)})
        raise ValueError(
            f"{cls.__name__} has no class for {type(config).__name__} (model type "
            f"{config.model_type!r}); it has {', '.join(names)}"
        )


class AutoModel(_AutoModelClass):
    """The model without a head."""


class AutoModelForCausalLM(_AutoModelClass):
    """The model that predicts the next token."""


class AutoModelForMaskedLM(_AutoModelClass):
    """The model that predicts masked tokens."""


class AutoModelForSeq2SeqLM(_AutoModelClass):
    """The model that turns one sequence into another."""


class AutoModelForSequenceClassification(_AutoModelClass):
    """The model with one label a sequence."""


class AutoModelForTokenClassification(_AutoModelClass):
    """The model with one label a token."""


class AutoModelForQuestionAnswering(_AutoModelClass):
    """The model that finds where an answer starts and ends."""


class AutoModelForImageClassification(_AutoModelClass):
    """The model with one label an image."""


class AutoModelForMaskedImageModeling(_AutoModelClass):
    """The model that predicts masked patches."""


class AutoModelForMultipleChoice(_AutoModelClass):
    """The model that picks one of several continuations."""


class AutoModelForNextSentencePrediction(_AutoModelClass):
    """The model that says whether the second sentence follows."""


class AutoModelForPreTraining(_AutoModelClass):
    """The model with the heads it was first trained with."""


class AutoModelForTextEncoding(_AutoModelClass):
    """The model that only reads: the encoder of an encoder-decoder."""


class AnyModel(_AutoModelClass):
    """The model of the class that config.json names, what `PreTrainedModel` itself loads.

    Where that class is not here: the model without a head, or the checkpoint-backed one.
    """

    @classmethod
    def _found(cls, config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
        named = registry.find_class((config.architectures or [""])[0])
        if named is not None and getattr(named, "config_class", None) is type(config):
            return named, config
        return AutoModel._found(config)


def _config_class(model_type: str) -> Any:
    """Return the configuration class of a model type, None where there is none."""
    if model_type in _registered_configs:
        return _registered_configs[model_type]
    entry = registry.CONFIGS.get(model_type)
    return None if entry is None else registry.imported(entry)


def _known() -> str:
    return f"known here: {', '.join(sorted({*registry.CONFIGS, *_registered_configs}))}"
