"""The machine that a pickle is a program for, without what makes it dangerous.

It builds plain data: numbers, text, bytes, tuples, lists, dicts. Whatever would import or call
goes to the caller's `find`, which answers with harmless values. Everything costs by the memory it
takes, so that a few bytes cannot fill it; keys of dicts are text, numbers or
told apart by identity (tuples and others in a `Key`), so that no value is hashed that a hostile
file has folded into itself a thousand times. Source: the pickle protocols 2 to 5 (PEP 307, 3154, 574).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Protocol

MAX_UNITS = 20_000_000
"""What the values may take, in units of at most 32 bytes: 600 MB. A chunk of a distributed
checkpoint takes some 90 of them and half of their memory."""
MAX_STACK = 4_000_000
"""Values on the stack, and those that are remembered: 32 MB, and 128 MB."""
_LOOK_BYTES = 4096
"""Bytes of the program, thus operations at most, between two looks at the stack."""
_TEXT, _TUPLE, _LIST, _DICT, _ITEM, _MADE = 3, 3, 3, 3, 2, 4
"""Units of a value besides those of what it holds."""
MAX_INTEGER_BYTES = 64
_MAX_LINE_BYTES = 4096
_PROTOCOLS = range(2, 6)
_INT = struct.Struct("<i")
_DOUBLE = struct.Struct(">d")
_LARGEST_KEY = 1 << 60


class PickleError(Exception):
    """The program does not hold, or asks for more than is allowed."""


class Key:
    """A key that is neither text nor a number; equal to itself alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Reader(Protocol):
    """What gives meaning to globals, calls and references; none of it may import."""

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a global."""

    def persistent(self, pid: Any) -> Any:
        """Return what a persistent id refers to."""

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what stands for the result of a call."""

    def build(self, made: Any, state: Any) -> None:
        """Give an instance its state."""

    def extend(self, made: Any, values: list[Any]) -> None:
        """Add elements to what is not a list."""

    def put(self, made: Any, key: Any, value: Any) -> None:
        """Add an item to what is not a dict."""


def run(data: bytes, reader: Reader) -> Any:
    """Return the value that the pickle `data` makes.

    Raises:
        PickleError, and the errors of broken data: IndexError, ValueError, struct.error, KeyError.
    """
    return _Machine(data, reader).run()


def run_first(data: bytes, reader: Reader, begin: int) -> tuple[Any, int]:
    """Return the value of the pickle at `begin` of `data`, and where it ends; raises as `run`."""
    machine = _Machine(data, reader, begin)
    return machine.run(), machine.place


