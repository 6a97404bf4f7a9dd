"""Reading pickles without executing them: data, tensors as places of bytes, and inert stand-ins.

A pickle is a program that may call anything it can import. Here nothing is imported: every global
becomes a subclass of `Inert`, a name that does nothing; an instance remembers arguments and state.
Only what a checkpoint is made of has meaning: ordered dicts, sizes, and the functions with which
torch rebuilds tensors from storages. The bytes of storages are not read; a tensor is a `TensorRef`
to them. Source: `torch.save`.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ckptd.checkpoint import dtypes, pickle_machine
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.pickle_machine import PickleError
from ckptd.errors import CheckpointCorrupt

MAX_PICKLE_BYTES = 128 << 20
"""The names and shapes of a trillion parameters on a thousand ranks are below this."""
MAX_GLOBALS = 10_000
"""Names of classes and functions; real files have some tens."""
MAX_NAME = 1000
MAX_AXES = 64
"""Axes of a tensor; torch itself allows as many."""
_LIMIT = 1 << 62

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


_WRAPPER = "torch._utils._rebuild_wrapper_subclass"


class Items(dict[Any, Any]):
    """An ordered dict; the attributes that one is given (a state_dict's versions) are not kept."""


class Inert:
    """What a class or function of the pickle would have made: arguments, state and items.

    Each global of a pickle is a subclass of its own with that `name`; the class itself stands for
    the global. Making an instance remembers the call, and nothing else happens.
    """

    __slots__ = ("_items", "_kwargs", "args", "state")
    name: ClassVar[str] = ""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.state: Any = None
        self._kwargs = kwargs or None  # most have none, and there may be a million of them
        self._items: list[Any] | None = None

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The keyword arguments."""
        return self._kwargs or {}

    @property
    def items(self) -> Sequence[Any]:
        """The elements it was given."""
        return self._items or ()

    def extend(self, values: Iterable[Any]) -> None:
        """Remember more elements."""
        if self._items is None:
            self._items = []
        self._items.extend(values)

    @property
    def of(self) -> str:
        """The name of the class this would be: that of what a wrapper function rebuilds."""
        wrapped = name_of(self.args[0]) if self.name == _WRAPPER and self.args else ""
        return wrapped or self.name

    def __repr__(self) -> str:
        return f"<{self.name} of {len(self.args)} arguments, not executed>"


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of a torch file: its key there, dtype and number of elements."""

    key: str
    dtype: Dtype
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
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


def fields(value: Any) -> dict[str, Any]:
    """Return the attributes that a stand-in (or its state) would have; empty for anything else."""
    state = value.state if isinstance(value, Inert) else value
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    found: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, dict):
            found |= {key: one for key, one in part.items() if isinstance(key, str)}
    return found


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
    with _translated(path):
        return pickle_machine.run(data, _Meanings())


def loads_row(
    data: bytes, count: int, *, path: Path
) -> tuple[list[Any], Mapping[str, StorageRef], int]:
    """Return the values of `count` pickles in a row, the storages they refer to, and their end.

    Raises:
        CheckpointCorrupt: as `loads`.
    """
    meanings = _Meanings()
    values = []
    end = 0
    with _translated(path):
        for _ in range(count):
            value, end = pickle_machine.run_first(data, meanings, end)
            values.append(value)
    return values, meanings.storages, end


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        PickleError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
        OverflowError, MemoryError, struct.error,
    ) as error:  # fmt: skip
        raise CheckpointCorrupt(
            f"its pickle cannot be read: {type(error).__name__}: {error}"[:300],
            path=path,
            hint="the file is damaged, or is not what its name says",
        ) from error


class _Meanings:
    """What globals, calls and storages of a pickle mean: a few known ones, else stand-ins."""

    def __init__(self) -> None:
        self._stand_ins: dict[str, type[Inert]] = {}
        self.storages: dict[str, StorageRef] = {}

    def find(self, module: str, name: str) -> Any:
        """Return the meaning of a global, or a stand-in of its name."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        full = f"{module}.{name}"
        if full not in self._stand_ins:
            if len(self._stand_ins) >= MAX_GLOBALS or len(full) > MAX_NAME:
                raise PickleError(f"more than {MAX_GLOBALS} classes, or one of a very long name")
            self._stand_ins[full] = type("Inert", (Inert,), {"name": full, "__slots__": ()})
        return self._stand_ins[full]

    def persistent(self, pid: Any) -> StorageRef:
        """Return the storage that `("storage", class, key, location, numel)` names."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise PickleError("a reference to something else than a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        name = name_of(kind).rpartition(".")[2]
        if name not in _STORAGES or type(numel) is not int or not 0 <= numel < _LIMIT:
            raise PickleError(f"unknown storage {name!r}")
        if type(key) is not str:
            raise PickleError("a storage without a key")
        if len(pid) > 5 and pid[5] is not None:
            raise PickleError("a storage that is a view of another")
        storage = StorageRef(key, _STORAGES[name], numel)
        self.storages.setdefault(key, storage)
        return storage

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a known function makes, or a stand-in that remembers the call."""
        if isinstance(function, type) and issubclass(function, Inert):
            return function(args, kwargs)
        if isinstance(function, Inert):
            return Inert((function, *args), kwargs)
        if function in _CALLABLE:
            return function(*args)
        raise PickleError(f"a call of a {type(function).__name__}")

    def build(self, made: Any, state: Any) -> None:
        """Keep the state of a stand-in; a dict's is not kept, other values have none."""
        if isinstance(made, Inert):
            made.state = state
        elif not isinstance(made, Items):
            raise PickleError(f"a {type(made).__name__} has no state")

    def extend(self, made: Any, values: list[Any]) -> None:
        """Remember the elements of a stand-in."""
        if not isinstance(made, Inert):
            raise PickleError(f"a {type(made).__name__} has no elements")
        made.extend(values)

    def put(self, made: Any, key: Any, value: Any) -> None:
        """Remember an item of a stand-in."""
        self.extend(made, [(key, value)])


def _size(values: Any = ()) -> tuple[Any, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_AXES:
        raise PickleError("a size that is not one")
    return tuple(values)


def _items(pairs: Any = ()) -> Items:
    """Return an ordered dict; protocols of old give its items as pairs."""
    if not isinstance(pairs, list | tuple) or len(pairs) > MAX_AXES:
        raise PickleError("a dict of something else than pairs")
    found = Items()
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not str:
            raise PickleError("a dict of something else than pairs")
        found[pair[0]] = pair[1]
    return found


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Dtype | None = None
) -> TensorRef:
    shape, stride = _size(shape), _size(stride)
    if not isinstance(storage, StorageRef) or len(shape) != len(stride):
        raise PickleError("a tensor without a storage")
    if not all(type(size) is int and 0 <= size < _LIMIT for size in (offset, *shape, *stride)):
        raise PickleError("a tensor of an impossible shape")
    if math.prod(shape) >= _LIMIT:
        raise PickleError("a tensor of more elements than any file has")
    return TensorRef(storage, offset, shape, stride, dtype or storage.dtype)


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
    if type(args) is not tuple:
        raise PickleError("arguments that are no tuple")
    made = _Meanings().call(function, args, {})
    if isinstance(made, Inert):
        made.state = state
    return made


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _items,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
"""What has meaning: plain data, and the functions of `torch.save`."""
_CALLABLE = tuple(set(_KNOWN.values()))
