"""Reading pickles without executing them: data, tensors as places of bytes, and inert stand-ins.

A pickle is a program that may call anything it can import. Here nothing is imported: every global
becomes a subclass of `Inert`, a name that does nothing; an instance remembers arguments and state. Only what a checkpoint is made of has meaning: ordered dicts, sizes, and the
functions with which torch rebuilds tensors from storages. The bytes of storages are not read; a
tensor is a `TensorRef` to them. Sources: the pickle protocol (PEP 307, PEP 3154); `torch.save`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt

MAX_PICKLE_BYTES = 512 << 20
"""The names and shapes of a trillion parameters on thousands of ranks are below this."""
MAX_GLOBALS = 10_000
"""Names of classes and functions; real files have some tens."""

_STORAGES = {
    "DoubleStorage": Dtype.F64,
    "FloatStorage": Dtype.F32,
    "HalfStorage": Dtype.F16,
    "BFloat16Storage": Dtype.BF16,
    "LongStorage": Dtype.I64,
    "IntStorage": Dtype.I32,
    "ShortStorage": Dtype.I16,
    "CharStorage": Dtype.I8,
    "ByteStorage": Dtype.U8,
    "UntypedStorage": Dtype.U8,
    "BoolStorage": Dtype.BOOL,
    "ComplexFloatStorage": Dtype.C64,
}
"""Storage classes of torch; an untyped one gets its dtype from the function that rebuilds."""


class Items(dict[Any, Any]):
    """An ordered dict; the attributes that one is given (a state_dict's versions) are not kept."""

    def __setstate__(self, state: Any) -> None:
        """Take no state."""


class _Sealed:
    """A value that a pickle cannot change once it is made."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} has no state")


class Inert:
    """What a class or function of the pickle would have made: arguments, state and items.

    Each global of a pickle is a subclass of its own with that `name`; the class itself stands for
    the global. Calling it makes an instance, and nothing else happens.
    """

    name: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Return a stand-in that remembers what it was called with."""
        made = super().__new__(cls)
        made.args, made.kwargs, made.state, made.items = args, kwargs, None, []
        return made

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing more."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Remember an element."""
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Remember elements."""
        self.items.extend(values)

    def add(self, value: Any) -> None:
        """Remember an element of a set."""
        self.items.append(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Return what calling this would have made."""
        return Inert(self, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.name} of {len(self.args)} arguments, not executed>"


@dataclass(frozen=True, slots=True)
class StorageRef(_Sealed):
    """A storage of a torch file: its key there, dtype and number of elements."""

    key: str
    dtype: Dtype
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef(_Sealed):
    """A tensor as elements of a storage: offset and strides count elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Dtype

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in the storage one after the other."""
        expected = 1
        for length, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and step != expected:
                return 0 in self.shape
            expected *= length
        return True


def name_of(value: Any) -> str:
    """Return the full name of a global, such as `torch.bfloat16`; empty for anything else."""
    return value.name if isinstance(value, type) and issubclass(value, Inert) else ""


def loads(data: bytes, *, path: Path) -> Any:
    """Return the value of the pickle `data`, which lies in the file at `path`.

    Raises:
        CheckpointCorrupt: not a pickle, cut short, too large, or one whose program does not hold.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointCorrupt(
            "its pickle is too large",
            path=path,
            expected=f"at most {MAX_PICKLE_BYTES} bytes",
            found=f"{len(data)}",
        )
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError,
        AttributeError, RecursionError, MemoryError, OverflowError, ImportError,
    ) as error:  # fmt: skip
        raise CheckpointCorrupt(
            f"its pickle cannot be read: {type(error).__name__}: {error}"[:300],
            path=path,
            hint="the file is damaged, or is not what its name says",
        ) from error


class _Unpickler(pickle.Unpickler):
    """An unpickler that imports nothing."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._stand_ins: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        full = f"{module}.{name}"
        if full not in self._stand_ins:
            if len(self._stand_ins) >= MAX_GLOBALS:
                raise pickle.UnpicklingError(f"more than {MAX_GLOBALS} classes")
            self._stand_ins[full] = type("Inert", (Inert,), {"name": full})
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> StorageRef:
        """Return the storage that `("storage", class, key, location, numel)` names."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}"[:200])
        kind, key, numel = pid[1], pid[2], pid[4]
        name = name_of(kind).rpartition(".")[2]
        if name not in _STORAGES or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError(f"unknown storage {name!r} of {numel!r}"[:200])
        return StorageRef(str(key), _STORAGES[name], numel)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Dtype | None = None
) -> TensorRef:
    sizes = [offset, *shape, *stride]
    if not isinstance(storage, StorageRef) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise pickle.UnpicklingError(f"a tensor of shape {shape!r}"[:200])
    return TensorRef(storage, offset, tuple(shape), tuple(stride), dtype or storage.dtype)


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> TensorRef:
    """Rebuild from an untyped storage, for dtypes that have no storage class (float8, uint16)."""
    made = dtypes.from_torch_name(name_of(dtype))
    return _rebuild_tensor(storage, offset, shape, stride, dtype=made)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Rebuild a subclass as the tensor it wraps; one that holds others keeps its state."""
    made = function(*args)
    if isinstance(made, Inert):
        made.state = state
    return made


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): Items,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
"""What has meaning: plain data, and the functions of `torch.save`."""
