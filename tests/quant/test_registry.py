"""Which format a checkpoint is, and refusals of what nobody decodes before a byte is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptd.checkpoint import checkpoint
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import registry, stored, unsupported
from ckptd.quant.group import Format

I8, I16, I32, I64, U8 = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
SIGNS: list[tuple[str, dict[str, torch.dtype]]] = [
    ("AQLM", {"codes": I8, "codebooks": torch.float16, "scales": torch.float16}),
    ("VPTQ", {"indices": I32, "centroids.weight": torch.bfloat16, "perm": I16}),
    ("SpQR", {"dense_weights": I64, "row_offsets": I32, "col_vals": I32, "in_perm": I32}),
    ("HIGGS", {"weight": I16, "scales": torch.float16, "tables": torch.float16, "tables2": U8}),
    ("FP-Quant", {"qweight": U8, "scales": U8, "forward_hadamard_matrix": torch.bfloat16,
                  "backward_hadamard_matrix": torch.bfloat16}),
    ("EETQ", {"weight": I8, "weight_scales": torch.float16}),
    ("SINQ", {"W_q": U8, "meta.scale": torch.float16, "meta.scale2": torch.float16}),
    ("EXL2", {"q_weight": I32, "q_scale": I32, "q_groups": I16, "q_perm": I16}),
    ("EXL3", {"trellis": I16, "suh": torch.float16, "svh": torch.float16}),
    ("QuIP#", {"Qidxs": I16, "SU": torch.float16, "SV": torch.float16}),
    ("QTIP", {"trellis": I16, "SU": torch.float16, "SV": torch.float16}),
    ("Marlin", {"B": I32, "s": torch.float16}),
    ("Marlin", {"B_24": I32, "B_meta": I16, "s": torch.float16}),
    ("SqueezeLLM", {"qweight": I32, "lookup_table": torch.float16}),
]  # fmt: skip
METHODS = [name for one in unsupported.METHODS for name in one.methods]


@pytest.mark.parametrize(("method", "tensors"), SIGNS, ids=[sign[0] for sign in SIGNS])
def test_tensors_give_a_method_away(
    tmp_path: Path, method: str, tensors: dict[str, torch.dtype]
) -> None:
    """Where config.json is silent, tensors that only one method writes name it and themselves."""
    with pytest.raises(CheckpointUnsupported, match=method) as caught:
        _choose(tmp_path, {f"model.layers.0.up.{leaf}": dtype for leaf, dtype in tensors.items()})
    assert f"model.layers.0.up.{next(iter(tensors))}" in str(caught.value)
    assert "gptq" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("method", METHODS)
def test_a_known_method_is_refused_by_its_name(tmp_path: Path, method: str) -> None:
    """config.json names it: refused even if no tensor is known, with all that is supported."""
    with pytest.raises(CheckpointUnsupported, match="not decoded") as caught:
        _choose(tmp_path, {"up.weight": I8}, {"quant_method": method})
    assert repr(method) in str(caught.value)
    assert all(name in str(caught.value) for one in registry.FORMATS for name in one.methods)


def test_a_known_method_shows_its_tensors(tmp_path: Path) -> None:
    """People see of which tensors it is."""
    tensors = {"up.codes": I8, "up.codebooks": torch.float16, "up.scales": torch.float16}
    with pytest.raises(CheckpointUnsupported, match=r"up\.codes, up\.codebooks, up\.scales"):
        _choose(tmp_path, tensors, {"quant_method": "aqlm"})


@pytest.mark.parametrize("method", ["of tomorrow", "", 7, ["gptq"], {"a": 1}, True, "x" * 10_000])
def test_an_unknown_method_is_refused(tmp_path: Path, method: object) -> None:
    """Whatever stands there that no format answers to, in a message of readable length."""
    with pytest.raises(CheckpointUnsupported, match="not decoded") as caught:
        _choose(tmp_path, {"up.weight": I8}, {"quant_method": method})
    assert len(str(caught.value)) < 1500


def test_an_unknown_method_over_plain_tensors_says_so(tmp_path: Path) -> None:
    """A config that was left behind is told from codes."""
    with pytest.raises(CheckpointUnsupported, match=r"tensors are plain.*out of config\.json"):
        _choose(tmp_path, {"up.weight": torch.bfloat16}, {"quant_method": "aqlm"})


@pytest.mark.parametrize("one", registry.FORMATS, ids=lambda one: one.name)
def test_a_format_answers_to_its_methods(tmp_path: Path, one: Format) -> None:
    """config.json decides, whatever the tensors are; no method belongs to two formats."""
    for place, method in enumerate(one.methods):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert _choose(folder, {"up.weight": U8}, {"quant_method": method}) is one
        assert method not in METHODS


def test_a_plain_checkpoint_is_of_no_format(tmp_path: Path) -> None:
    """Names that quantization uses, too, are not enough."""
    tensors = {
        "model.layers.0.up.weight": torch.bfloat16,
        "quantizer.codebooks": torch.float32,
        "quantizer.codes": torch.float32,
        "trellis": I16,
        "up.scales": torch.float32,
        "embeddings.position_ids": I64,
    }
    assert _choose(tmp_path, tensors) is None


def _choose(
    folder: Path, tensors: dict[str, torch.dtype], settings: dict[str, Any] | None = None
) -> Format | None:
    held = {name: torch.zeros(4, 4, dtype=dtype) for name, dtype in tensors.items()}
    save_file(held, folder / "model.safetensors")
    config = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return registry.choose(stored.of_checkpoint(checkpoint.open_checkpoint(folder)))
