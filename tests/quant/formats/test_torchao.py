"""torchao: every class that it can save, against the values of its own `dequantize()`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.quant.formula import Arith
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
CASES = (
    "torchao_integers",
    "torchao_float8",
    "torchao_blackwell",
    "torchao_int4",
    "torchao_sharded",
    "torchao_colon",
)
TWICE = "float_zero.weight"
"""The one weight that torchao rounds twice: its zero points are not whole numbers."""

Tensors = dict[str, torch.Tensor]
Index = dict[str, Any]


@pytest.mark.parametrize("case", CASES)
def test_library_arithmetic_is_bit_equal(case: str) -> None:
    """In the library's order of roundings every weight has the library's bits."""
    decoding.assert_bit_equal(decoding.decoded(DATA / case), decoding.reference(DATA / case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [1, 5])
def test_values_do_not_depend_on_how_rows_are_divided(case: str, step: int) -> None:
    """A weight decoded some granules at a time is the weight decoded at once."""
    for arith in Arith:
        whole = decoding.decoded(DATA / case, arith=arith)
        decoding.assert_bit_equal(decoding.decoded(DATA / case, arith=arith, step=step), whole)


@pytest.mark.parametrize("case", CASES)
def test_float32_arithmetic_is_the_same(case: str) -> None:
    """In float32 a weight has the library's bits too, or is within 1 % where it rounds twice."""
    found = decoding.decoded(DATA / case, arith=Arith.FLOAT32)
    expected = decoding.reference(DATA / case)
    if TWICE in expected:
        exact = expected.pop(TWICE).double()
        assert (found.pop(TWICE).double() - exact).norm() / exact.norm() <= 1e-2
    decoding.assert_bit_equal(found, expected)


def test_modules_that_were_renamed_in_the_files_alone(tmp_path: Path) -> None:
    """transformers saves a vision model so: what ends alike is one tensor, named as in the file."""
    names = {
        "model.language_model.layers.1.": "language_model.model.layers.1.",
        "model.language_model.layers.11.": "language_model.model.layers.11.",
        "model.tower.encoder.layers.1.": "tower.encoder.layers.1.",
        "lm_head.": "lm_head.",
    }
    expected = decoding.reference(DATA / "torchao_integers")
    found = decoding.decoded(_renamed("torchao_integers", tmp_path / "made", names))
    wanted = {to + name: value for to in names.values() for name, value in expected.items()}
    decoding.assert_bit_equal(found, wanted)


def test_modules_whose_endings_are_not_their_own(tmp_path: Path) -> None:
    """Two that end alike under names that say nothing are refused."""
    names = {"a.x.": "b.", "c.x.": "d."}
    made = _renamed("torchao_integers", tmp_path / "made", names)
    with pytest.raises(CheckpointCorrupt, match="an inner tensor is in no file"):
        decoding.find(made)


def test_plain_tensors_get_their_names_back() -> None:
    """What torchao 0.14 stored as `NAME:_data` is called NAME again."""
    _, found = decoding.find(DATA / "torchao_colon")
    assert found.renamed == (("0.bias:_data", "0.bias"), ("1.bias:_data", "1.bias"))


def test_every_stored_tensor_is_accounted_for() -> None:
    """Whatever is not plain belongs to a weight, or is dropped."""
    for case in CASES:
        _, found = decoding.find(DATA / case)
        owned = {name for group in found.groups for name in group.consumed} | {*found.dropped}
        names = {*_read(case)[0]}
        plain = {name for name in names - owned if "._" not in name and ":q" not in name}
        assert names == owned | plain, case


def test_what_a_scheme_says() -> None:
    """A group tells the class, bits and grouping."""
    said = {}
    for case in CASES:
        said |= {one.name: one.scheme for one in decoding.find(DATA / case)[1].groups}
    assert said["row.bfloat16.weight"] == "Int8Tensor, 8-bit, blocks of 1 x 86"
    assert said["intx3.weight"] == "IntxUnpackedToInt8Tensor, 3-bit, blocks of 1 x 32"
    assert said["whole.weight"].endswith("one scale")
    assert said["tiles.weight"] == "Int4TilePackedTo4dTensor, 4-bit, groups of 64"
    tiled = said["nvfp4_tiled.weight"]
    assert tiled == "NVFP4Tensor, E2M1 with E4M3 scales, blocks of 16, tiled"


