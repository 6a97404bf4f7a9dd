"""GPTQ: every width, packing and convention of zeros, against GPTQModel's own dequantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.quant.formula import Arith
from tests.quant import copies, decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = (
    "gptq_v1_asym_mixed",
    "gptq_act_order",
    "gptq_v1_3bit",
    "gptq_widths",
    "gptq_v2_widths",
    "gptq_p_widths",
    "gptq_v2_words",
    "gptq_embedding",
    "gptq_gpt2",
)
MIXED = DATA / "gptq_v1_asym_mixed"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arith", Arith)
def test_weights_are_bit_equal(case: str, arith: Arith) -> None:
    """In fp16 a weight has the library's bits, in its order of roundings and in float32."""
    found = decoding.decoded(DATA / case, arith=arith)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 2])
def test_values_do_not_depend_on_how_rows_are_divided(case: str, step: int) -> None:
    """A weight decoded some granules at a time is the weight decoded at once."""
    found = decoding.decoded(DATA / case, step=step)
    decoding.assert_bit_equal(found, decoding.reference(DATA / case))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_of_mixtral_get_their_published_names(model_type: str, tmp_path: Path) -> None:
    """GPTQModel 7 saves them as transformers names them in memory, where nobody looks for them."""
    names = ("gate_proj", "up_proj", "down_proj")
    module = next(iter(decoding.reference(MIXED))).rpartition(".")[0]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in list(tensors.items()):
            for name in names if key.startswith(f"{module}.") else ():
                leaf = key.rpartition(".")[2]
                tensors[f"model.layers.0.mlp.experts.1.{name}.{leaf}"] = tensor.clone()
        tensors["model.layers.0.mlp.gate.weight"] = torch.ones(2, 8)
        tensors["model.layers.1.mlp.gate.weight"] = torch.ones(2, 8)

    path = copies.changed(
        MIXED,
        tmp_path / "made",
        tensors=change,
        config=lambda said: said.update(model_type=model_type),
    )
    found = decoding.find(path)[1]
    experts = {group.name for group in found.groups if ".experts." in group.name}
    if model_type == "mixtral":
        place = "model.layers.0.block_sparse_moe"
        assert experts == {f"{place}.experts.1.{name}.weight" for name in ("w1", "w3", "w2")}
        renamed = {old: new for old, new in found.renamed if "bias" not in old}
        assert renamed == {"model.layers.0.mlp.gate.weight": f"{place}.gate.weight"}
    else:
        assert experts == {f"model.layers.0.mlp.experts.1.{name}.weight" for name in names}
        assert not found.renamed


def test_bfloat16_is_rounded_once() -> None:
    """A result in bfloat16 is the exact product rounded, within 1 ulp of the way over fp16."""
    once = decoding.decoded(MIXED, arith=Arith.FLOAT32, dtype=Dtype.BF16)
    wide = decoding.decoded(MIXED, arith=Arith.FLOAT32, dtype=Dtype.F32)
    for name, expected in decoding.reference(MIXED).items():
        assert torch.equal(once[name], wide[name].bfloat16())
        torch.testing.assert_close(once[name], expected.bfloat16(), rtol=2**-7, atol=0)


def test_partners_may_lie_in_another_file(tmp_path: Path) -> None:
    """Scales and zeros are found in whichever shard they are."""
    copy = copies.changed(
        MIXED, tmp_path / "two", split=lambda name: name.endswith(("qzeros", "scales"))
    )
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(MIXED))


@pytest.mark.parametrize("case", ["gptq_v1_asym_mixed", "gptq_v2_widths"])
def test_groups_without_g_idx_are_in_order(case: str, tmp_path: Path) -> None:
    """A missing g_idx means groups of the config's size, the last of which may be short."""

    def drop(tensors: copies.Tensors) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    copy = copies.changed(DATA / case, tmp_path / "plain", tensors=drop)
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(DATA / case))


def test_a_wrong_group_size_does_not_matter_beside_g_idx(tmp_path: Path) -> None:
    """Where g_idx is there it decides, whatever the config says of groups and bits."""
    wrong = {"group_size": "many", "bits": [4]}
    copy = copies.changed(MIXED, tmp_path / "wrong", quantization=lambda one: one.update(wrong))
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(MIXED))


def test_bits_come_from_shapes(tmp_path: Path) -> None:
    """A config that names other bits than the tensors have does not change the weights."""
    copy = copies.changed(MIXED, tmp_path / "bits", quantization=lambda one: one.update(bits=2))
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(MIXED))


def test_only_quantize_config(tmp_path: Path) -> None:
    """Old folders have no quantization config in config.json: quantize_config.json will do."""
    said: dict[str, Any] = {}

    def move(config: copies.Config) -> None:
        said.update(config.pop("quantization_config"))
        del said["quant_method"], said["method"]

    copy = copies.changed(DATA / "gptq_v2_widths", tmp_path / "old", config=move)
    (copy / "quantize_config.json").write_text(json.dumps(said))
    assert decoding.find(copy)[0].name == "GPTQ"
    decoding.assert_bit_equal(decoding.decoded(copy), decoding.reference(DATA / "gptq_v2_widths"))


def test_embeddings_and_conv1d_are_not_transposed() -> None:
    """What was packed upright gets the shape that the plain module has."""
    shapes = {
        group.name: group.shape
        for case in ("gptq_embedding", "gptq_gpt2")
        for group in decoding.find(DATA / case)[1].groups
    }
    assert shapes == {
        "lm_head.weight": (80, 64),
        "model.embed_tokens.weight": (80, 64),
        "h.0.attn.c_attn.weight": (64, 96),
    }


