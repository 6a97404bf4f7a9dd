"""Pickles: data comes out, nothing is executed, and no file can fill the memory or stop the clock."""

from __future__ import annotations

import collections
import contextlib
import fractions
import os
import pickle
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.checkpoint import inert, pickle_machine
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.inert import Inert, TensorRef
from ckptd.errors import CheckpointCorrupt

HERE = Path("file.pt")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 300), 1 << 300) | st.floats(allow_nan=False)
    | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


def _loads(data: bytes) -> Any:
    return inert.loads(data, path=HERE)


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = (
    b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x06tQ"
)


def _tensor(shape: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"\x80\x02" + call + STORAGE + offset + shape + stride + b"\x89Nt" + b"R."


@given(value=PLAIN, protocol=st.integers(2, 5))
@settings(max_examples=200, deadline=None)
def test_plain_data_comes_out_as_it_went_in(value: Any, protocol: int) -> None:
    """Numbers, text, bytes, lists, tuples, dicts, in every protocol that torch can write."""
    found = _loads(pickle.dumps(value, protocol))
    if protocol == 2 and isinstance(value, bytes):
        return  # protocol 2 spells bytes as a call
    if protocol > 2 or ("b'" not in repr(value) and 'b"' not in repr(value)):
        assert found == value


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self._made = (function, args)

    def __reduce__(self) -> Any:
        return self._made


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, subprocess.call, eval, exec, __import__])
def test_no_call_is_executed(function: Any, protocol: int, tmp_path: Path) -> None:
    """A payload becomes a stand-in that remembers its arguments; the file it would make is absent."""
    made = tmp_path / "made"
    code = (
        f"touch {made}" if function in (os.system, subprocess.call) else f"open({str(made)!r}, 'w')"
    )
    found = _loads(pickle.dumps({"x": _Call(function, code)}, protocol))
    assert isinstance(found["x"], Inert)
    assert found["x"].args == (code,)
    assert found["x"].name.endswith(function.__name__)
    assert not made.exists()


def test_no_module_is_imported() -> None:
    """Even a module that is nowhere is only a name."""
    found = _loads(b"\x80\x02cno.such.module\nThing\n)R}" + _text("a") + b"K\x01sb.")
    assert found.name == "no.such.module.Thing"
    assert inert.fields(found) == {"a": 1}


def test_what_a_stand_in_makes_is_a_stand_in() -> None:
    """Calling the result of a call, giving it state and items, runs nothing either."""
    found = _loads(b"\x80\x02cposix\nsystem\n)R)R(K\x01K\x02e(K\x03K\x04u}b.")
    assert isinstance(found, Inert)
    assert found.items == [1, 2, (3, 4)]


def test_objects_keep_their_fields() -> None:
    """State with slots, keyword arguments, defaultdicts: what a checkpoint's records are."""
    found = _loads(pickle.dumps(fractions.Fraction(1, 3), 2))
    assert found.args == (1, 3)
    items = _loads(pickle.dumps(collections.defaultdict(list, {"a": [1]}), 4)).items
    assert items == [("a", [1])]
    assert inert.fields((None, {"a": 1})) == {"a": 1}
    assert inert.fields(7) == {}


def test_a_tensor_is_a_place() -> None:
    """Storage, offset, shape and strides, read from the call that would rebuild it."""
    found = _loads(_tensor(b"K\x02K\x03\x86", b"K\x03K\x01\x86"))
    assert found == TensorRef(inert.StorageRef("0", Dtype.F32, 6), 0, (2, 3), (3, 1), Dtype.F32)
    assert found.is_contiguous
    assert not _loads(_tensor(b"K\x02K\x03\x86", b"K\x01K\x02\x86")).is_contiguous


