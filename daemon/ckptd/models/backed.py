"""Models of any architecture, made from the checkpoint itself: everything but a forward.

`BackedModel` has a module for every part of a tensor's name, so that its parameters are called as
in the files. What needs no forward works as on a native model: footprint, counts, ties, resize,
saving, pushing. Which tensors are vocabulary and which are tied is read from the architecture table
(`architectures.json`) or, for unknown classes, from names, shapes and configuration, by the same
functions as the pipeline's stages; what cannot be placed is refused by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ckptd import errors
from ckptd.checkpoint.header import TensorSpec
from ckptd.models import embeddings, initializing, registry, resizing, ties
from ckptd.models.architectures import Role
from ckptd.models.base import PreTrainedModel
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.config_source import SOURCE_KEYS, Source
from ckptd.models.embeddings import Fill, Vocabulary, VocabularyTensor
from ckptd.models.loading import files, load_options, quantized
from ckptd.plan import fill


class BackedModel(PreTrainedModel):
    """A model of an architecture that has no native module here.

    Its `forward` raises; `config.architectures` says what it is a checkpoint of.
    """

    config_class = PreTrainedConfig
    _keeps_architectures = True
    """Saving writes the architecture that the checkpoint names, not this class."""
    _is_loaded_from_checkpoint = True

    def __init__(
        self,
        config: PreTrainedConfig,
        specs: Mapping[str, TensorSpec],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the modules that the names of tensors say, without values.

        Args:
            config: of any architecture.
            specs: the tensors by name, in the checkpoint's order; quantized ones as they are decoded.
            dtype: of those that are floating and wider than a byte; None keeps each one's own.
        """
        super().__init__(config)
        self._specs = dict(specs)
        self._wanted_dtype = dtype
        self._roles = self._find_roles()
        for spec in specs.values():
            self._plant(spec)
        self.all_tied_weights_keys = self._find_ties()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *_model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the model of a folder or of a repo on the Hub; arguments as the base class has.

        Without a `dtype` every tensor keeps its own, also where they differ; weights that are
        quantized are decoded to the dtype that config.json loads the model in.

        Raises:
            OSError: no such folder, repo or file, or a file that is not whole.
            ValueError: no name, for there is no model without a checkpoint.
        """
        name = pretrained_model_name_or_path
        if name is None:
            raise ValueError(f"{cls.__name__} is made from a checkpoint: give its name")
        places = {key: value for key, value in kwargs.items() if key in SOURCE_KEYS}
        if not isinstance(config, PreTrainedConfig):
            where = name if config is None else config
            config = cast("PreTrainedConfig", PreTrainedConfig.from_pretrained(where, **places))
        wanted = files.Wanted(
            variant=kwargs.get("variant"),
            explicit=getattr(config, "transformers_weights", None),
        )
        source = files.pinned(name, Source.taken_from(places))
        found = files.read(name, source, wanted)
        with files.documented_errors():
            specs = quantized.find(found, config).specs
        dtype = load_options.as_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")))
        return super().from_pretrained(name, specs, dtype, config=config, **kwargs)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse: nothing here knows how this architecture computes.

        Raises:
            NotImplementedError: always; names the architecture and those that run.
        """
        names = getattr(self.config, "architectures", None) or [self.config.model_type]
        raise NotImplementedError(
            f"{names[0]} has no forward here; it can be measured, tied, resized, saved and pushed. "
            f"Architectures that run: {', '.join(registry.CONFIGS)}"
        )

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return `{target: source}` of the names that are there, while the configuration ties."""
        return self._find_ties()

    def get_input_embeddings(self) -> Any:
        """Return the module of the input embedding.

        Raises:
            NotImplementedError: no tensor of the checkpoint is known to be it.
        """
        path = self._module_of(Role.INPUT)
        if path is None:
            raise NotImplementedError(f"{self._place}: no tensor is known to be the embedding")
        return self.get_submodule(path)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put `value` where the input embedding is."""
        self._put(self._module_of(Role.INPUT), value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the module of the head, or None where the checkpoint holds none."""
        path = self._module_of(Role.HEAD)
        return None if path is None else self.get_submodule(path)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put `new_embeddings` where the head is."""
        self._put(self._module_of(Role.HEAD), new_embeddings)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give every tensor of the text vocabulary another number of rows; as the base class.

        Raises:
            StageRefused: a tensor cannot be placed in or outside the vocabulary.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()  # type: ignore[no-any-return]
        vocabulary = self._vocabulary()
        rows = resizing.wanted_rows(vocabulary.rows, new_num_tokens, pad_to_multiple_of)
        std = initializing.standard_deviation(self.config)
        with torch.no_grad():
            for tensor in vocabulary.tensors:
                parameter = self.get_parameter_or_buffer(tensor.name)
                if parameter.shape[tensor.axis] != rows:
                    new = _grown(parameter, rows, tensor, mean=mean_resizing, std=std)
                    resizing.replace(parameter, new)
        for write in vocabulary.writes(rows):
            _write(self.config, write.key, write.value)
        for module in self.modules():
            _agree(module)
        self.tie_weights()
        return self.get_input_embeddings()  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every tensor comes from the checkpoint."""

    def _shaped(self) -> dict[str, TensorSpec]:
        """Return dtype and shape of every tensor as it is now, in the checkpoint's order."""
        here = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers())
        return {
            name: TensorSpec(
                name, spec.dtype, tuple(here[name].shape) if name in here else spec.shape
            )
            for name, spec in self._specs.items()
        }

    def _vocabulary(self) -> Vocabulary:
        return embeddings.find(self.config.to_dict(), self._shaped(), path=self._place)

    def _find_roles(self) -> dict[str, Role]:
        """Return the role of each vocabulary tensor; none where there is no known vocabulary."""
        with contextlib.suppress(errors.StageRefused):
            return {tensor.name: tensor.role for tensor in self._vocabulary().tensors}
        return {}

    def _find_ties(self) -> dict[str, str]:
        """Return `{name: anchor}` of the present tensors that the configuration ties."""
        with contextlib.suppress(errors.StageRefused):
            found = ties.find(self.config.to_dict(), self._shaped(), path=self._place)
            tied_by = {t.name: t.flag for group in found.groups for t in group.targets}
            return {
                name: group.anchor
                for group in found.groups
                for name in group.alike
                if name not in tied_by or tied_by[name].value(found.config)
            }
        return {}

    @property
    def _place(self) -> str:
        return self.name_or_path or type(self).__name__

    def _plant(self, spec: TensorSpec) -> None:
        """Put an empty parameter where its name says, with the modules above it."""
        *path, leaf = spec.name.split(".")
        node: nn.Module = self
        for depth, part in enumerate(path):
            if part not in node._modules:
                last = depth == len(path) - 1
                node._modules[part] = self._node(spec.name) if last else nn.Module()
            node = node._modules[part]  # type: ignore[assignment]
        kind = fill.as_torch(spec, Path(self._place))
        wants_gradient = kind.is_floating_point and kind.itemsize > 1
        if wants_gradient and self._wanted_dtype is not None:
            kind = self._wanted_dtype
        if self._roles.get(spec.name) is Role.LOGITS_BIAS:
            node.register_buffer(leaf, torch.empty(spec.shape, dtype=kind))
            return
        empty = torch.empty(spec.shape, dtype=kind, device="meta")
        node._parameters[leaf] = nn.Parameter(empty, requires_grad=wants_gradient)
        _agree(node)

    def _node(self, name: str) -> nn.Module:
        """Return the module for a tensor: an embedding or a head where it is one."""
        role = self._roles.get(name)
        if role is Role.INPUT and name.endswith(".weight"):
            return nn.Embedding(1, 1, device="meta")
        if role is Role.HEAD and name.endswith(".weight"):
            return nn.Linear(1, 1, bias=False, device="meta")
        return nn.Module()

    def _module_of(self, role: Role) -> str | None:
        """Return the path of the first module whose weight has a role."""
        found = next((name for name, its in self._roles.items() if its is role), None)
        return None if found is None else found.rpartition(".")[0]

    def _put(self, path: str | None, module: nn.Module) -> None:
        if path is None:
            raise NotImplementedError(f"{self._place}: no tensor is known to be that embedding")
        above, _, leaf = path.rpartition(".")
        self.get_submodule(above)._modules[leaf] = module


def _grown(
    parameter: torch.Tensor, rows: int, tensor: VocabularyTensor, *, mean: bool, std: float
) -> torch.Tensor:
    """Return a vocabulary tensor with `rows` rows along its axis."""
    if tensor.fill is Fill.ROWS:
        return resizing.grown_rows(parameter, rows, mean=mean, std=std)
    upright = parameter.detach().movedim(tensor.axis, 0)
    if tensor.fill is Fill.MEAN:
        grown = resizing.grown_bias(upright, rows, mean=mean)
    else:
        grown = resizing.zero_padded(upright, rows)
    return grown.movedim(0, tensor.axis).contiguous()


def _agree(module: nn.Module) -> None:
    """Let a module's sizes say what its weight is."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape


def _write(config: PreTrainedConfig, key: str, value: Any) -> None:
    """Set the value at a dotted key of a configuration."""
    *path, leaf = key.split(".")
    node: Any = config
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    if isinstance(node, dict):
        node[leaf] = value
    else:
        setattr(node, leaf, value)
