"""GGUF: the files of llama.cpp, blocks of every type, back to the names and order of transformers.

All tensors are found by name, for GGUF has no partners: scales lie within the blocks. Blocks and
whatever its converter changed become weights; the rest is renamed and stays bit for bit. A tensor
that the architecture does not know is refused, for leaving it out would change the model.
Source: the GGUF specification, llama.cpp's converters; values as gguf-py dequantizes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ckptd.checkpoint import ggml
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import parts
from ckptd.quant.formats import gguf_names
from ckptd.quant.formats.gguf_names import Naming, Place
from ckptd.quant.formulas.gguf import Gguf
from ckptd.quant.group import Found, Group, Stored
from ckptd.quant.parts import Part

_ARCHITECTURE = "general.architecture"


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """See the module; `ckptd.checkpoint` has read the files already."""

    name: str = "GGUF"
    methods: tuple[str, ...] = ("gguf",)
    side_files: tuple[str, ...] = ()
    skip_key: str | None = None

    def recognise(self, stored: Stored) -> str | None:
        """Return the architecture that only GGUF files name so."""
        told = _metadata(stored).get(_ARCHITECTURE)
        return None if told is None else f"{_ARCHITECTURE} is {told}"

    def find(self, stored: Stored) -> Found:
        """Return the weights, the names of all others, and what only serves llama.cpp.

        Raises:
            CheckpointUnsupported: an architecture or a tensor that is not known.
            CheckpointCorrupt: config.json and the files are of different models, or heads do not
                divide a matrix.
        """
        model = _Model(stored, _naming(stored))
        groups: list[Group] = []
        renamed: list[tuple[str, str]] = []
        dropped: list[str] = []
        for name, tensor in stored.tensors.items():
            if gguf_names.is_dropped(name):
                dropped.append(name)
                continue
            found = model.place(name)
            if found.is_second:
                model.require_partner(tensor, found)  # which is decoded for both
            elif model.is_kept(tensor, found):
                renamed.append((name, found.name))
            else:
                groups += model.groups(tensor, found)
        return Found(groups=tuple(groups), dropped=tuple(dropped), renamed=tuple(renamed))


@dataclass(frozen=True, slots=True)
class _Model:
    """The model that is looked at."""

    stored: Stored
    naming: Naming

    def place(self, name: str) -> Place:
        """Return where a tensor belongs.

        Raises:
            CheckpointUnsupported: nobody knows it.
        """
        found = gguf_names.place(self.naming, name)
        if found is None:
            raise CheckpointUnsupported(
                f"a tensor that {_architecture(self.stored)} models do not have elsewhere",
                path=self.stored.path,
                tensor=name,
                hint="take the model's own safetensors files",
            )
        return found

    def require_partner(self, tensor: StoredTensor, found: Place) -> StoredTensor:
        """Return the tensor that has the other half of a weight's columns.

        Raises:
            CheckpointCorrupt: there is none, or one of another shape or type; or they are not
                matrices of experts, or plain biases of them.
        """
        assert found.partner is not None
        partner = self.stored.tensors.get(found.partner)
        axes = 3 if found.kind == "weight" else 2
        is_block = tensor.spec.name in self.stored.encodings
        if len(tensor.spec.shape) != axes or (is_block and found.kind != "weight"):
            what = "is not one matrix or one plain vector an expert"
            raise self._wrong(tensor, what, f"{axes} dimensions")
        if partner is None or self._described(partner) != self._described(tensor):
            raise CheckpointCorrupt(
                "is half of a weight, and the other half is not there or does not fit",
                path=tensor.extent.path,
                tensor=tensor.spec.name,
                expected=f"{found.partner}, {self._described(tensor)}",
                found="none" if partner is None else self._described(partner),
                hint="copy the file again, or take the model's own safetensors files",
            )
        return partner

    def _described(self, tensor: StoredTensor) -> str:
        spec = tensor.spec
        return f"{self.stored.encodings.get(spec.name, spec.dtype)} {list(spec.shape)}"

    def is_kept(self, tensor: StoredTensor, found: Place) -> bool:
        """Return whether a tensor only changes its name."""
        changed = found.of_experts or self.head_rows(tensor, found) > 1
        changed = changed or self.is_shifted(found) or self.is_transposed(tensor, found)
        moved = self.shape(tensor, found) != tensor.spec.shape
        return tensor.spec.name not in self.stored.encodings and not changed and not moved

    def is_shifted(self, found: Place) -> bool:
        """Return whether one was added to a norm's weight."""
        return self.naming.shifted and found.module.endswith("norm")

    def is_transposed(self, tensor: StoredTensor, found: Place) -> bool:
        """Return whether it is the matrix of a `Conv1D`, or matrices of experts that lie so."""
        is_weight = found.kind == "weight" and len(tensor.spec.shape) >= 2
        return is_weight and found.module in self.naming.transposed

    def head_rows(self, tensor: StoredTensor, found: Place) -> int:
        """Return the rows of each head whose rows are interleaved; 1 where none are.

        Raises:
            CheckpointCorrupt: no number of heads, or one that does not fit.
        """
        key = self.naming.heads.get(found.module)
        if key is None:
            return 1
        heads = _heads(self.stored, key)
        rows = tensor.spec.shape[0] if tensor.spec.shape else 0
        if heads < 1 or rows % (2 * heads):
            raise CheckpointCorrupt(
                "its rows are not whole heads of an even number of rows",
                path=tensor.extent.path,
                tensor=tensor.spec.name,
                expected=f"a multiple of {2 * heads} rows for {heads} heads",
                found=f"{rows}",
            )
        return max(1, rows // heads)

    def shape(self, tensor: StoredTensor, found: Place) -> tuple[int, ...]:
        """Return the shape that the plain tensor has, experts still together."""
        shape = tensor.spec.shape
        encoding = self.stored.encodings.get(tensor.spec.name)
        if encoding is not None:
            kind = ggml.BLOCK_TYPES[encoding]
            shape = (*shape[:-1], shape[-1] // kind.block_bytes * kind.elements)
        if found.module == "ffn_gate_inp_shexp" and len(shape) == 1:
            return (1, *shape)  # the first converters wrote this matrix of one row as a vector
        if self.is_transposed(tensor, found):
            shape = (*shape[:-2], shape[-1], shape[-2])
        return shape if found.partner is None else (*shape[:-1], shape[-1] * 2)

    def groups(self, tensor: StoredTensor, found: Place) -> Iterator[Group]:
        """Yield the weights that a tensor is: one, or one an expert."""
        shape = self.shape(tensor, found)
        part, encoding = self._part(tensor, shape, found)
        consumed = [tensor.spec.name]
        partner = None
        if found.partner is not None:
            other = self.require_partner(tensor, found)
            consumed.append(other.spec.name)
            partner, _ = self._part(other, shape, found)
        stacked = found.of_experts or (self.is_transposed(tensor, found) and len(shape) > 2)
        if found.of_experts and len(shape) != 3:
            raise self._wrong(tensor, "is not one matrix an expert", "three dimensions")
        count = shape[0] if stacked else 1
        partners = [None] * count if partner is None else parts.stacked(partner, count)
        formulas = [
            self._formula(tensor, found, one, other_one, shape[1:] if stacked else shape, encoding)
            for one, other_one in zip(parts.stacked(part, count), partners, strict=True)
        ]
        whole = Group(
            name=found.name,
            shape=shape,
            formulas=tuple(formulas),
            consumed=tuple(consumed),
            scheme=_scheme(encoding),
        )
        if not found.of_experts:
            yield whole
            return
        for number, formula in enumerate(formulas):
            name = found.name.format(number)
            yield dataclasses.replace(whole, name=name, shape=shape[1:], formulas=(formula,))

    def _part(self, tensor: StoredTensor, shape: tuple[int, ...], found: Place) -> tuple[Part, str]:
        """Return the stored bytes as rows of blocks, and the type of these."""
        encoding = self.stored.encodings.get(tensor.spec.name)
        if encoding is not None:
            columns = tensor.spec.shape[-1]
            if len(shape) == 1:
                columns = ggml.BLOCK_TYPES[encoding].block_bytes
            return parts.part(tensor, columns=columns), encoding
        dtype = tensor.spec.dtype
        if not dtype.is_plain_float:
            raise CheckpointUnsupported(
                "a weight that is no float",
                path=tensor.extent.path,
                tensor=tensor.spec.name,
                found=f"{dtype}",
            )
        width = 1 if len(shape) == 1 else tensor.spec.shape[-1]
        return parts.part(tensor, columns=width * dtype.bits // 8, dtype=Dtype.U8), dtype.value

    def _formula(
        self,
        tensor: StoredTensor,
        found: Place,
        part: Part,
        partner: Part | None,
        shape: tuple[int, ...],
        encoding: str,
    ) -> Gguf:
        shift = -1.0 if self.is_shifted(found) else 0.0
        plain = encoding not in ggml.BLOCK_TYPES and not shift
        return Gguf(
            blocks=part,
            partner=partner,
            encoding=encoding,
            columns=1 if len(shape) == 1 else shape[-1],
            head_rows=self.head_rows(tensor, found),
            transposed=self.is_transposed(tensor, found),
            shift=shift,
            dtype=Dtype(encoding) if plain else Dtype.F32,
        )

    def _wrong(self, tensor: StoredTensor, what: str, expected: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(
            what,
            path=tensor.extent.path,
            tensor=tensor.spec.name,
            expected=expected,
            found=self._described(tensor),
        )


def _naming(stored: Stored) -> Naming:
    """Return the naming of the model's architecture.

    Raises:
        CheckpointUnsupported: an architecture without one.
        CheckpointCorrupt: config.json is another model's.
    """
    architecture = _architecture(stored)
    naming = gguf_names.NAMINGS.get(architecture)
    if naming is None:
        raise CheckpointUnsupported(
            f"GGUF models of the architecture {architecture!r} are not decoded",
            path=stored.path,
            expected=", ".join(sorted(gguf_names.NAMINGS)),
            found=architecture or "none",
            hint="take the model's own safetensors files",
        )
    if architecture == "llama" and any(".ffn_gate_inp." in name for name in stored.tensors):
        naming = gguf_names.MIXTRAL
    model_type = stored.config.get("model_type")
    if model_type not in naming.model_types:
        raise CheckpointCorrupt(
            "config.json and the GGUF file are of different models",
            path=stored.path,
            expected=f"model_type {' or '.join(naming.model_types)} for {architecture}",
            found=repr(model_type)[:80],
            hint="give the config.json of this model, or none where it can be made",
        )
    _require_sizes(stored, architecture)
    return naming


def _require_sizes(stored: Stored, architecture: str) -> None:
    """Refuse a config of a model of another size, or one that misses an output matrix."""
    metadata = _metadata(stored)
    for keys, told in (
        (("hidden_size", "n_embd"), "embedding_length"),
        (("num_hidden_layers", "n_layer"), "block_count"),
        (("num_attention_heads", "n_head"), "attention.head_count"),
    ):
        ours = next((stored.config[key] for key in keys if key in stored.config), None)
        theirs = metadata.get(f"{architecture}.{told}")
        if ours is not None and theirs is not None and str(ours) != theirs:
            raise CheckpointCorrupt(
                f"config.json and the GGUF file disagree about {keys[0]}",
                path=stored.path,
                expected=theirs[:80],
                found=repr(ours)[:80],
                hint="give the config.json of this model",
            )
    if stored.config.get("tie_word_embeddings") is False and "output.weight" not in stored.tensors:
        raise CheckpointCorrupt(
            "config.json says that the output matrix is not tied, and the file has none",
            path=stored.path,
            tensor="output.weight",
            hint="set tie_word_embeddings to true in config.json",
        )


def _metadata(stored: Stored) -> dict[str, str]:
    """Return the metadata of the first file that names an architecture."""
    for one in stored.metadata:
        if _ARCHITECTURE in one:
            return dict(one)
    return {}


def _architecture(stored: Stored) -> str:
    return _metadata(stored).get(_ARCHITECTURE, "")


def _heads(stored: Stored, key: str) -> int:
    """Return a number of heads; that of keys is that of queries where it is not said."""
    metadata, architecture = _metadata(stored), _architecture(stored)
    told = metadata.get(
        f"{architecture}.{key}", metadata.get(f"{architecture}.attention.head_count")
    )
    distinct = set((told or "").split(","))
    if len(distinct) != 1 or not (text := distinct.pop()).isdecimal() or len(text) > 9:
        raise CheckpointCorrupt(
            f"the metadata has no one number {architecture}.{key}",
            path=stored.path,
            found=repr(told)[:80],
        )
    return int(text)


def _scheme(encoding: str) -> str:
    kind = ggml.BLOCK_TYPES.get(encoding)
    if kind is None:
        return f"{encoding}, plain"
    bits = kind.block_bytes * 8 / kind.elements
    return f"{encoding}, {bits:g} bits a weight"


FORMAT = GgufFormat()