def test_plain_tensors_and_biases_stay() -> None:
    """Only the partners of codes are consumed: biases and norms are plain."""
    _, found = decoding.find(MIXED)
    assert not found.dropped
    assert {name for group in found.groups for name in group.consumed} == {
        f"a.{module}.{field}"
        for module in ("down", "up")
        for field in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert {group.scheme for group in found.groups} == {
        "4-bit gptq, groups of 32",
        "8-bit gptq, groups of 32",
    }


def test_a_module_without_outputs_is_empty(tmp_path: Path) -> None:
    """No outputs make an empty weight."""

    def empty(tensors: copies.Tensors) -> None:
        for field in ("qweight", "qzeros", "scales"):
            tensors[f"a.up.{field}"] = tensors[f"a.up.{field}"][:, :0].contiguous()

    copy = copies.changed(MIXED, tmp_path / "empty", tensors=empty)
    (group,) = (one for one in decoding.find(copy)[1].groups if one.name == "a.up.weight")
    assert group.shape == (0, 64)


def _pop(name: str) -> Callable[[copies.Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def _cut(name: str, *, rows: int = 0, columns: int = 0) -> Callable[[copies.Tensors], None]:
    def change(tensors: copies.Tensors) -> None:
        height, width = tensors[name].shape
        tensors[name] = tensors[name][: height - rows, : width - columns].contiguous()

    return change


def _cast(name: str, dtype: torch.dtype) -> Callable[[copies.Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (_pop("a.up.qzeros"), "a.up.qweight"),
        (_pop("a.up.scales"), "a.up.qweight"),
        (_pop("a.up.qweight"), "a.up.qweight"),
        (_cut("a.up.qweight", rows=1), "a.up.qzeros"),
        (_cut("a.up.qweight", columns=1), "a.up.scales"),
        (_cut("a.up.qzeros", columns=1), "a.up.qzeros"),
        (_cut("a.up.qzeros", rows=1), "a.up.qzeros"),
        (_cut("a.up.scales", rows=1), "a.up.qzeros"),
        (_cast("a.up.scales", torch.int32), "a.up.scales"),
        (_cast("a.up.qzeros", torch.int64), "a.up.qzeros"),
        (_cast("a.up.qweight", torch.float32), "a.up.qweight"),
        (_cast("a.up.g_idx", torch.float32), "a.up.g_idx"),
        (lambda tensors: tensors.update({"a.up.scales": torch.ones(72)}), "a.up.scales"),
        (lambda tensors: tensors.update({"a.up.g_idx": torch.zeros(0).int()}), "a.up.qzeros"),
    ],
)
def test_partners_that_do_not_fit_are_refused(
    change: Callable[[copies.Tensors], None], tensor: str, tmp_path: Path
) -> None:
    """A partner that is missing, cut or of another dtype is named."""
    copy = copies.changed(MIXED, tmp_path / "bad", tensors=change)
    with pytest.raises(CheckpointCorrupt) as caught:
        decoding.find(copy)
    assert caught.value.tensor == tensor


@pytest.mark.parametrize("size", [128, None, "32", -5, 0, True, -1, 10**30, {"a": 1}])
def test_groups_that_nobody_names_are_refused(size: Any, tmp_path: Path) -> None:
    """Without g_idx a config whose group_size does not make the scales' groups is refused."""
    copy = copies.changed(
        MIXED,
        tmp_path / "bad",
        tensors=_pop("a.down.g_idx"),
        quantization=lambda one: one.update(group_size=size),
    )
    with pytest.raises(CheckpointCorrupt, match="groups"):
        decoding.find(copy)


@pytest.mark.parametrize("value", [6, -1])
def test_a_group_that_is_not_there_is_refused(value: int, tmp_path: Path) -> None:
    """A g_idx that points out of the scales is named when it is read."""

    def point(tensors: copies.Tensors) -> None:
        tensors["a.down.g_idx"][3] = value

    copy = copies.changed(MIXED, tmp_path / "bad", tensors=point)
    with pytest.raises(CheckpointCorrupt) as caught:
        decoding.decoded(copy)
    assert caught.value.tensor == "a.down.g_idx"


@pytest.mark.parametrize(
    "said",
    [
        {"checkpoint_format": "marlin", "format": "marlin"},
        {"checkpoint_format": "bitblas", "format": None},
        {"checkpoint_format": "gptq_v2"},
        {"is_marlin_format": True},
        {"rotation": "hadamard"},
    ],
)
def test_other_layouts_are_refused_by_name(said: copies.Config, tmp_path: Path) -> None:
    """Layouts of a kernel, formats at odds and rotated weights are refused before reading."""
    copy = copies.changed(MIXED, tmp_path / "bad", quantization=lambda one: one.update(said))
    with pytest.raises(CheckpointUnsupported):
        decoding.find(copy)


@pytest.mark.parametrize("value", [None, [], {}, 7, "x", -1])
def test_odd_config_values_never_crash(value: Any, tmp_path: Path) -> None:
    """Whatever a config holds, a checkpoint is decoded right or refused."""
    for number, key in enumerate(("dynamic", "format", "checkpoint_format", "provider", "lm_head")):
        said = {key: value}
        copy = copies.changed(
            MIXED, tmp_path / f"{number}", quantization=lambda one, said=said: one.update(said)
        )
        try:
            found = decoding.decoded(copy)
        except CheckpointRefused:
            continue
        decoding.assert_bit_equal(found, decoding.reference(MIXED))
