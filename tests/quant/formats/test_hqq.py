"""HQQ: every packing, axis and dtype against the library's values; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.errors import CheckpointCorrupt, CheckpointRefused, CheckpointUnsupported
from ckptd.quant.formula import Arith
from ckptd.quant.kernels import decode
from tests.pipeline.stages.conftest import run, weights_of
from tests.quant import decoding

CASE = Path(__file__).parents[2] / "data" / "quant" / "hqq_all"
LAYER, FUSED = "model.layers.0", "model.layers.1"
Q, K, ONE = (f"{LAYER}.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.one_row"))

Tensors = dict[str, torch.Tensor]


def test_library_arithmetic_is_bit_equal() -> None:
    """In the library's order of roundings every weight has the library's bits."""
    decoding.assert_bit_equal(decoding.decoded(CASE), decoding.reference(CASE))


@pytest.mark.parametrize("arith", list(Arith))
@pytest.mark.parametrize("step", [1, 3, 7, 40])
def test_values_do_not_depend_on_how_rows_are_divided(arith: Arith, step: int) -> None:
    """Rows that end within groups, slabs and rows of codes are those of the whole weight."""
    whole = decoding.decoded(CASE, arith=arith)
    decoding.assert_bit_equal(decoding.decoded(CASE, arith=arith, step=step), whole)


def test_float32_arithmetic_is_close() -> None:
    """In float32 a tensor differs by what one rounding of code less zero costs, below 0.5 %."""
    found = decoding.decoded(CASE, arith=Arith.FLOAT32)
    for name, expected in decoding.reference(CASE).items():
        error = (found[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= 5e-3, name


def test_groups_leave_nothing_but_biases_and_plain_weights() -> None:
    """All settings go with their weight; bias and norms stay."""
    _, found = decoding.find(CASE)
    consumed = {name for group in found.groups for name in group.consumed}
    left = load_file(CASE / "model.safetensors").keys() - consumed - set(found.dropped)
    assert left == {f"{Q}.bias", "model.norm.weight"}


def test_scheme_tells_bits_and_grouping() -> None:
    """People read bits, group size and axis."""
    schemes = {group.name: group.scheme for group in decoding.find(CASE)[1].groups}
    assert schemes[f"{K}.weight"] == "4-bit HQQ, groups of 64 along axis 0"


def test_tensors_alone_tell_the_format(tmp_path: Path) -> None:
    """A config.json without a word of quantization is enough."""
    _write(tmp_path, lambda tensors: None, config={"model_type": "llama"})
    assert decoding.find(tmp_path)[0].name == "hqq"


def test_offloaded_settings_are_one_tensor(tmp_path: Path) -> None:
    """`zero_scale` holds zeros, then scales: the same weight as from two tensors."""

    def offload(tensors: Tensors) -> None:
        both = [tensors.pop(f"{Q}.{name}") for name in ("zero", "scale")]
        tensors[f"{Q}.zero_scale"] = torch.stack(both)

    _write(tmp_path, offload)
    decoding.assert_bit_equal(decoding.decoded(tmp_path), decoding.reference(CASE))


def test_partners_in_different_shards(tmp_path: Path) -> None:
    """Codes, scales and settings may lie in any file."""
    tensors = load_file(CASE / "model.safetensors")
    shards: list[Tensors] = [{}, {}, {}]
    for place, (name, value) in enumerate(sorted(tensors.items())):
        shards[place % 3][name] = value
    weight_map = {}
    for place, shard in enumerate(shards):
        file = f"model-{place + 1:05}-of-00003.safetensors"
        save_file(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((CASE / "config.json").read_text())
    decoding.assert_bit_equal(decoding.decoded(tmp_path), decoding.reference(CASE))


def test_words_that_hold_several_slabs_are_read_once() -> None:
    """A whole weight reads its packed codes once; a few rows read their own slab alone."""
    _, found = decoding.find(CASE)
    for group in found.groups:
        formula = group.formulas[0]
        packed = formula.codes.extent.nbytes  # type: ignore[attr-defined]
        whole = formula.windows(range(formula.rows))
        assert sum(window.nbytes for window in whole[2:]) == packed
        few = formula.windows(range(1))
        assert sum(window.nbytes for window in few[2:]) <= packed


def test_wide_rows_of_codes_are_cut_into_tiles() -> None:
    """A row of codes longer than a tile gives the values that torch's own arithmetic gives."""
    _, found = decoding.find(CASE)
    kept = next(group.formulas[0] for group in found.groups if group.name == f"{K}.weight")
    wide = dataclasses.replace(
        kept,
        codes=dataclasses.replace(kept.codes, rows=4, columns=50_000),  # type: ignore[attr-defined]
        scale=dataclasses.replace(kept.scale, rows=1, columns=50_000),  # type: ignore[attr-defined]
        zero=dataclasses.replace(kept.zero, rows=1, columns=50_000),  # type: ignore[attr-defined]
        height=8,
        columns=1000,
    )
    codes = torch.randint(0, 256, (4, 50_000), dtype=torch.uint8)
    scale, zero = (torch.rand(1, 50_000, dtype=torch.float16) for _ in range(2))
    rows = range(30, 390)
    assert len(wide.windows(rows)) == 3
    out = torch.empty(len(rows), 1000, dtype=torch.float16)
    decode.rows_into(wide, rows, [scale, zero, codes], out)
    unpacked = torch.cat([codes >> 4, codes & 15]).half()
    expected = ((unpacked.float() - zero.float()) * scale.float()).half().view(-1, 1000)
    assert torch.equal(out, expected[30:390])


