"""The index of a sharded checkpoint: written as the library would, only sooner."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ckptd.checkpoint import index

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
"""Quotes, control characters, line ends of every kind and what lies beyond 16 bits included."""


@given(
    weight_map=st.dictionaries(NAMES, NAMES, max_size=8),
    total_size=st.integers(0, 1 << 62),
    total_parameters=st.integers(0, 1 << 62),
)
def test_an_index_is_what_json_writes(
    weight_map: dict[str, str], total_size: int, total_parameters: int
) -> None:
    """The bytes are those of `json.dumps` of the same content, sorted and indented by two."""
    metadata = {"total_size": total_size, "total_parameters": total_parameters}
    content = {"metadata": metadata, "weight_map": weight_map}
    expected = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    found = index.encode(weight_map, total_size=total_size, total_parameters=total_parameters)
    assert found == expected.encode()


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    """A map from tensors to shards comes back as it was, whatever the tensors are called."""
    weight_map = {'a "b"\\\n': "b.safetensors", "ä.\u2028": "a.safetensors", "": "c.safetensors"}
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(index.encode(weight_map, total_size=1, total_parameters=1))
    assert index.read_weight_map(path) == weight_map
