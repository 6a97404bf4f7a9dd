"""Quantized files as the plain weights that a model takes: which there are, and under which names.

The formats, the formulas and the kernels are those of the pipeline's stage `dequantize`, so that a
model holds what the stage would write. From headers alone: nothing is decoded before each weight
has its place (`plan.fill_decoded`), and quantized weights are never held beside their plain values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor, TensorSpec
from ckptd.errors import CheckpointCorrupt
from ckptd.models.config import config_source
from ckptd.plan import dequantize
from ckptd.quant import configuration, leftovers, registry, stored
from ckptd.quant.group import Format, Found, Group, Stored

if TYPE_CHECKING:
    from ckptd.models.config.config import PreTrainedConfig
    from ckptd.models.loading.files import Weights

_NEVER_PACKED = frozenset({Dtype.BOOL, Dtype.I64, Dtype.U64, Dtype.F64})
"""Dtypes of masks, positions and counters: with plain floats alone nothing can be quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A checkpoint once it is plain.

    `tensors` are by plain name, in the order of the files: a group is decoded when it is placed, a
    stored tensor is what it was. `format_name` is what people call the format, None where no weight
    is quantized after all; `dtype` is what the weights are decoded to by default.
    """

    tensors: Mapping[str, StoredTensor | Group]
    format_name: str | None = None
    dtype: Dtype | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """What a model of it is made in by default, None where no weight is decoded."""
        if self.format_name is None or self.dtype is None:
            return None
        found: torch.dtype = getattr(torch, str(self.dtype.torch_name))
        return found

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name, dtype and shape of every tensor, decoded."""
        return {
            name: dataclasses.replace(tensor.spec, name=name)
            if isinstance(tensor, StoredTensor)
            else TensorSpec(name, self.dtype or tensor.dtype, tensor.shape)
            for name, tensor in self.tensors.items()
        }


def find(weights: Weights, config: PreTrainedConfig) -> Decoded:
    """Return the tensors of `weights` as they are once decoded; a plain checkpoint's as they are.

    The config.json beside the weights says how they are quantized, `config` where there is none.

    Raises:
        CheckpointUnsupported: a method or a variant that is not decoded.
        CheckpointCorrupt: a partner tensor is missing or does not fit, or a weight stands in the
            files both plain and quantized.
    """
    view = _stored(weights, config.to_dict())
    if not view.quantization and all(_is_plain(tensor) for tensor in weights.tensors.values()):
        return Decoded(tensors=weights.tensors)
    chosen = registry.choose(view)
    if chosen is None:
        return Decoded(tensors=weights.tensors)
    found = chosen.find(view)
    return _decoded(weights, chosen, found, dequantize.default_dtype(config.to_dict(), found))


def strip(config: PreTrainedConfig) -> None:
    """Take what says "quantized" out of a configuration and out of those in it; changes `config`."""
    for key, value in list(vars(config).items()):
        if key in configuration.QUANTIZATION_KEYS:
            delattr(config, key)
        elif hasattr(value, "to_diff_dict"):
            strip(value)
        elif isinstance(value, dict) and configuration.declared(value):
            setattr(config, key, configuration.without(value))


def require_plain_values(values: Mapping[str, torch.Tensor]) -> None:
    """Check that a state dictionary for a quantized configuration holds plain values.

    Raises:
        ValueError: a tensor is packed; names it.
    """
    for name, tensor in values.items():
        wide = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if not wide and tensor.dtype not in {torch.int64, torch.bool}:
            raise ValueError(
                f"state_dict: {name!r} is {tensor.dtype} and the configuration is quantized: only "
                "files are decoded, so give the folder or the repository instead"
            )


def _stored(weights: Weights, fallback: Mapping[str, Any]) -> Stored:
    """Return what formats may look at."""
    beside = weights.document(config_source.CONFIG_NAME) or {}
    declared = configuration.declared(beside) or configuration.declared(fallback)
    return Stored(
        path=weights.folder,
        config=beside or fallback,
        quantization=declared,
        tensors=weights.tensors,
        metadata=weights.metadata,
        document=weights.document,
        peek=stored.peek,
    )


def _is_plain(tensor: StoredTensor) -> bool:
    dtype = tensor.spec.dtype
    return dtype.is_plain_float or dtype in _NEVER_PACKED


def _decoded(weights: Weights, chosen: Format, found: Found, dtype: Dtype) -> Decoded:
    tensors: dict[str, StoredTensor | Group] = {}
    for name, new, group in dequantize.arranged(weights.tensors, found, taken=found.groups):
        if new in tensors:
            raise CheckpointCorrupt(
                "is in the checkpoint twice, plain and quantized",
                path=weights.folder,
                tensor=new,
                hint="remove the one that is left over from an earlier save",
            )
        tensors[new] = weights.tensors[name] if group is None else group
    made = Decoded(tensors=tensors, format_name=chosen.name if found.groups else None, dtype=dtype)
    specs = {name: (spec.dtype, spec.shape) for name, spec in made.specs.items()}
    leftovers.check(specs, path=weights.folder)
    return made
