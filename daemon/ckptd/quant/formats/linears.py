"""Modules whose weight became `qweight`, `qzeros` and `scales`: what GPTQ, AWQ and AutoRound share.

Which modules these are say the tensors; widths and groups say their shapes. The config is asked only
where shapes leave a choice, and refused where it contradicts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant.formula import ceil_div
from ckptd.quant.group import Stored

CODES = ".qweight"
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
"""The bits of a code that writers offer."""
WORDS = frozenset({Dtype.I8, Dtype.I16, Dtype.I32, Dtype.I64, Dtype.U8, Dtype.U32})
"""What codes are packed into; nearly always `I32`."""
FLOATS = frozenset({Dtype.F16, Dtype.BF16, Dtype.F32})
_RESAVE = "save the model again with the library that quantized it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """The tensors of one quantized module; raises what is wrong with them by name."""

    stored: Stored
    name: str
    codes: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None

    @property
    def consumed(self) -> tuple[str, ...]:
        """The names of all."""
        wanted = (self.codes, self.zeros, self.scales, self.g_idx)
        return tuple(one.spec.name for one in wanted if one is not None)

    def corrupt(self, tensor: StoredTensor, what: str, expected: str) -> CheckpointCorrupt:
        """Return the refusal of the module for one of its tensors."""
        return CheckpointCorrupt(
            what,
            path=tensor.extent.path,
            tensor=tensor.spec.name,
            expected=expected,
            found=f"{tensor.spec.dtype} {list(tensor.spec.shape)}",
            hint=_RESAVE,
        )

    def unsupported(self, what: str, *, expected: str | None = None) -> CheckpointUnsupported:
        """Return the refusal of the module for what it is."""
        return CheckpointUnsupported(
            what,
            path=self.codes.extent.path,
            tensor=self.codes.spec.name,
            expected=expected,
            found=f"{self.codes.spec.dtype} {list(self.codes.spec.shape)}",
            hint="dequantize it with the library that wrote it, and save that",
        )

    def require(
        self, tensor: StoredTensor, dtypes: frozenset[Dtype], shape: tuple[int, ...]
    ) -> None:
        """Refuse `tensor` unless it has one of `dtypes` and exactly `shape`."""
        if tensor.spec.dtype not in dtypes or tensor.spec.shape != shape:
            raise self.corrupt(
                tensor, "does not fit its partners", f"{'|'.join(sorted(dtypes))} {list(shape)}"
            )

    def matrix(self, tensor: StoredTensor, dtypes: frozenset[Dtype]) -> tuple[int, int]:
        """Return the two axes of `tensor`, which has one of `dtypes`."""
        if tensor.spec.dtype not in dtypes or len(tensor.spec.shape) != 2:
            raise self.corrupt(
                tensor, "is not a matrix of its kind", f"{'|'.join(sorted(dtypes))}, 2 axes"
            )
        return tensor.spec.shape[0], tensor.spec.shape[1]


def linears(stored: Stored) -> tuple[Linear, ...]:
    """Return every quantized module, in the order of names.

    Raises:
        CheckpointCorrupt: a partner is missing; names the module and the partner.
    """
    names = {name.removesuffix(CODES) for name in stored.tensors if name.endswith(CODES)}
    names |= {name.removesuffix(".qzeros") for name in stored.tensors if name.endswith(".qzeros")}
    return tuple(_linear(stored, name) for name in sorted(names))


def _linear(stored: Stored, name: str) -> Linear:
    def required(*fields: str) -> StoredTensor:
        for field in fields:
            if f"{name}.{field}" in stored.tensors:
                return stored.tensors[f"{name}.{field}"]
        raise CheckpointCorrupt(
            "is quantized, but a partner is missing",
            path=stored.path,
            tensor=name + CODES,
            expected=f"{name}.{fields[0]}",
            hint=_RESAVE,
        )

    return Linear(
        stored=stored,
        name=name,
        codes=required("qweight"),
        zeros=required("qzeros", "scaled_zeros"),
        scales=required("scales"),
        g_idx=stored.tensors.get(f"{name}.g_idx"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the config says of widths and groups, where it says something that can be.

    `of_modules` are the groups that single modules or patterns of them have instead.
    """

    bits: int | None
    group: int | None
    of_modules: Mapping[str, int]

    def fitting_group(self, inputs: int, groups: int, module: str = "") -> int | None:
        """Return the first group size that makes `groups` of `inputs`; a module's own comes first."""
        for size in (self.of_modules.get(module), self.group, *self.of_modules.values()):
            if size is not None and size > 0 and ceil_div(inputs, size) == groups:
                return size
        return None

    def group_of(self, linear: Linear, inputs: int, groups: int) -> int:
        """Return the inputs of a group, of which `groups` make up `inputs`.

        Raises:
            CheckpointCorrupt: no group size of the config makes that many groups.
        """
        if groups == min(1, inputs):
            return max(1, inputs)
        size = self.fitting_group(inputs, groups, linear.name)
        if size is not None:
            return size
        raise linear.corrupt(
            linear.scales,
            "has another number of groups than the config's group_size makes",
            f"a row a group of {self.group or '(group_size is missing)'} of {inputs} inputs",
        )


def settings(*configs: Mapping[str, Any]) -> Settings:
    """Return what the first of `configs` that says it says of bits and groups."""
    overrides = dict(_overrides(configs))
    return Settings(
        bits=_first(configs, ("bits", "w_bit")),
        group=_first(configs, ("group_size", "q_group_size")),
        of_modules=overrides,
    )


def _first(configs: tuple[Mapping[str, Any], ...], keys: tuple[str, ...]) -> int | None:
    found = (whole(config.get(key)) for config in configs for key in keys)
    return next((value for value in found if value is not None), None)


def width(linear: Linear, fitting: list[int], said: Settings) -> int:
    """Return the bits of a code: what shapes leave no other choice than, or the config chooses.

    Raises:
        CheckpointCorrupt: no width fits the shapes, or several do and the config names none.
    """
    if len(fitting) == 1:
        return fitting[0]
    if said.bits in fitting:
        return said.bits
    if fitting:
        raise linear.corrupt(
            linear.zeros, "fits several widths", f"the config to name one of {fitting} as bits"
        )
    raise linear.corrupt(
        linear.zeros,
        "fits no width of codes",
        f"words of 2 to 8 bits a code, like {linear.codes.spec.dtype} "
        f"{list(linear.codes.spec.shape)} of {linear.codes.spec.name}",
    )


def _overrides(configs: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, int]]:
    for config in configs:
        for key in ("dynamic", "extra_config"):
            of_modules = config.get(key)
            if not isinstance(of_modules, Mapping):
                continue
            for name, values in of_modules.items():
                size = whole(values.get("group_size")) if isinstance(values, Mapping) else None
                if size is not None:
                    yield str(name), size


def by_autoround(config: Mapping[str, Any]) -> bool:
    """Return whether AutoRound wrote the config, in whatever format."""
    return config.get("provider") == "auto-round" or "autoround_version" in config


def whole(value: Any) -> int | None:
    """Return a whole number of JSON, or None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text(value: Any) -> str:
    """Return a text of JSON in lower case, or an empty one for anything else."""
    return value.lower() if isinstance(value, str) else ""
