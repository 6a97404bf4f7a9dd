"""`from_pretrained`: a configuration and weights from a folder or the Hub become a model.

The model is built without memory for its parameters, these are made once, in their final dtype and
on their final device, and the checkpoint's extents are read straight into them (plan.fill). Files
are never mapped, so a checkpoint that is replaced or truncated cannot harm a model that was loaded,
and pickles are never opened. What differs from transformers, knowingly: shapes are compared before
anything is read; a stale index or single file of an earlier save does not win; two tied weights
that differ set `tie_word_embeddings` to False, so that a later save keeps both; a state dictionary
is copied, not shared with the model; a quantized checkpoint becomes a plain model, its weights
decoded block of rows by block of rows into the parameters, whatever the library that wrote it.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ckptd.models import base, casting
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.config_source import Source
from ckptd.models.generation.generation_config import GenerationConfig
from ckptd.models.loading import files, load_options, placing, quantized
from ckptd.models.loading.files import Wanted, Weights
from ckptd.models.loading.load_options import LoadOptions
from ckptd.models.loading.placing import Placement, Value
from ckptd.models.loading.quantized import Decoded
from ckptd.plan import fill
from ckptd.quant import configuration
from ckptd.quant.group import Group

if TYPE_CHECKING:
    from ckptd.models.base import PreTrainedModel

_log = logging.getLogger(__name__)

Name = str | os.PathLike[str]


def load(
    cls: type[PreTrainedModel],
    pretrained_model_name_or_path: Name | None,
    *model_args: Any,
    config: PreTrainedConfig | Name | None = None,
    cache_dir: Name | None = None,
    ignore_mismatched_sizes: bool = False,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
    revision: str | None = "main",
    use_safetensors: bool | None = None,
    weights_only: bool = True,
    **kwargs: Any,
) -> Any:
    """Return a model of class `cls` in evaluation mode, every value read.

    Args:
        cls: the model's class.
        pretrained_model_name_or_path: a folder, a safetensors file, or a repository on the Hub;
            None where `config` and `state_dict` are given.
        model_args: go to the model's constructor.
        config: instead of the one found there: an object (copied), or a name like the above.
        cache_dir: where downloads are kept, instead of huggingface_hub's cache.
        ignore_mismatched_sizes: give tensors of another shape new values instead of raising.
        force_download: fetch even what is in the cache.
        local_files_only: never ask the Hub; HF_HUB_OFFLINE means the same.
        token: for the Hub; True is the stored one.
        revision: branch, tag, commit or `refs/pr/N`; all files are of one commit.
        use_safetensors: False asks for pickles and is refused.
        weights_only: accepted; nothing is ever unpickled.
        kwargs: `dtype` (or `torch_dtype`; "auto", the default, is the configuration's or the first
            float of the weights), `device` or `device_map` (one device), `output_loading_info`
            (gives `(model, info)`), `state_dict`, `attn_implementation`, `variant`, `subfolder`,
            `generation_config`, `key_mapping`, `proxies` (accepted), `trust_remote_code`
            (accepted; no code of a checkpoint runs), `quantization_config` (accepted where it says
            `dequantize=True`, which is what is done anyway). Others that name an attribute of the
            configuration override it where it is not given as an object; the rest goes to the
            model's constructor.

    Raises:
        OSError: no such folder, repository, revision or file, or a file that is not whole.
            Also a checkpoint that is quantized in a way that is not decoded, or wrongly.
        RuntimeError: shapes differ; lists name, shape in the checkpoint, shape in the model.
        ValueError: arguments that exclude each other, an unknown dtype, more than one device, a
            request to quantize, or float16 for quantized weights that are beyond it.
    """
    options = LoadOptions.taken_from(kwargs)
    source = Source(
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
        revision=revision or "main",
        subfolder=kwargs.pop("subfolder", None) or "",
        proxies=kwargs.pop("proxies", None),
    )
    name = pretrained_model_name_or_path
    _check_origin(name, config, options)
    if name is not None:
        source = files.pinned(name, source)
    made, model_kwargs = _configuration(cls, name, config, source, options, kwargs)
    found = _weights(name, source, options, use_safetensors, made)
    with files.documented_errors():
        decoded = _decoded(found, options.state_dict, made)
    values: Mapping[str, Value] = (
        decoded.tensors if options.state_dict is None else options.state_dict
    )
    dtype = _settle_dtype(made, options.dtype or decoded.torch_dtype, values)
    # A model made in inference mode could never be trained, and its memory not be filled by threads.
    with torch.inference_mode(mode=False):
        model = _built(cls, made, dtype, model_args, model_kwargs)
        placement = Placement(
            values=values,
            stamps=found.stamps,
            device=options.device,
            dtype=dtype,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            key_mapping=options.key_mapping or {},
        )
        with files.documented_errors(), torch.no_grad():
            info = placing.place(model, placement)
    table = info.table(cls.__name__, found.origin)
    if table is not None:
        _log.warning(table)
    model.eval()
    model.dequantized_from = decoded.format_name
    model._is_loaded_from_checkpoint = True  # saving then orders names as transformers does
    _give_generation_config(model, name, source, options)
    return (model, info.to_dict()) if options.output_loading_info else model


def _check_origin(name: Name | None, config: Any, options: LoadOptions) -> None:
    if options.state_dict is not None and name is not None:
        raise ValueError(
            "give a name or a `state_dict`, not both: with a state dictionary the first argument "
            "is None and `config` says what the model is"
        )
    if name is None and options.state_dict is None:
        raise ValueError("give the name of a folder or repository, or `config` and `state_dict`")
    if name is None and config is None:
        raise ValueError("a `state_dict` needs a `config`")


def _configuration(
    cls: type[PreTrainedModel],
    name: Name | None,
    config: PreTrainedConfig | Name | None,
    source: Source,
    options: LoadOptions,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Return the configuration, free to be changed, and the arguments left for the model."""
    chosen = {
        key: value
        for key in ("attn_implementation", "experts_implementation")
        if (value := getattr(options, key)) is not None
    }
    if isinstance(config, PreTrainedConfig):
        made, rest = copy.deepcopy(config), kwargs
    elif cls.config_class is None:
        raise ValueError(
            f"{cls.__name__} has no config_class: give `config`, or load with AutoModel or the "
            "class of the architecture"
        )
    else:
        made, rest = cls.config_class.from_pretrained(
            _config_place(config if config is not None else name),
            cache_dir=source.cache_dir,
            force_download=source.force_download,
            local_files_only=source.local_files_only,
            token=source.token,
            revision=(source.revision or "main") if config is None else "main",
            subfolder=source.subfolder,
            return_unused_kwargs=True,
            **chosen,
            **kwargs,
        )
    for key, value in chosen.items():
        setattr(made, f"_{key}", value)
    made.name_or_path = "" if name is None else os.fspath(name)
    return made, rest