def test_recognised_without_a_config(tmp_path: Path) -> None:
    """The index in the headers is enough where config.json does not name the method."""
    tensors, index, _ = _read("torchao_float8", "row")
    _write(tmp_path, tensors, index, {})
    expected = decoding.reference(DATA / "torchao_float8")["row.weight"]
    decoding.assert_bit_equal(decoding.decoded(tmp_path), {"row.weight": expected})


def test_each_file_describes_its_own(tmp_path: Path) -> None:
    """Descriptions that are spread over files count together, as their tensors do."""
    weight_map = {}
    for place, case in enumerate(("torchao_float8", "torchao_colon")):
        tensors, index, config = _read(case)
        file_name = f"model-{place + 1:05}-of-00002.safetensors"
        save_file(tensors, tmp_path / file_name, _metadata(index))
        weight_map |= dict.fromkeys(tensors, file_name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = decoding.reference(DATA / "torchao_float8") | decoding.reference(
        DATA / "torchao_colon"
    )
    decoding.assert_bit_equal(decoding.decoded(tmp_path), expected)


def test_scales_of_activations_are_dropped(tmp_path: Path) -> None:
    """What only quantized activations need is no part of the weight."""
    tensors, index, config = _read("torchao_integers", "row.bfloat16")
    index["row.bfloat16.weight"]["_tensor_data_names"].append("act_quant_scale")
    tensors["row.bfloat16._weight_act_quant_scale"] = torch.ones(1)
    _write(tmp_path, tensors, index, config)
    _, found = decoding.find(tmp_path)
    assert found.dropped == ("row.bfloat16._weight_act_quant_scale",)
    assert found.dropped[0] not in found.groups[0].consumed


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("torchao_integers", "row.bfloat16.weight"),
        ("torchao_float8", "row.weight"),
        ("torchao_int4", "rows.weight"),
        ("torchao_blackwell", "nvfp4_rows.weight"),
    ],
)
def test_no_rows(tmp_path: Path, case: str, name: str) -> None:
    """A weight without rows stays one without rows."""
    tensors, index, config = _read(case, name.removesuffix("weight"))
    entry = index[name]
    if "shape" in entry["_data"]:
        entry["_data"]["shape"][0] = 0
    rows_last = case == "torchao_int4"
    for held, tensor in tensors.items():
        if rows_last and not held.endswith("qdata"):
            tensors[held] = tensor[:, :0].contiguous()
        elif tensor.ndim:
            tensors[held] = tensor[:0]
    _write(tmp_path, tensors, index, config)
    assert decoding.decoded(tmp_path)[name].shape[0] == 0


def test_no_experts_are_refused(tmp_path: Path) -> None:
    """A stack without a single expert is refused by name."""
    tensors, index, config = _read("torchao_float8", "experts.")
    del index["experts.down_proj"]
    _write(tmp_path, {name: one[:0] for name, one in tensors.items()}, index, config)
    with pytest.raises(CheckpointUnsupported, match=r"experts\.gate_up_proj"):
        decoding.find(tmp_path)


def _changed(
    field: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Tensors, Index], None]:
    def apply(tensors: Tensors, index: Index) -> None:
        name = next(name for name in tensors if name.endswith(field))
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def _without(field: str) -> Callable[[Tensors, Index], None]:
    def apply(tensors: Tensors, index: Index) -> None:
        del tensors[next(name for name in tensors if name.endswith(field))]

    return apply


def _unlisted(field: str) -> Callable[[Tensors, Index], None]:
    def apply(tensors: Tensors, index: Index) -> None:
        _without(field)(tensors, index)
        next(iter(index.values()))["_tensor_data_names"].remove(field.removeprefix("_weight_"))

    return apply


