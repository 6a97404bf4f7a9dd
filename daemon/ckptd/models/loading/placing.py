"""Giving a model, whose parameters are on the meta device, the values of a checkpoint.

Owns: which tensor of the checkpoint is which of the model, in what dtype it comes, and the state
that is left: every parameter has memory of its own and a value, from the checkpoint, from its tie,
or a new one. Memory is taken once, for what is used, and filled in place (plan.fill).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ckptd.checkpoint.header import FileStamp, StoredTensor
from ckptd.models import casting
from ckptd.models.loading import memory
from ckptd.models.loading.report import LoadingInfo
from ckptd.plan import fill, fill_decoded
from ckptd.plan.fill import Filling
from ckptd.plan.fill_decoded import Decoding
from ckptd.quant.group import Group

if TYPE_CHECKING:
    from ckptd.models.base import PreTrainedModel

Value = StoredTensor | Group | torch.Tensor
"""A tensor of the checkpoint: still in its file, plain or to be decoded from several tensors there, or
in memory (a state dictionary)."""

_OLD_NAMES = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}
"""What checkpoints of the first years call a norm's weight and bias."""
_RANDOM = frozenset(
    {
        "bernoulli_", "cauchy_", "exponential_", "geometric_", "kaiming_normal_",
        "kaiming_uniform_", "log_normal_", "normal_", "orthogonal_", "random_", "trunc_normal_",
        "uniform_", "xavier_normal_", "xavier_uniform_",
    }
)  # fmt: skip
_READ_THREADS = 2
"""More than two gain nothing: one copies while the other waits for pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What is to be placed and how.

    `stamps` are of the files of `values`; `dtype` is the one the model was built in;
    `key_mapping` renames tensors of the checkpoint (pattern -> replacement).
    """

    values: Mapping[str, Value]
    device: torch.device
    dtype: torch.dtype
    stamps: Mapping[Path, FileStamp] = field(default_factory=dict)
    ignore_mismatched_sizes: bool = False
    key_mapping: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place of the state dictionary: the module it is in and what it is called there."""

    module: nn.Module
    leaf: str

    @property
    def is_parameter(self) -> bool:
        return self.leaf in self.module._parameters

    @property
    def tensor(self) -> torch.Tensor:
        found = (self.module._parameters if self.is_parameter else self.module._buffers)[self.leaf]
        assert found is not None
        return found

    def renew(self, tensor: torch.Tensor, *, loaded: bool) -> None:
        """Put `tensor` here, marked where it needs no initial value; other names keep the old."""
        if self.is_parameter:
            wants_gradient = self.tensor.requires_grad and tensor.is_floating_point()
            tensor = nn.Parameter(tensor, requires_grad=wants_gradient)
            self.module._parameters[self.leaf] = tensor
        else:
            self.module._buffers[self.leaf] = tensor
        if loaded:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined] # users' rules read it


class _NoValues(TorchFunctionMode):
    """Drawing random values for a tensor on the meta device does nothing meanwhile.

    Nothing is what it does anyway, but torch imports its compiler first, which takes 1.5 seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        tensor = args[0] if args else given.get("tensor")
        if getattr(func, "__name__", "") in _RANDOM and tensor is not None and tensor.is_meta:
            return tensor
        return func(*args, **given)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that this thread makes meanwhile have parameters without memory.

    Buffers are computed as ever, for nothing in a checkpoint replaces them.
    """
    here = threading.get_ident()

    def without_memory(
        _module: nn.Module, _name: str, parameter: nn.Parameter
    ) -> nn.Parameter | None:
        if threading.get_ident() != here or parameter.is_meta:
            return None
        empty = torch.empty_like(parameter, device="meta")
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)

    register: Any = torch_module.register_module_parameter_registration_hook
    hook = register(without_memory)
    try:
        with _NoValues():
            yield
    finally:
        hook.remove()


def place(model: PreTrainedModel, placement: Placement) -> LoadingInfo:
    """Give every parameter and buffer of `model` its value on the device; return what did not fit.

    Blocks while files are read. After an exception the model is of no use.

    Raises:
        RuntimeError: shapes differ and `ignore_mismatched_sizes` is not set; raised before anything
            is read, with each name, shape in the checkpoint and shape in the model.
        SourceChanged: a file changed since its header was read.
        CheckpointUnsupported: torch has no such dtype.
    """
    slots = _slots(model)
    info = LoadingInfo(missing_keys=set(slots))
    chosen = _matched(model, slots, placement, info)
    if info.mismatched_keys and not placement.ignore_mismatched_sizes:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(model).__name__}:\n{info.mismatches()}\n"
            "\tgive ignore_mismatched_sizes=True to give these new values instead"
        )
    kept_in_fp32 = casting.kept_in_fp32(model, placement.dtype)
    _fill(slots, chosen, placement, kept_in_fp32)
    _renew_missing(model, slots, info, placement.device, kept_in_fp32)
    _move_buffers(model, placement.device)
    model.mark_tied_weights_as_initialized(info)
    _unmark_shared(model, slots, info)
    with _NoValues():
        model.initialize_weights()
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    info.ignore(
        missing=_patterns(model, "_keys_to_ignore_on_load_missing"),
        unexpected=[*_patterns(model, "_keys_to_ignore_on_load_unexpected"), *_once_saved(model)],
    )
    return info


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Return the places of the state dictionary by name."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        kept = module._buffers.keys() - module._non_persistent_buffers_set
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and (leaf in module._parameters or leaf in kept):
                found[dot + leaf] = _Slot(module, leaf)
    return found


def _matched(
    model: PreTrainedModel, slots: Mapping[str, _Slot], placement: Placement, info: LoadingInfo
) -> dict[str, Value]:
    """Return the value for each name of the model that the checkpoint has; the rest is in `info`."""
    chosen: dict[str, Value] = {}
    for key, value in placement.values.items():
        name = _name_in_model(key, slots, model.base_model_prefix, placement.key_mapping)
        if name not in slots:
            info.unexpected_keys.add(name)
        elif name in info.missing_keys:
            info.missing_keys.discard(name)
            theirs, ours = _shape(value), tuple(slots[name].tensor.shape)
            if theirs == ours:
                chosen[name] = value
            else:
                info.mismatched_keys.add((name, theirs, ours))
    filled = {(id(slots[name].module), slots[name].leaf) for name in chosen}
    # One module under two names is filled under either.
    info.missing_keys -= {
        name for name, slot in slots.items() if (id(slot.module), slot.leaf) in filled
    }
    return chosen


def _name_in_model(
    key: str, slots: Mapping[str, _Slot], prefix: str, key_mapping: Mapping[str, str]
) -> str:
    """Return what the model calls a tensor: renamed, and with or without the base model's prefix."""
    renamed = key
    for pattern, replacement in [*_OLD_NAMES.items(), *key_mapping.items()]:
        renamed = re.sub(pattern, replacement, renamed)
    name = _prefixed(renamed, slots, prefix)
    return _prefixed(key, slots, prefix) if name not in slots and key in slots else name