@pytest.mark.parametrize(
    ("model_type", "module", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_fused_experts_get_their_published_names(
    tmp_path: Path, model_type: str, module: str, names: tuple[str, str, str]
) -> None:
    """Plain experts that were saved as they lie in memory become one weight each, bit for bit."""
    gate_up = torch.randn(3, 8, 6).bfloat16()
    down = torch.randn(3, 6, 4).bfloat16()
    router = torch.randn(3, 6).bfloat16()

    def add(tensors: Tensors) -> None:
        tensors[f"{FUSED}.mlp.experts.gate_up_proj"] = gate_up
        tensors[f"{FUSED}.mlp.experts.down_proj"] = down
        tensors[f"{FUSED}.mlp.gate.weight"] = router

    (tmp_path / "source").mkdir()
    _write(tmp_path / "source", add, config={"model_type": model_type, "dtype": "bfloat16"})
    run(tmp_path / "source", "- dequantize: {arith: library}", tmp_path / "out")
    found = weights_of(tmp_path / "out")
    base = f"{FUSED}.{module}"
    assert torch.equal(found[f"{base}.gate.weight"], router)
    for number in range(3):
        for name, expected in zip(
            names, (gate_up[number, :4], gate_up[number, 4:], down[number]), strict=True
        ):
            assert torch.equal(found[f"{base}.experts.{number}.{name}.weight"], expected)
    assert not any("gate_up_proj" in name for name in found)


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def _set(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def _text(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_drop(f"{Q}.scale"), f"{Q}.scale"),
        (_drop(f"{Q}.zero"), f"{Q}.zero"),
        (_drop(f"{Q}.shape"), f"{Q}.shape"),
        (_drop(f"{Q}.packing"), f"{Q}.packing"),
        (_drop(f"{Q}.axis"), f"{Q}.axis"),
        (_set(f"{Q}.axis", torch.tensor(2)), "0 or 1"),
        (_set(f"{Q}.axis", torch.tensor(0)), "1 x 64"),
        (_set(f"{Q}.axis", torch.tensor([1, 1])), "not one number"),
        (_set(f"{Q}.axis", torch.tensor(1.0, dtype=torch.float16)), "few numbers"),
        (_set(f"{Q}.axis", torch.tensor(float("nan"))), "not a number"),
        (_set(f"{Q}.shape", torch.tensor([96, 64, 1])), "two sizes"),
        (_set(f"{Q}.shape", torch.tensor([-96, 64])), "two sizes"),
        (_set(f"{Q}.shape", torch.tensor([96, 128])), "does not hold the codes"),
        (_set(f"{Q}.shape", torch.tensor([1 << 62, 1 << 62])), "does not hold the codes"),
        (_set(f"{Q}.shape", torch.ones(9, dtype=torch.int64)), "few numbers"),
        (_set(f"{Q}.nbits", torch.tensor(8)), "disagrees with packing"),
        (_set(f"{Q}.group_size", torch.tensor(32)), "groups of 64"),
        (_set(f"{Q}.packing", _text("4bit_u8\xff")), "not decoded"),
        (_set(f"{Q}.packing", torch.ones(7)), "short text"),
        (_set(f"{Q}.packing", _text("8bit_u8")), "disagrees with packing"),
        (_set(f"{Q}.compute_dtype", _text("torch.int8")), "no dtype"),
        (_set(f"{Q}.compute_dtype", _text("__import__('os')")), "no dtype"),
        (_set(f"{Q}.W_q", torch.zeros(47, 64, dtype=torch.uint8)), "does not hold the codes"),
        (_set(f"{Q}.W_q", torch.zeros(48, 64, dtype=torch.int8)), "U8 for 4bit_u8"),
        (_set(f"{Q}.W_q", torch.zeros(48 * 64, dtype=torch.uint8)), "two axes"),
        (_set(f"{Q}.W_q", torch.zeros(0, 64, dtype=torch.uint8)), "two axes"),
        (_set(f"{Q}.scale", torch.ones(95, 1)), "96 x 1"),
        (_set(f"{Q}.scale", torch.ones(96, 1, dtype=torch.int32)), "a float"),
        (_set(f"{Q}.zero", torch.ones(1, 96)), "96 x 1"),
        (_set(f"{Q}.zero_scale", torch.ones(3, 96, 1)), "2 along the first axis"),
        (_set(f"{Q}.view_as_float", torch.zeros(2, dtype=torch.uint8)), "not one number"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[Tensors], None], text: str
) -> None:
    """Each missing or contradicting part is refused by name."""
    _write(tmp_path, change)
    with pytest.raises(CheckpointRefused, match=f"{Q}.*{text}"):
        decoding.find(tmp_path)


@pytest.mark.parametrize("field", ["quant_scale", "quant_zero"])
def test_scales_that_are_quantized_in_turn_are_refused(tmp_path: Path, field: str) -> None:
    """The library cannot save them so; a file that says it did is not guessed at."""
    _write(tmp_path, _set(f"{Q}.{field}", torch.tensor(1, dtype=torch.uint8)))
    with pytest.raises(CheckpointUnsupported, match="quantized in turn"):
        decoding.find(tmp_path)


def test_a_large_setting_is_not_read(tmp_path: Path) -> None:
    """A setting of a megabyte is refused by its header."""
    _write(tmp_path, _set(f"{Q}.packing", torch.zeros(1 << 20, dtype=torch.uint8)))
    with pytest.raises(CheckpointCorrupt, match="short text"):
        decoding.find(tmp_path)


def _write(
    folder: Path, change: Callable[[Tensors], None], config: dict[str, object] | None = None
) -> None:
    tensors = load_file(CASE / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    text = (CASE / "config.json").read_text() if config is None else json.dumps(config)
    (folder / "config.json").write_text(text)