@pytest.mark.parametrize(
    "program",
    [
        _tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
        _tensor(b"\x8a\x0a" + b"\xff" * 9 + b"\x00\x85", b"K\x01\x85"),
        _tensor(b"K\x02\x85", b"K\x03K\x01\x86"),
        _tensor(b"K\x02\x85", b"K\x01\x85", offset=b"J\xff\xff\xff\xff"),
        _tensor(b"G" + struct.pack(">d", 2.0) + b"\x85", b"K\x01\x85"),
        _tensor(b"]", b"]")[:-1] + b"}b.",
        _tensor(b"(" + b"K\x01" * 100 + b"t", b"(" + b"K\x01" * 100 + b"t"),
        _tensor(b"(" + b"J\xff\xff\xff\x7f" * 4 + b"t", b"(" + b"K\x01" * 4 + b"t"),
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89NtR.",
        b"\x80\x02ctorch\nSize\nK\x01\x85R.",
        b"\x80\x02" + STORAGE.replace(b"FloatStorage", b"OddStorage") + b".",
        b"\x80\x02" + STORAGE.replace(b"K\x06", b"J\xff\xff\xff\xff") + b".",
        b"\x80\x02" + _text("other") + b"Q.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02K\x01}b.",
        b"\x80\x02h\x07.",
        b"\x80\x02t.",
        b"\x80\x02.",
        b"\x80\x09N.",
        b"\x80\x02cposix\nsystem",
        b"\x80\x02\x82\x01.",
        b"\x80\x02(S'a'\no.",
        b"",
        b"not a pickle",
        b"\x80\x04\x8d" + b"\xff" * 8,
        b"\x80\x02B\xff\xff\xff\xff",
        b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
        b"\x80\x04\x8c\x01a" + b"K\x01\x93.",
        b"\x80\x02cposix\n" + b"a" * 5000 + b"\n.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    ],
)  # fmt: skip
def test_a_program_that_does_not_hold_is_refused(program: bytes) -> None:
    """Absurd shapes, state for tensors, broken references, missing ends: one error, the file named."""
    with pytest.raises(CheckpointCorrupt, match=r"file\.pt"):
        _loads(program)


@given(data=st.binary(max_size=200), at=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_damaged_pickles_only_ever_raise_the_one_error(data: bytes, at: int, byte: int) -> None:
    """Bytes changed, cut or made up: a value or a refusal, never another exception."""
    real = bytearray(_tensor(b"K\x02K\x03\x86", b"K\x03K\x01\x86"))
    real[at % len(real)] = byte
    for program in (bytes(real), bytes(real[: at % len(real)]), b"\x80\x02" + data + b"."):
        with contextlib.suppress(CheckpointCorrupt):
            _loads(program)


def test_a_tuple_folded_into_itself_costs_nothing() -> None:
    """A key that is two of itself sixty times over would be hashed for years: it never is."""
    folded = b"\x80\x02K\x01q\x00" + b"0h\x00h\x00\x86q\x00" * 100
    began = time.monotonic()
    found = _loads(folded + b"}h\x00K\x01s.")
    assert len(found) == 1
    repr(_loads(folded + b"cposix\nsystem\nh\x00R."))
    with pytest.raises(CheckpointCorrupt) as caught:
        _loads(folded + b"Q.")
    assert len(str(caught.value)) < 500
    assert time.monotonic() - began < 5


def test_depth_is_no_matter() -> None:
    """A hundred thousand lists in each other are read, and let go, without a stack."""
    depth = 100_000
    found = _loads(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    assert isinstance(found, list)


HUNGRY = {
    "dicts": b"}", "lists": b"]", "marks": b"(", "texts": b"\x8c\x04abcd", "wide text": b"\x8c\x04\xf0\x9f\x98\x80",
    "tuples": b")\x85", "pairs": b"NN\x86", "remembered": b"N\x94", "numbers": b"J\xff\xff\xff\x0f",
    "nothing": b"N", "real numbers": b"G" + b"\x01" * 8, "long numbers": b"\x8a\x40" + b"\x01" * 64,
    "bytes": b"C\x08abcdefgh", "calls": b"cx\ny\n)R", "again": b"2", "sparse": b"Nr",
    "items": b"}K\x01K\x02s", "elements": b"](NNNNe",
}  # fmt: skip
"""Operations that take memory, each again and again."""


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize("piece", sorted(HUNGRY))
def test_memory_is_bounded_whatever_the_program(
    piece: str, in_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file that wants much is refused before it has it: 40 bytes a unit at most."""
    units, stack = 100_000, 20_000
    monkeypatch.setattr(pickle_machine, "MAX_UNITS", units)
    monkeypatch.setattr(pickle_machine, "MAX_STACK", stack)
    one = HUNGRY[piece]
    pieces = [one + struct.pack("<I", 7 * n + 9) if one == b"Nr" else one for n in range(400_000)]
    if in_list:
        program = (
            b"\x80\x04]("
            + b"e(".join(b"".join(pieces[n : n + 500]) for n in range(0, 400_000, 500))
            + b"e."
        )
    else:
        program = b"\x80\x04N" + b"".join(pieces) + b"."
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointCorrupt):
            _loads(program)
        assert tracemalloc.get_traced_memory()[1] < 40 * units + 64 * stack
    finally:
        tracemalloc.stop()


def test_names_are_counted() -> None:
    """A million globals are not a million classes."""
    names = b"".join(b"ca\nx%d\n0" % number for number in range(20_000))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointCorrupt, match="classes"):
            _loads(b"\x80\x02" + names + b"N.")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_large_pickle_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is looked at first."""
    monkeypatch.setattr(inert, "MAX_PICKLE_BYTES", 10)
    with pytest.raises(CheckpointCorrupt, match="too large"):
        _loads(b"\x80\x02" + b"N" * 20)