def _config_place(name: Any) -> Any:
    """Return where config.json is: beside a weight file, where that is what was named."""
    path = Path(name).expanduser()
    return path.parent if path.suffix == ".safetensors" and path.is_file() else name


def _weights(
    name: Name | None,
    source: Source,
    options: LoadOptions,
    use_safetensors: bool | None,
    config: Any,
) -> Weights:
    if name is None:
        return Weights(origin="a state dictionary")
    wanted = Wanted(
        variant=options.variant,
        use_safetensors=use_safetensors,
        explicit=getattr(config, "transformers_weights", None),
    )
    found = files.read(name, source, wanted)
    for note in found.notes:
        _log.warning("%s: %s", found.origin, note)
    return found


def _decoded(found: Weights, state: Mapping[str, torch.Tensor] | None, config: Any) -> Decoded:
    """Return the tensors that the files hold once decoded; `config` then says nothing of it.

    Raises:
        ValueError: a state dictionary of quantized tensors.
    """
    if state is None:
        decoded = quantized.find(found, config)
    else:
        decoded = Decoded(tensors={})
        if configuration.declared(config.to_dict()):
            quantized.require_plain_values(state)
    if decoded.format_name is not None or configuration.declared(config.to_dict()):
        quantized.strip(config)
    return decoded


def _settle_dtype(
    config: Any, wanted: torch.dtype | None, values: Mapping[str, Value]
) -> torch.dtype:
    """Return the dtype of the model, and write it into the configuration and its parts."""
    dtype = wanted or load_options.as_dtype(_bare(config.dtype)) or _first_float(values)
    casting.say(config, dtype)
    return dtype


def _bare(dtype: Any) -> Any:
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


def _first_float(values: Mapping[str, Value]) -> torch.dtype:
    dtypes = (
        value.dtype if isinstance(value, torch.Tensor) else fill.torch_dtype(value)
        for _, value in sorted(values.items())
        if not isinstance(value, Group)
    )
    return next((one for one in dtypes if one in load_options.DTYPES), torch.float32)


def _built(
    cls: type[PreTrainedModel],
    config: Any,
    dtype: torch.dtype,
    model_args: tuple[Any, ...],
    model_kwargs: dict[str, Any],
) -> PreTrainedModel:
    """Return the model with parameters on the meta device and buffers computed on the host."""
    with base.default_dtype(dtype), torch.device("cpu"), placing.parameters_on_meta():
        return cls(config, *model_args, **model_kwargs)


def _give_generation_config(
    model: PreTrainedModel, name: Name | None, source: Source, options: LoadOptions
) -> None:
    """Load generation_config.json where there is one; else what the configuration says stands."""
    if not model.can_generate():
        return
    if options.generation_config is not None:
        model.generation_config = options.generation_config
        return
    if name is None or Path(name).expanduser().is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(
            Path(name).expanduser() if Path(name).expanduser().is_dir() else os.fspath(name),
            cache_dir=None if source.cache_dir is None else Path(source.cache_dir),
            force_download=source.force_download,
            local_files_only=source.local_files_only,
            token=source.token,
            revision=source.revision or "main",
            subfolder=source.subfolder,
        )
    except OSError:
        _log.info("%s: no generation_config.json; the model's configuration stands", name)