class _Machine:
    """One run: a place in the data, a stack of values, marks in it, and a memo."""

    def __init__(self, data: bytes, reader: Reader, begin: int = 0) -> None:
        self._data = data
        self._place = begin
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._height = 0
        self._memo: list[Any] = []
        self._sparse: dict[int, Any] = {}
        self._left = MAX_UNITS
        self._reader = reader
        self._stopped = False

    @property
    def place(self) -> int:
        """Where the next operation would be."""
        return self._place

    def run(self) -> Any:
        table: list[Callable[[], None]] = [self._unknown] * 256
        for code, name in _CODES.items():
            table[code] = getattr(self, name)
        data = self._data
        next_look = _LOOK_BYTES
        while not self._stopped:
            code = data[self._place]
            self._place += 1
            table[code]()
            if self._place > next_look:
                self._look()
                next_look = self._place + _LOOK_BYTES
        return self._stack.pop()

    def _look(self) -> None:
        if self._height + len(self._stack) > MAX_STACK or len(self._memo) > 4 * MAX_STACK:
            raise PickleError("it keeps too many values at once")

    # The data.

    def _take(self, nbytes: int) -> bytes:
        begin = self._place
        self._place += nbytes
        if self._place > len(self._data):
            raise PickleError("it ends early")
        return self._data[begin : self._place]

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self._place, self._place + _MAX_LINE_BYTES)
        if end < 0:
            raise PickleError("a line has no end")
        line = self._data[self._place : end]
        self._place = end + 1
        return line.decode("utf-8")

    def _spend(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise PickleError("it has more objects than any checkpoint's")

    def _push(self, value: Any, cost: int = 1) -> None:
        self._spend(cost)
        self._stack.append(value)

    def _unmark(self) -> list[Any]:
        values, self._stack = self._stack, self._marked.pop()
        self._height -= len(self._stack)
        return values

    # Control.

    def _unknown(self) -> None:
        raise PickleError(f"unknown operation {self._data[self._place - 1]:#04x}")

    def _protocol(self) -> None:
        if self._number(1) not in _PROTOCOLS:
            raise PickleError("unknown protocol")

    def _frame(self) -> None:
        self._take(8)

    def _stop(self) -> None:
        self._stopped = True

    def _mark(self) -> None:
        self._spend(_LIST)
        self._height += len(self._stack)
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._unmark()

    def _duplicate(self) -> None:
        self._push(self._stack[-1])

    def _put_byte(self) -> None:
        self._remember(self._number(1))

    def _put_word(self) -> None:
        self._remember(self._number(4))

    def _memoize(self) -> None:
        self._remember(len(self._memo) + len(self._sparse))

    def _remember(self, place: int) -> None:
        if place == len(self._memo):
            self._memo.append(self._stack[-1])
        elif place < len(self._memo):
            self._memo[place] = self._stack[-1]
        else:
            self._spend(_DICT)
            self._sparse[place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        remembered = self._sparse if place in self._sparse else self._memo
        self._stack.append(remembered[place])

    def _get_byte(self) -> None:
        self._recall(self._number(1))

    def _get_word(self) -> None:
        self._recall(self._number(4))

    # Numbers and text.

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _int(self) -> None:
        self._push(_INT.unpack(self._take(4))[0])

    def _int_byte(self) -> None:
        self._stack.append(self._number(1))

    def _int_short(self) -> None:
        self._push(self._number(2))

    def _long(self) -> None:
        nbytes = self._number(1)
        if nbytes > MAX_INTEGER_BYTES:
            raise PickleError(f"an integer of {nbytes} bytes")
        self._push(int.from_bytes(self._take(nbytes), "little", signed=True), _TEXT)

    def _float(self) -> None:
        self._push(_DOUBLE.unpack(self._take(8))[0])

    def _text(self, raw: bytes) -> None:
        # A character takes up to four bytes in memory where one of the text is beyond Latin.
        self._push(raw.decode("utf-8", "surrogatepass"), _TEXT + len(raw) // 8)

    def _bytes(self, raw: bytes) -> None:
        self._push(raw, _TEXT + len(raw) // 32)

    def _text_byte(self) -> None:
        self._text(self._take(self._number(1)))

    def _text_word(self) -> None:
        self._text(self._take(self._number(4)))

    def _text_long(self) -> None:
        self._text(self._take(self._number(8)))

    def _bytes_byte(self) -> None:
        self._bytes(self._take(self._number(1)))

    def _bytes_word(self) -> None:
        self._bytes(self._take(self._number(4)))

    def _bytes_long(self) -> None:
        self._bytes(self._take(self._number(8)))

    # Containers. Sets are lists: nobody here asks whether something is in one.

    def _empty_list(self) -> None:
        self._push([], _LIST)

    def _empty_dict(self) -> None:
        self._push({}, _DICT)

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple(self) -> None:
        values = tuple(self._unmark())
        self._push(values, _TUPLE + len(values) // 4)

    def _tuple1(self) -> None:
        self._spend(_TUPLE)
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self) -> None:
        self._spend(_TUPLE)
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self) -> None:
        self._spend(_TUPLE)
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self) -> None:
        value = self._stack.pop()
        self._add([value])

    def _appends(self) -> None:
        self._add(self._unmark())

    def _add(self, values: list[Any]) -> None:
        self._spend(1 + len(values) // 4)
        made = self._stack[-1]
        if type(made) is list:
            made.extend(values)
        else:
            self._reader.extend(made, values)

    def _set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._set(self._stack[-1], key, value)

    def _set_items(self) -> None:
        values = self._unmark()
        made = self._stack[-1]
        for place in range(0, len(values), 2):
            self._set(made, values[place], values[place + 1])

    def _set(self, made: Any, key: Any, value: Any) -> None:
        self._spend(_ITEM)
        if isinstance(made, dict):
            made[_as_key(key)] = value
        else:
            self._reader.put(made, key, value)

    # Globals and instances.

    def _global(self) -> None:
        module = self._line()
        self._push(self._reader.find(module, self._line()))

    def _global_of_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("a global without a name")
        self._push(self._reader.find(module, name))

    def _persistent(self) -> None:
        self._push(self._reader.persistent(self._stack.pop()))

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._call(self._stack.pop(), args, {})

    def _new_with_keywords(self) -> None:
        kwargs, args = self._stack.pop(), self._stack.pop()
        if type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
            raise PickleError("keywords that are none")
        self._call(self._stack.pop(), args, kwargs)

    def _call(self, function: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if type(args) is not tuple:
            raise PickleError("arguments that are no tuple")
        self._push(self._reader.call(function, args, kwargs), _MADE + len(args) // 4)

    def _build(self) -> None:
        state = self._stack.pop()
        self._reader.build(self._stack[-1], state)


def _as_key(key: Any) -> Any:
    """Return a key that is hashed in no time: text, a number, or what is hashed by identity."""
    if type(key) is str or (type(key) is int and -_LARGEST_KEY < key < _LARGEST_KEY):
        return key
    hashed: object = type(key).__hash__
    return key if hashed is object.__hash__ else Key(key)


_CODES = {
    0x80: "_protocol", 0x95: "_frame", ord("."): "_stop",
    ord("("): "_mark", ord("0"): "_pop", ord("1"): "_unmark", ord("2"): "_duplicate",
    ord("q"): "_put_byte", ord("r"): "_put_word", 0x94: "_memoize",
    ord("h"): "_get_byte", ord("j"): "_get_word",
    ord("N"): "_none", 0x88: "_true", 0x89: "_false",
    ord("J"): "_int", ord("K"): "_int_byte", ord("M"): "_int_short", 0x8A: "_long",
    ord("G"): "_float",
    ord("X"): "_text_word", 0x8C: "_text_byte", 0x8D: "_text_long",
    ord("U"): "_bytes_byte", ord("T"): "_bytes_word",
    ord("C"): "_bytes_byte", ord("B"): "_bytes_word", 0x8E: "_bytes_long", 0x96: "_bytes_long",
    ord("]"): "_empty_list", ord("}"): "_empty_dict", ord(")"): "_empty_tuple",
    0x8F: "_empty_list", ord("l"): "_tuple", ord("t"): "_tuple", 0x91: "_tuple",
    0x85: "_tuple1", 0x86: "_tuple2", 0x87: "_tuple3",
    ord("a"): "_append", ord("e"): "_appends", 0x90: "_appends",
    ord("s"): "_set_item", ord("u"): "_set_items",
    ord("c"): "_global", 0x93: "_global_of_stack", ord("Q"): "_persistent",
    ord("R"): "_reduce", 0x81: "_reduce", 0x92: "_new_with_keywords", ord("b"): "_build",
}  # fmt: skip
"""The operations of protocols 2 to 5 by their codes; those of older ones are not read."""