def _prefixed(key: str, slots: Mapping[str, _Slot], prefix: str) -> str:
    if not prefix:
        return key
    bare = key.removeprefix(f"{prefix}.")
    if bare != key and bare in slots:
        return bare
    return f"{prefix}.{key}" if f"{prefix}.{key}" in slots else key


def _shape(value: Value) -> tuple[int, ...]:
    return value.spec.shape if isinstance(value, StoredTensor) else tuple(value.shape)


def _fill(
    slots: Mapping[str, _Slot],
    chosen: Mapping[str, Value],
    placement: Placement,
    kept_in_fp32: re.Pattern[str] | None,
) -> None:
    fillings, decodings = [], []
    for name, value in chosen.items():
        target = _empty(name, slots[name], placement.device, kept_in_fp32)
        slots[name].renew(target, loaded=True)
        if isinstance(value, StoredTensor):
            fillings.append(Filling(value, target))
        elif isinstance(value, Group):
            decodings.append(Decoding(value, target))
        else:
            target.copy_(value.detach())
    fill.fill(fillings, stamps=placement.stamps, num_threads=_READ_THREADS)
    fill_decoded.fill(decodings, stamps=placement.stamps)


def _empty(
    name: str, slot: _Slot, device: torch.device, kept_in_fp32: re.Pattern[str] | None
) -> torch.Tensor:
    in_fp32 = kept_in_fp32 is not None and kept_in_fp32.search(name) is not None
    dtype = torch.float32 if in_fp32 else slot.tensor.dtype
    return memory.empty(slot.tensor.shape, dtype, device)


def _renew_missing(
    model: PreTrainedModel,
    slots: Mapping[str, _Slot],
    info: LoadingInfo,
    device: torch.device,
    kept_in_fp32: re.Pattern[str] | None,
) -> None:
    """Give memory to the parameters that get initial values; what will be tied needs none."""
    absent = info.missing_keys | {name for name, _, _ in info.mismatched_keys}
    ties = model.all_tied_weights_keys
    tied = ties.keys() | {source for target, source in ties.items() if target not in absent}
    for name in absent - tied:
        slot = slots[name]
        if slot.is_parameter and slot.tensor.is_meta:
            slot.renew(_empty(name, slot, device, kept_in_fp32).zero_(), loaded=False)


def _unmark_shared(model: PreTrainedModel, slots: Mapping[str, _Slot], info: LoadingInfo) -> None:
    """Let a tensor that is target and source of a tie at once, and missing, get initial values."""
    for target, source in model.all_tied_weights_keys.items():
        tensor = slots[source].tensor
        if tensor is slots[target].tensor and {target, source} <= info.missing_keys:
            tensor._is_hf_initialized = False  # type: ignore[attr-defined] # as above


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)


def _patterns(model: nn.Module, declaration: str) -> list[str]:
    """Return the patterns that a model, and each model inside it, declares."""
    return [one for module in model.modules() for one in getattr(module, declaration, None) or ()]


def _once_saved(model: nn.Module) -> Iterable[str]:
    """Yield patterns of buffers that older releases saved and that are now computed."""
    names = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in names):
        yield r"rotary_emb\.inv_freq"
    if any(name.endswith("position_ids") for name in names):
        yield r"(^|\.)position_ids$"
