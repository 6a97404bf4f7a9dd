"""`PreTrainedModel`: the base of every native model, and the documented way to load and save one.

Names, signatures and defaults are those of the transformers 5.0 page, so that code written for it
runs here by changing the import; where the original is known to do harm, ours does the right thing
and the method says so. This module holds the object's life; loading, saving, resizing and tying are
modules of their own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from ckptd.models import casting, initializing, lookups, resizing, tied
from ckptd.models.checkpointing import TrainingMixin
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.generation.generation_config import GenerationConfig
from ckptd.models.layers import attention
from ckptd.models.loading import load_options
from ckptd.models.lookups import LookupsMixin
from ckptd.models.module_utils import ModuleUtilsMixin
from ckptd.models.push import PushToHubMixin

_log = logging.getLogger(__name__)


class PreTrainedModel(LookupsMixin, TrainingMixin, ModuleUtilsMixin, PushToHubMixin, nn.Module):
    """Base class for all models: configuration, weights on disk and on the Hub, embeddings.

    Class attributes, overridden by derived classes:

    - `config_class`: the configuration class of the architecture.
    - `base_model_prefix`: the attribute that holds the model without its head.
    - `main_input_name`: the principal input, `input_ids` for text, `pixel_values` for images.
    - `can_record_outputs`: which outputs a forward can record, by name.
    """

    config_class: ClassVar[type[PreTrainedConfig] | None] = None
    base_model_prefix = ""
    main_input_name: ClassVar[str] = "input_ids"
    can_record_outputs = lookups.Recordable()
    _can_record_outputs: ClassVar[dict[str, Any] | None] = None

    _tied_weights_keys: ClassVar[dict[str, str] | None] = None
    """`{target: source}`: parameters, modules or patterns."""
    _keys_to_ignore_on_load_missing: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _keep_in_fp32_modules: ClassVar[list[str] | None] = None
    _keep_in_fp32_modules_strict: ClassVar[list[str] | None] = None
    _no_split_modules: ClassVar[list[str] | None] = None
    _supports_sdpa: ClassVar[bool] = False
    _supports_flash_attn: ClassVar[bool] = False
    _supports_assign_param_buffer: ClassVar[bool] = True
    _auto_class: ClassVar[str | None] = None
    _is_loaded_from_checkpoint: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take `config_class` from the annotation `config: MyConfig`, where only that is given."""
        super().__init_subclass__(**kwargs)
        found = lookups.annotated_config(cls)
        if found is not None and "config_class" not in cls.__dict__:
            cls.config_class = found

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"{type(self).__name__}(config) takes a PreTrainedConfig, not a "
                f"{type(config).__name__}; use {type(self).__name__}.from_pretrained(name) for a "
                "folder or a repo"
            )
        self.config: Any = config
        self.name_or_path: str = getattr(config, "_name_or_path", "") or ""
        self.model_tags: list[str] | None = None
        self.all_tied_weights_keys: dict[str, str] = {}
        self.warnings_issued: dict[str, bool] = {}
        self.dequantized_from: str | None = None
        config._attn_implementation = attention.resolve(
            config._attn_implementation,
            type(self),
        )
        self.generation_config = (
            GenerationConfig.from_model_config(config) if self.can_generate() else None
        )

    def post_init(self) -> None:
        """Finish a model whose modules exist: know its tied weights, initialise what is missing.

        Called at the end of every model's `__init__`.
        """
        self.all_tied_weights_keys = tied.with_children(self)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise the weights that are not yet, then tie; a model on the meta device only ties."""
        if not any(parameter.is_meta for parameter in self.parameters()):
            self.initialize_weights()
        self.tie_weights(recompute_mapping=False)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise every module that is not marked as initialised, by the model it belongs to.

        A model inside this one initialises its own modules by its own `_init_weights`.
        """
        initializing.initialize(self)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; models with rules of their own override this."""
        initializing.default(module, std=initializing.standard_deviation(self.config))

    # Ties and embeddings

    def tie_weights(
        self, missing_keys: set[str] | None = None, recompute_mapping: bool = True
    ) -> None:
        """Tie the weights that are one parameter: each target becomes its source.

        Args:
            missing_keys: given while loading: the names the checkpoint did not have. Then tying is
                symmetric (the one that is there is the source), two that are there and differ stay
                apart, and `config.tie_word_embeddings` becomes False so that a later save keeps
                both, which the original forgets. What is tied leaves the set.
            recompute_mapping: ask all configurations again; False relies on
                `all_tied_weights_keys`.
        """
        if recompute_mapping:
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        if missing_keys is None:
            pairs = list(self.all_tied_weights_keys.items())
        else:
            pairs = tied.settle(self, missing_keys)
        tied.tie(self, pairs)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return `{target: source}` of this model with full parameter names.

        Args:
            all_submodels: of all models inside, too, each by its own configuration.

        Raises:
            ValueError: a pattern matches no parameter.
        """
        return tied.expanded(self, all_submodels=all_submodels)

    def mark_tied_weights_as_initialized(self, loading_info: Any = None) -> None:
        """Mark the targets of ties as initialised: they are overwritten anyway.

        Args:
            loading_info: accepted as documented; nothing is read from it.
        """
        for target in self.all_tied_weights_keys:
            self.get_parameter_or_buffer(target)._is_hf_initialized = True

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give the input embedding, and what belongs to it, another number of rows.

        Args:
            new_num_tokens: rows wanted; larger adds rows at the end, smaller removes them there.
                None keeps their number (or pads it).
            pad_to_multiple_of: round the number of rows up to a multiple of this.
            mean_resizing: draw new rows around the mean of the old ones with 1e-9 of their
                covariance; False draws them from N(0, initializer_range).

        Returns:
            The input embedding: the same module, changed in place.

        Raises:
            ValueError: `pad_to_multiple_of` is not a positive integer.
            TypeError: embedding or head are of a kind that cannot be resized.
        """
        with torch.no_grad():
            return resizing.resize(
                self, new_num_tokens, pad_to_multiple_of, mean_resizing=mean_resizing
            )

    # Loading, saving, the Hub

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        use_safetensors: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return a model with the weights of a folder or of a repo on the Hub, in evaluation mode.

        See `models.loading` for every argument; with `output_loading_info=True` a pair of the model
        and a dictionary of missing, unexpected and mismatched keys and error messages.
        `PreTrainedModel` itself gives the class that config.json names, and the checkpoint-backed
        model where there is none.

        Raises:
            OSError: no such folder, repo, revision or file, or a file that is not whole.
            RuntimeError: shapes do not fit and `ignore_mismatched_sizes` is not set.
            ValueError: arguments that exclude each other, or an unknown dtype.
        """
        from ckptd.models import auto
        from ckptd.models.loading import loading

        load: Callable[..., Any] = functools.partial(loading.load, cls)
        if cls is PreTrainedModel and (pretrained_model_name_or_path, config) != (None, None):
            load = auto.AnyModel.from_pretrained
        return load(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            cache_dir=cache_dir,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
            use_safetensors=use_safetensors,
            weights_only=weights_only,
            **kwargs,
        )

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Return a fresh model; `dtype` and `attn_implementation` override the configuration's."""
        wanted = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        if "attn_implementation" in kwargs:
            config._attn_implementation = kwargs.pop("attn_implementation")
        if wanted is None:
            wanted = config.dtype
        with default_dtype(wanted):
            return cls(config, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save configuration and weights so that `from_pretrained` loads them, here and elsewhere.

        See `models.saving` for every argument and for what is done better than in the original:
        the folder changes as a whole, stale weight files go, modes come from the umask.
        """
        from ckptd.models.saving import saving

        saving.save(
            self,
            save_directory,
            is_main_process=is_main_process,
            state_dict=state_dict,
            push_to_hub=push_to_hub,
            max_shard_size=max_shard_size,
            variant=variant,
            token=token,
            save_peft_format=save_peft_format,
            save_original_format=save_original_format,
            **kwargs,
        )

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags that go into the model card when the model is pushed; none is doubled."""
        wanted = [tags] if isinstance(tags, str) else list(tags)
        have = list(self.model_tags or [])
        self.model_tags = list(dict.fromkeys([*have, *wanted]))

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Register this (custom) class with an auto class; its code is then saved along.

        Raises:
            ValueError: there is no auto class of that name.
        """
        from ckptd.models import auto

        name = auto_class if isinstance(auto_class, str) else auto_class.__name__
        cls._auto_class = auto.check_auto_class(name)

    def dequantize(self, dtype: torch.dtype | None = None) -> Self:
        """Return this model, which is plain already; with a `dtype`, cast to it.

        transformers holds quantized modules in memory and replaces them here, for three of its
        methods. Here weights of every method are decoded while they are loaded, and none is ever
        held quantized: `dequantized_from` names the format of the files, None for plain ones. A
        `dtype` given to `from_pretrained` rounds once, straight from the quantized values; given
        here it rounds again what was loaded. Parameters stay the same objects.

        Raises:
            ValueError: the model was not loaded from a quantized checkpoint, or cannot be in `dtype`.
        """
        if self.dequantized_from is None:
            raise ValueError("You need to first quantize your model in order to dequantize it")
        if dtype is not None:
            casting.cast(self, load_options.as_dtype(dtype) or self.dtype)
        return self

    # Generation, compilation, attention

    @classmethod
    def can_generate(cls) -> bool:
        """Return whether the model has `.generate()`, by the `GenerationMixin` among its bases."""
        return any(base.__name__ == "GenerationMixin" for base in cls.__mro__)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Choose how attention is computed: "eager" or "sdpa".

        Args:
            attn_implementation: a name for the whole model, or names by sub-configuration, "" being
                the top one. Each part is held to what its own model supports; a part that is
                not named keeps its choice, one that is not there is skipped with a warning.

        Raises:
            ValueError: an unknown name, or one this model does not support.
            ImportError: a package it needs is not installed.
        """
        attention.choose(self, attn_implementation)

    def get_compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """Return a compiled `__call__`, kept until another configuration is asked for.

        Args:
            compile_config: arguments of `torch.compile` as a mapping, or an object with `to_dict`;
                None stands for `fullgraph=False, backend="inductor", mode="reduce-overhead"`.
        """
        wanted = _compile_arguments(compile_config)
        kept = self.__dict__.get("_compiled_call_kept")
        if kept is None or kept[0] != wanted:
            kept = (wanted, torch.compile(self.__call__, **wanted))
            self.__dict__["_compiled_call_kept"] = kept
        compiled: Callable[..., Any] = kept[1]
        return compiled

    def warn_if_padding_and_no_attention_mask(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> None:
        """Warn, once, when the input seems padded and no attention mask says where."""
        pad = self.config.pad_token_id
        if attention_mask is not None or pad is None or self.warnings_issued.get("padding"):
            return
        if pad not in input_ids[:, [-1, 0]]:
            return
        text = (
            "padding tokens stand in `input_ids` and there is no `attention_mask`: the output will "
            "depend on the padding"
        )
        names = ("bos_token_id", "eos_token_id", "sep_token_id")
        if any(getattr(self.config, name, None) == pad for name in names):
            text += f" (the pad token {pad} is also bos, eos or sep: ignore this if it was meant)"
        _log.warning(text)
        self.warnings_issued["padding"] = True


@contextlib.contextmanager
def default_dtype(wanted: torch.dtype | str | None) -> Iterator[None]:
    """Make new floating tensors of this dtype meanwhile; None and integers change nothing."""
    kind = getattr(torch, wanted.removeprefix("torch.")) if isinstance(wanted, str) else wanted
    before = torch.get_default_dtype()
    if kind is not None and kind.is_floating_point:
        torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _compile_arguments(compile_config: Any) -> dict[str, Any]:
    if compile_config is None:
        return {"fullgraph": False, "backend": "inductor", "mode": "reduce-overhead"}
    if hasattr(compile_config, "to_dict"):
        return dict(compile_config.to_dict())
    return dict(compile_config)