@pytest.mark.parametrize(
    ("case", "prefix", "change"),
    [
        ("integers", "row.bfloat16", _without("_weight_scale")),
        ("integers", "row.bfloat16", _unlisted("_weight_scale")),
        ("integers", "row.bfloat16", _changed("_weight_scale", lambda x: x[:-1])),
        ("integers", "row.bfloat16", _changed("_weight_scale", lambda x: x.to(torch.int32))),
        ("integers", "row.bfloat16", _changed("_weight_qdata", lambda x: x[:, :-1])),
        ("integers", "row.bfloat16", _changed("_weight_qdata", lambda x: x.to(torch.int16))),
        ("integers", "row.bfloat16", _changed("_weight_qdata", lambda x: x.flatten())),
        ("integers", "intx4", _without("_weight_zero_point")),
        ("integers", "intx4", _unlisted("_weight_zero_point")),
        ("integers", "intx4", _changed("_weight_zero_point", lambda x: x[:, :1])),
        ("float8", "row", _changed("_weight_scale", lambda x: x[:7])),
        ("float8", "row", _changed("_weight_scale", lambda x: x.T)),
        ("float8", "row", _changed("_weight_scale", lambda x: x[:0])),
        ("float8", "block", _changed("_weight_scale", lambda x: x[:1])),
        ("float8", "row", _changed("_weight_qdata", lambda x: x.view(torch.uint8))),
        ("int4", "rows", _changed("_weight_qdata", lambda x: x[:, :-1])),
        ("int4", "rows", _changed("_weight_scale", lambda x: x.T)),
        ("int4", "rows", _changed("_weight_zero_point", lambda x: x[:-1])),
        ("int4", "words", _changed("_weight_qdata", lambda x: x.view(torch.uint8))),
        ("int4", "scaled", _changed("_weight_act_pre_scale", lambda x: x[:-1])),
        ("int4", "tiles", _changed("_weight_qdata", lambda x: x[:1])),
        ("int4", "tiles", _changed("_weight_qdata", lambda x: x[:, :1])),
        ("int4", "tiles", _changed("_weight_qdata", lambda x: x.flatten(2))),
        ("int4", "tiles", _changed("_weight_scale_and_zero", lambda x: x[:-1])),
        ("blackwell", "nvfp4_rows", _changed("_weight_scale", lambda x: x[:, :-1])),
        ("blackwell", "nvfp4_tiled", _changed("_weight_scale", lambda x: x[:-1])),
        ("blackwell", "nvfp4_tiled", _changed("per_tensor_scale", lambda x: x.expand(2))),
        ("blackwell", "nvfp4_rows", _changed("_weight_qdata", lambda x: x[:, :-1])),
        ("blackwell", "mx_float8_e5m2_rows", _changed("_weight_scale", lambda x: x.float())),
        ("blackwell", "mx_float8_e5m2_rows", _changed("_weight_qdata", lambda x: x.float())),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, case: str, prefix: str, change: Callable[[Tensors, Index], None]
) -> None:
    """An inner tensor that is missing or of a wrong shape or dtype is refused with its name."""
    tensors, index, config = _read(f"torchao_{case}", prefix + ".")
    change(tensors, index)
    _write(tmp_path, tensors, index, config)
    with pytest.raises(CheckpointCorrupt) as refused:
        decoding.find(tmp_path)
    assert str(refused.value.tensor).startswith(prefix)


WRONG = [None, [], [1], [1, "x"], [1, -1], [1, 0], [7, 7], {}, "1", 1, [1, 10**40], [True, 86]]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize(
    ("case", "prefix", "key"),
    [
        ("integers", "row.bfloat16", "block_size"),
        ("int4", "rows", "block_size"),
        ("int4", "rows", "shape"),
        ("int4", "tiles", "shape"),
        ("int4", "words", "shape"),
        ("blackwell", "nvfp4_rows", "orig_dtype"),
        ("blackwell", "mx_float8_e5m2_rows", "elem_dtype"),
    ],
)
def test_wrong_attributes_are_refused_by_name(
    tmp_path: Path, case: str, prefix: str, key: str, value: Any
) -> None:
    """Attributes of odd types or sizes are refused with the weight's name, never guessed."""
    tensors, index, config = _read(f"torchao_{case}", prefix + ".")
    index[f"{prefix}.weight"]["_data"][key] = value
    _write(tmp_path, tensors, index, config)
    with pytest.raises(CheckpointRefused, match=prefix):
        decoding.find(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"_type": "Int8Tensor"},
        {"_type": "Int8Tensor", "_data": []},
        {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": "qdata"},
        {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": [1]},
        {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": []},
        {"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["qdata", "elsewhere"]},
    ],
)
def test_descriptions_that_are_none_are_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    """A description must have its parts, and what it lists must be there."""
    tensors, _, config = _read("torchao_integers", "row.bfloat16")
    _write(tmp_path, tensors, {"row.bfloat16.weight": said}, config)
    with pytest.raises(CheckpointCorrupt, match=r"row\.bfloat16\.weight"):
        decoding.find(tmp_path)


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """Two descriptions of one tensor must be the same."""
    tensors, index, config = _read("torchao_float8", "row")
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors", _metadata(index))
    index["row.weight"]["_data"]["block_size"] = [24, 86]
    other = {"model.norm.weight": torch.ones(4)}
    save_file(other, tmp_path / "model-00002-of-00002.safetensors", _metadata(index))
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointCorrupt, match="describe it differently"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("names", ["[", "{}", "[1]", '["elsewhere.weight"]'])
def test_a_wrong_list_of_names_is_refused(tmp_path: Path, names: str) -> None:
    """Every name that the metadata lists must be described."""
    tensors, index, config = _read("torchao_float8", "row")
    metadata = _metadata(index) | {"tensor_names": names}
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointCorrupt):
        decoding.find(tmp_path)


@pytest.mark.parametrize("kind", ["AffineQuantizedTensor", "Int4PreshuffledTensor", "NF4Tensor"])
def test_other_classes_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    """A class that is not decoded is refused, naming class and tensor and listing the others."""
    tensors, index, config = _read("torchao_float8", "row")
    index["row.weight"]["_type"] = kind
    _write(tmp_path, tensors, index, config)
    with pytest.raises(CheckpointUnsupported, match=rf"row\.weight.*{kind}.*Int4Tensor.*{kind}"):
        decoding.find(tmp_path)


def test_lost_metadata_is_refused(tmp_path: Path) -> None:
    """Files that were copied without their metadata cannot be told apart: refused, saying so."""
    tensors, _, config = _read("torchao_float8", "row")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointCorrupt, match="lost their metadata"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("element", ["fp6_e2m3", "fp6_e3m2"])
def test_six_bits_are_refused(tmp_path: Path, element: str) -> None:
    """MX elements of 6 bits are refused by name."""
    tensors, index, config = _read("torchao_blackwell", "mx_float8_e5m2_rows")
    index["mx_float8_e5m2_rows.weight"]["_data"]["elem_dtype"] = element
    _write(tmp_path, tensors, index, config)
    with pytest.raises(CheckpointUnsupported, match=element):
        decoding.find(tmp_path)


def test_scaled_activations_are_refused_for_int8(tmp_path: Path) -> None:
    """An activation scale that the weight would have to take over is not silently lost."""
    tensors, index, config = _read("torchao_integers", "row.bfloat16")
    index["row.bfloat16.weight"]["_tensor_data_names"].append("act_pre_scale")
    tensors["row.bfloat16._weight_act_pre_scale"] = torch.ones(86)
    _write(tmp_path, tensors, index, config)
    with pytest.raises(CheckpointUnsupported, match="act_pre_scale"):
        decoding.find(tmp_path)


def test_codes_of_npus_are_refused(tmp_path: Path) -> None:
    """Words whose zero points are floats come from an NPU, whose order of codes is not known."""
    tensors, index, config = _read("torchao_int4", "words")
    _changed("_weight_zero_point", lambda x: x.to(torch.bfloat16))(tensors, index)
    _write(tmp_path, tensors, index, config)
    with pytest.raises(CheckpointUnsupported, match="NPU"):
        decoding.find(tmp_path)


def _read(case: str, prefix: str = "") -> tuple[Tensors, Index, dict[str, Any]]:
    """Return the tensors and descriptions below `prefix`, and the config of a case."""
    tensors: Tensors = {}
    index: Index = {}
    for file in sorted((DATA / case).glob("model*.safetensors")):
        tensors |= load_file(file)
        with safe_open(file, "pt") as opened:
            said = opened.metadata()
        index |= {name: json.loads(text) for name, text in said.items() if text.startswith("{")}
    config = json.loads((DATA / case / "config.json").read_text())
    return (
        {name: one for name, one in tensors.items() if name.startswith(prefix)},
        {name: one for name, one in index.items() if name.startswith(prefix)},
        config,
    )


def _renamed(case: str, target: Path, names: dict[str, str]) -> Path:
    """Write the weights of a case once for each of `names`: prefixes in metadata and in keys."""
    tensors, index, config = _read(case)
    target.mkdir()
    _write(
        target,
        {to + name: one.clone() for to in names.values() for name, one in tensors.items()},
        {said + name: one for said in names for name, one in index.items()},
        config,
    )
    return target


def _metadata(index: Index) -> dict[str, str]:
    said = {name: json.dumps(one) for name, one in index.items()}
    return said | {"tensor_names": json.dumps([*index]), "format": "pt"}


def _write(folder: Path, tensors: Tensors, index: Index, config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", _metadata(index))
    (folder / "config.json").write_text(json.dumps(config))
