"""GGUF: every block type and every change of llama.cpp's converters, against real files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint import checkpoint, ggml
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported
from ckptd.quant import registry, stored
from ckptd.quant.formats import gguf_names
from ckptd.quant.formula import Arith
from ckptd.quant.group import Found
from ckptd.quant.kernels import decode, gguf
from tests.checkpoint.gguf_file import LLAMA, Entry, encode, floats, llama
from tests.quant import decoding

DATA = Path(__file__).parents[2] / "data" / "quant"
MODELS = ("gguf_llama", "gguf_mixtral", "gguf_qwen2moe", "gguf_gemma2", "gguf_gpt2", "gguf_gptoss")
KINDS = {number: kind.name for number, kind in ggml.TYPES.items() if kind.dtype is None}

Tensors = dict[str, torch.Tensor]


def whole(path: Path, *, step: int | None = None) -> Tensors:
    """Return every plain tensor of a model: what is decoded, and what only changes its name."""
    source = checkpoint.open_checkpoint(path)
    found = find(path)
    made = {
        group.name: decoding.weight(group, arith=Arith.LIBRARY, step=step) for group in found.groups
    }
    for old, new in found.renamed:
        tensor = source.tensors[old]
        data = tensor.extent.path.read_bytes()[tensor.extent.offset :][: tensor.extent.nbytes]
        dtype = getattr(torch, str(tensor.spec.dtype.torch_name))
        made[new] = torch.frombuffer(bytearray(data), dtype=dtype).view(tensor.spec.shape)
    return made


def find(path: Path) -> Found:
    source = checkpoint.open_checkpoint(path)
    seen = stored.of_checkpoint(source)
    chosen = registry.choose(seen)
    assert chosen is not None
    assert chosen.name == "GGUF"
    found = chosen.find(seen)
    used = {name for group in found.groups for name in group.consumed}
    assert used | set(found.dropped) | {old for old, _ in found.renamed} == set(source.tensors)
    return found


def write(path: Path, entries: list[Entry], **metadata: Any) -> Path:
    path.write_bytes(encode({**LLAMA, **metadata}, entries))
    return path


def halves(name: str, values: torch.Tensor) -> Entry:
    raw = values.half().contiguous().view(torch.uint8).numpy().tobytes()
    return Entry(name, tuple(values.shape), 1, raw)


@pytest.mark.parametrize("case", MODELS)
def test_a_converted_model_comes_back(case: str) -> None:
    """Names, order of rows, orientation, experts and norms are again those of the original."""
    decoding.assert_bit_equal(whole(DATA / case), decoding.reference(DATA / case))


def test_every_type_is_bit_equal() -> None:
    """All block types give the values of gguf-py (Q1_0, Q2_0: of ggml), in both arithmetics."""
    expected = decoding.reference(DATA / "gguf_types")
    for arith in Arith:
        found = decoding.decoded(DATA / "gguf_types", arith=arith)
        decoding.assert_bit_equal(found, expected)
    schemes = {group.scheme.split(",")[0] for group in find(DATA / "gguf_types").groups}
    assert schemes == set(KINDS.values()) - {"Q8_1", "Q8_K"}


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F16])
def test_narrow_results_are_rounded_once(dtype: Dtype) -> None:
    """In float32 arithmetic a narrow result is the float32 value, rounded (bit for bit)."""
    kind = getattr(torch, str(dtype.torch_name))
    found = decoding.decoded(DATA / "gguf_types", arith=Arith.FLOAT32, dtype=dtype)
    expected = decoding.reference(DATA / "gguf_types")
    decoding.assert_bit_equal(found, {name: value.to(kind) for name, value in expected.items()})


@pytest.mark.parametrize("case", ["gguf_llama", "gguf_gpt2", "gguf_types"])
@pytest.mark.parametrize("step", [1, 3])
def test_the_division_of_rows_does_not_matter(case: str, step: int) -> None:
    """Heads, transposed blocks and plain rows give the same in steps of any size."""
    decoding.assert_bit_equal(whole(DATA / case, step=step), whole(DATA / case))


@pytest.mark.parametrize("number", [9, 15])
def test_types_that_only_serve_products_are_read(number: int, tmp_path: Path) -> None:
    """Q8_1 and Q8_K, never seen in files, are their codes times their scale."""
    kind = ggml.TYPES[number]
    codes = torch.arange(kind.elements).sub(128).to(torch.int8)
    head = struct.pack("<e", 0.5) + bytes(2) if number == 9 else struct.pack("<f", 0.5)
    block = head + codes.numpy().tobytes()
    block += bytes(kind.block_bytes - len(block))
    entry = Entry("blk.0.ffn_up.weight", (2, kind.elements), number, block * 2)
    found = decoding.decoded(write(tmp_path / "m.gguf", llama(entry)))
    assert torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], codes.float().mul(0.5).repeat(2, 1)
    )


def test_a_vector_of_blocks_is_decoded(tmp_path: Path) -> None:
    """A quantized bias has one column, in steps of whole blocks."""
    block = struct.pack("<e", 0.25) + bytes(range(32))
    entry = Entry("blk.0.ffn_up.bias", (96,), 8, block * 3)
    path = write(tmp_path / "m.gguf", llama(entry))
    expected = torch.arange(32).mul(0.25).repeat(3)
    for step in (None, 1, 2):
        found = decoding.decoded(path, step=step)
        assert torch.equal(found["model.layers.0.mlp.up_proj.bias"], expected)


def test_plain_tensors_keep_dtype_and_bits(tmp_path: Path) -> None:
    """Halves are renamed or reordered as halves; what was shifted is computed in float32."""
    weight = torch.arange(32 * 32).view(32, 32)
    entries = [halves("token_embd.weight", torch.ones(4, 32))]
    entries += [halves(f"blk.0.attn_{name}.weight", weight) for name in ("q", "v")]
    found = whole(write(tmp_path / "m.gguf", entries))
    heads = weight.view(2, 8, 2, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], heads.half())
    assert torch.equal(found["model.layers.0.self_attn.v_proj.weight"], weight.half())


def test_experts_with_a_tensor_each_are_known(tmp_path: Path) -> None:
    """The first Mixtral files, which did not stack experts, get the same names."""
    entries = [*llama(), floats("blk.0.ffn_gate_inp.weight", 2, 32)]
    entries += [floats(f"blk.0.ffn_{w}.{e}.weight", 64, 32) for w in ("gate", "up") for e in (0, 1)]
    metadata = {"llama.expert_count": 2, "llama.expert_used_count": 2}
    renamed = dict(find(write(tmp_path / "m.gguf", entries, **metadata)).renamed)
    base = "model.layers.0.block_sparse_moe"
    assert renamed["blk.0.ffn_up.1.weight"] == f"{base}.experts.1.w3.weight"
    assert renamed["blk.0.ffn_gate_inp.weight"] == f"{base}.gate.weight"


def test_a_gate_of_one_row_is_a_matrix(tmp_path: Path) -> None:
    """The gate of a shared expert, a vector in early files, has its row again."""
    metadata = {key.replace("llama", "qwen2moe"): value for key, value in LLAMA.items()}
    metadata |= {"general.architecture": "qwen2moe", "qwen2moe.expert_count": 1}
    metadata["qwen2moe.expert_used_count"] = 1
    entries = [
        floats("token_embd.weight", 4, 32),
        floats("blk.0.ffn_gate_exps.weight", 1, 8, 32),
        floats("blk.0.ffn_gate_shexp.weight", 8, 32),
        floats("blk.0.ffn_gate_inp_shexp.weight", 32),
    ]
    found = whole(write(tmp_path / "m.gguf", entries, **metadata))
    assert found["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 32)
    assert found["model.layers.0.mlp.experts.0.gate_proj.weight"].shape == (8, 32)


@pytest.mark.parametrize("step", [1, 2])
def test_woven_experts_do_not_depend_on_how_rows_are_divided(step: int) -> None:
    """Gate and up, whose columns alternate, come out the same however rows are divided."""
    path = DATA / "gguf_gptoss"
    decoding.assert_bit_equal(whole(path, step=step), decoding.reference(path))


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        (["gate"], "ffn_up_exps.weight"),
        (["up"], "ffn_gate_exps.weight"),
        (["gate", "narrow up"], "ffn_up_exps.weight"),
        (["flat gate", "flat up"], "3 dimensions"),
    ],
)
def test_half_of_the_experts_is_refused(tmp_path: Path, entries: list[str], named: str) -> None:
    """A gate without what it is woven with, or with one that does not fit, is refused by name."""
    shapes = {"flat": (64, 32), "narrow": (2, 32, 32)}
    made = [
        floats(f"blk.0.ffn_{what}_exps.weight", *shapes.get(how, (2, 64, 32)))
        for how, _, what in (entry.rpartition(" ") for entry in entries)
    ]
    config = json.loads((DATA / "mxfp4_gptoss" / "config.json").read_text())
    del config["quantization_config"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    metadata = {key.replace("llama", "gpt-oss"): value for key, value in LLAMA.items()}
    path = tmp_path / "m.gguf"
    path.write_bytes(encode(metadata | {"general.architecture": "gpt-oss"}, [*llama()[:1], *made]))
    with pytest.raises(CheckpointCorrupt, match=named):
        find(path)


def test_the_config_of_gpt_oss_is_made_whole() -> None:
    """Its rotary embedding is scaled with exact bounds, and experts and windows are its own."""
    config = checkpoint.open_checkpoint(DATA / "gguf_gptoss").config
    assert config["rope_scaling"] == {
        "truncate": False,
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
    } | {key: value for key, value in config["rope_scaling"].items() if key.startswith("beta")}
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert (config["head_dim"], config["sliding_window"]) == (16, 128)


def test_empty_tensors_are_decoded(tmp_path: Path) -> None:
    """A tensor without rows, or without columns, is an empty weight."""
    entries = [
        Entry("blk.0.ffn_up.weight", (0, 32), 8, b""),
        Entry("blk.0.ffn_down.weight", (3, 0), 8, b""),
    ]
    found = decoding.decoded(write(tmp_path / "m.gguf", llama(*entries)))
    assert found["model.layers.0.mlp.up_proj.weight"].shape == (0, 32)
    assert found["model.layers.0.mlp.down_proj.weight"].shape == (3, 0)


def test_a_tensor_nobody_knows_is_refused(tmp_path: Path) -> None:
    """A tensor that the architecture has no name for would be lost: it is named."""
    path = write(tmp_path / "m.gguf", llama(floats("blk.0.attn_sinks.weight", 8)))
    with pytest.raises(CheckpointUnsupported, match=r"blk\.0\.attn_sinks\.weight"):
        find(path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    """A weight of integers that would have to be reordered is refused by name."""
    whole_numbers = Entry("blk.0.attn_q.weight", (32, 32), 24, bytes(1024))
    path = write(tmp_path / "m.gguf", [whole_numbers, *llama()[:1]])
    with pytest.raises(CheckpointUnsupported, match=r"attn_q\.weight.*no float"):
        find(path)


@pytest.mark.parametrize("heads", [3, 0, [2, 4], "two"])
def test_heads_must_divide_the_rows(tmp_path: Path, heads: Any) -> None:
    """Numbers of heads that do not fit, differ between layers or are no numbers are refused."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    path = write(tmp_path / "m.gguf", llama(), **{"llama.attention.head_count": heads})
    with pytest.raises(CheckpointCorrupt, match=r"heads|head_count"):
        find(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen2"}, "different models.*llama or mistral"),
        ({"model_type": "llama", "hidden_size": 64}, "disagree about hidden_size"),
        ({"model_type": "llama", "num_hidden_layers": "2"}, "disagree about num_hidden_layers"),
        ({"model_type": "llama", "tie_word_embeddings": False}, "not tied"),
        ({}, "different models"),
    ],
)
def test_the_config_of_another_model_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    """A config.json of another type or size, or one that misses an output matrix, is refused."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointCorrupt, match=said):
        find(write(tmp_path / "m.gguf", llama()))


def test_another_architecture_is_named(tmp_path: Path) -> None:
    """An architecture without names is refused, whatever config is given; the known are listed."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    path = write(tmp_path / "m.gguf", llama(), **{"general.architecture": "mamba"})
    with pytest.raises(CheckpointUnsupported, match=r"'mamba' are not decoded.*qwen3moe"):
        find(path)


@pytest.mark.parametrize("number", sorted(set(KINDS) - {40}))
def test_scales_in_blocks_must_be_finite(number: int, tmp_path: Path) -> None:
    """A block whose own scale is infinite or not a number is refused with its tensor's name.

    All bits set are such a scale in every type but NVFP4, which has none.
    """
    kind = ggml.TYPES[number]
    data = bytes(kind.block_bytes) + b"\xff" * kind.block_bytes
    entry = Entry("blk.0.ffn_up.weight", (2, kind.elements), number, data)
    path = write(tmp_path / "m.gguf", llama(entry))
    with pytest.raises(CheckpointCorrupt, match=r"blk\.0\.ffn_up\.weight.*1 others among 2"):
        decoding.decoded(path)


def test_every_type_has_a_kernel() -> None:
    """The reader lists no block type that is not decoded, and each unpacks whole blocks."""
    assert set(gguf.UNPACK) == set(KINDS.values())
    assert decode.KERNELS


def test_names_are_one_to_one() -> None:
    """No two modules of an architecture get the same plain name."""
    for naming in (*gguf_names.NAMINGS.values(), gguf_names.MIXTRAL):
        plain = [*naming.block.values(), *naming.experts.values()]
        assert len(set(plain)) == len(plain)
        assert len(set(naming.top.values())) == len(naming.top)


def test_the_config_that_is_made_scales_as_the_original() -> None:
    """The settings of Llama 3's rotary embedding are found from their factors."""
    config = checkpoint.open_checkpoint(DATA / "gguf_llama").config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert math.isclose(config["rope_theta"], 500000.0)
    assert (config["head_dim"], config["attention_bias"]) == (64, True)
