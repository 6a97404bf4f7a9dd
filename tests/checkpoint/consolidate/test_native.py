"""A trainer's own names: the model that transformers saves comes out, bit by bit, or a refusal."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter

from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.consolidate import rearrange
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, StoredTensor, TensorSpec
from ckptd.checkpoint.pieces import Assembled
from ckptd.errors import CheckpointUnsupported
from tests.checkpoint.consolidate.conftest import same, value, values
from tests.checkpoint.consolidate.test_dcp import write_ranks
from tests.pipeline.stages.conftest import run, weights_of

Weights = dict[str, torch.Tensor]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, Any] = SMALL | {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = SMALL | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "n_shared_experts": 1,
}  # fmt: skip
TITAN = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "model.layers": "layers", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "self_attn.q_a_proj": "attention.wq_a", "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.q_a_layernorm": "attention.q_norm", "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a", "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm",
    "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
    "mlp.shared_experts.down_proj": "moe.shared_experts.w2",
    "mlp.shared_experts.up_proj": "moe.shared_experts.w3",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias", "mlp.gate.": "moe.router.gate.",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TUNE = {
    "model.embed_tokens": "tok_embeddings", "model.norm.weight": "norm.scale", "lm_head": "output",
    "model.layers": "layers", "self_attn.o_proj": "attn.output_proj", "self_attn": "attn",
    "mlp.gate_proj": "mlp.w1", "mlp.up_proj": "mlp.w3", "mlp.down_proj": "mlp.w2",
    "input_layernorm.weight": "sa_norm.scale", "post_attention_layernorm.weight": "mlp_norm.scale",
}  # fmt: skip
PRIME = {
    "mlp.gate.": "mlp.router.gate.", "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
}  # fmt: skip
_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)_proj\.weight$")
_PARTS = {"gate": "w1", "down": "w2", "up": "w3"}


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows in the order that rotary positions on pairs of neighbours have."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _named(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if theirs in name:
            name = name.replace(theirs, ours)
    return name


def native(
    weights: Weights, table: dict[str, str], *, experts: str = "", rotary: tuple[int, int] = (0, 0)
) -> Weights:
    """Return a model's weights as the trainer has them: renamed, heads interleaved, experts stacked."""
    made: Weights = {}
    stacks: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in weights.items():
        for end, heads in zip(("q_proj.weight", "k_proj.weight"), rotary, strict=True):
            if heads and name.endswith(end):
                tensor = _interleaved(tensor, heads)
        if match := _EXPERT.match(name):
            stacked = experts.format(match[1]) + _PARTS[match[3]]
            stacks.setdefault(stacked, []).append((int(match[2]), tensor))
        else:
            made[_named(name, table)] = tensor
    for name, parts in stacks.items():
        made[name] = torch.stack([tensor for _, tensor in sorted(parts, key=lambda one: one[0])])
    return made


@dataclasses.dataclass
class Case:
    """A model of transformers, and how a trainer writes it."""

    kind: str
    settings: dict[str, Any]
    table: dict[str, str]
    experts: str = ""
    rotary: tuple[int, int] = (0, 0)
    extra: tuple[str, ...] = ()


CASES = {
    "torchtitan llama3": Case("Llama", SMALL, TITAN, rotary=(4, 2), extra=("freqs_cis",)),
    "torchtitan qwen3": Case("Qwen3", SMALL | {"head_dim": 8}, TITAN),
    "torchtitan qwen3 moe": Case("Qwen3Moe", MOE, TITAN, experts="layers.{}.moe.experts."),
    "torchtitan deepseek": Case(
        "DeepseekV3", DEEPSEEK | {"q_lora_rank": 8}, TITAN, experts="layers.{}.moe.experts.",
        extra=("layers.1.moe.tokens_per_expert",),
    ),
    "torchtitan deepseek lite": Case(
        "DeepseekV3", DEEPSEEK | {"q_lora_rank": None}, TITAN, experts="layers.{}.moe.experts."
    ),
    "torchtune llama": Case("Llama", SMALL, TUNE, rotary=(4, 2)),
    "torchtune qwen2": Case("Qwen2", SMALL, TUNE),
    "prime-rl": Case(
        "Qwen3Moe", MOE, PRIME, experts="model.layers.{}.mlp.experts.",
        extra=("model.layers.0.mlp.tokens_per_expert",),
    ),
}  # fmt: skip
Made = tuple[Path, Weights, Weights]


def _made(case: Case, folder: Path) -> Made:
    """Return a run's folder with config.json, the model's weights, and the trainer's."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.kind}Config")(**case.settings)
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder / "saved")
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_bytes((folder / "saved" / "config.json").read_bytes())
    weights = load_file(folder / "saved" / "model.safetensors")
    theirs = native(weights, case.table, experts=case.experts, rotary=case.rotary)
    return folder / "run", weights, theirs | dict.fromkeys(case.extra, torch.ones(4))


def _rows(path: Path, weights: Weights) -> None:
    grids = {name: [3] + [1] * (t.dim() - 1) for name, t in weights.items() if t.dim()}
    write_ranks(path, weights, grids, 3, FileSystemWriter(path))


def _boxes(path: Path, weights: Weights) -> None:
    grids = {name: (2, 3, 1)[: t.dim()] for name, t in weights.items()}
    write_ranks(path, weights, grids, 4, FileSystemWriter(path))


def _titan(path: Path, weights: Weights) -> None:
    state = weights | {
        "optimizer.state.x.exp_avg": torch.ones(5),
        "train_state.step": torch.ones(1),
    }
    dcp.save(state, checkpoint_id=path, no_dist=True)


def _prime(path: Path, weights: Weights) -> None:
    app = {"model": weights, "optimizers": {"x": torch.ones(3)}, "progress": {"step": 3}}
    dcp.save({"app": app}, checkpoint_id=path / "trainer", no_dist=True)


def _wrapped(path: Path, weights: Weights) -> None:
    state = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    dcp.save({"model": state}, checkpoint_id=path, no_dist=True)


def _meta(path: Path, weights: Weights) -> None:
    path.mkdir()
    torch.save(weights, path / "consolidated.00.pth")


WRITERS: dict[str, Callable[[Path, Weights], None]] = {
    "rows": _rows, "boxes": _boxes, "torchtitan": _titan, "prime-rl": _prime, "wrapped": _wrapped,
    "meta": _meta,
}  # fmt: skip


@pytest.mark.parametrize("writer", sorted(WRITERS))
@pytest.mark.parametrize("case", sorted(CASES))
def test_what_transformers_saves_comes_out(case: str, writer: str, tmp_path: Path) -> None:
    """Every architecture of the tables, however its tensors are divided and wrapped."""
    run_path, weights, theirs = _made(CASES[case], tmp_path)
    WRITERS[writer](run_path / "step-3", theirs)
    opened = open_checkpoint(run_path / "step-3")
    assert same(values(opened), weights)
    assert any("names of" in note for note in opened.notes)


@pytest.mark.parametrize("writer", ["rows", "boxes", "meta"])
@pytest.mark.parametrize("case", ["torchtitan llama3", "torchtitan qwen3 moe"])
def test_a_whole_job_publishes_the_model(case: str, writer: str, tmp_path: Path) -> None:
    """Moved rows and experts taken apart go through the stream as all else; cast works, too."""
    run_path, weights, theirs = _made(CASES[case], tmp_path)
    WRITERS[writer](run_path / "step-3", theirs)
    run(run_path / "step-3", "- tie\n- reshard: {max_shard_size: 9KB}", tmp_path / "out")
    assert same(weights_of(tmp_path / "out"), weights)
    run(run_path / "step-3", "- cast: {dtype: bfloat16}", tmp_path / "cast")
    expected = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert same(weights_of(tmp_path / "cast"), expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"hidden_size": 32}, "hidden_size"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """Wrong heads would give a model that loads and speaks nonsense: the key is named."""
    run_path, _, theirs = _made(CASES["torchtitan llama3"], tmp_path)
    _rows(run_path / "step-3", theirs)
    config = json.loads((run_path / "config.json").read_text()) | {"head_dim": 4} | change
    (run_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointUnsupported, match=told):
        open_checkpoint(run_path / "step-3")


def test_experts_are_counted(tmp_path: Path) -> None:
    """A stack of another number of experts than the config's is another model."""
    run_path, _, theirs = _made(CASES["torchtitan qwen3 moe"], tmp_path)
    theirs["layers.0.moe.experts.w1"] = theirs["layers.0.moe.experts.w1"][:2].clone()
    _rows(run_path / "step-3", theirs)
    with pytest.raises(CheckpointUnsupported, match="experts"):
        open_checkpoint(run_path / "step-3")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """Fused projections of newer versions, say: named, not published under a made-up name."""
    run_path, _, theirs = _made(CASES["torchtitan llama3"], tmp_path)
    theirs["layers.0.attention.wqkv.weight"] = torch.ones(4, 4)
    _rows(run_path / "step-3", theirs)
    with pytest.raises(CheckpointUnsupported, match="wqkv"):
        open_checkpoint(run_path / "step-3")


def test_the_base_models_names_are_checked(tmp_path: Path) -> None:
    """`assets` with other weights than those trained is noticed; the right one is fine."""
    run_path, weights, theirs = _made(CASES["torchtitan llama3"], tmp_path)
    _rows(run_path / "step-3", theirs)
    assert same(values(open_checkpoint(run_path / "step-3", assets=tmp_path / "saved")), weights)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "saved" / "model.safetensors")
    with pytest.raises(CheckpointUnsupported, match="base model"):
        open_checkpoint(run_path / "step-3", assets=tmp_path / "saved")


def test_an_unknown_model_keeps_the_trainers_names_with_a_note(tmp_path: Path) -> None:
    """Names of a model type that is in no table stay, and the reader is told."""
    run_path, _, theirs = _made(CASES["torchtitan llama3"], tmp_path)
    config = json.loads((run_path / "config.json").read_text()) | {"model_type": "flux"}
    (run_path / "config.json").write_text(json.dumps(config))
    _rows(run_path / "step-3", {n: t for n, t in theirs.items() if n != "freqs_cis"})
    opened = open_checkpoint(run_path / "step-3")
    assert "layers.0.attention.wq.weight" in opened.tensors
    assert any("own names" in note for note in opened.notes)


def test_heads_cut_anywhere_are_put_together(tmp_path: Path) -> None:
    """Ranks whose rows end within a head, at an odd row even: the same as moving them in memory."""
    whole = torch.arange(24 * 3, dtype=torch.float32).reshape(24, 3)
    path = tmp_path / "x"
    path.write_bytes(whole.numpy().tobytes())
    spec = TensorSpec("wq", Dtype.F32, (24, 3))
    expected = whole.unflatten(0, (3, 4, 2)).transpose(1, 2).flatten(0, 2)
    stored = StoredTensor(spec, Extent(path, 0, whole.nbytes))
    made = rearrange.halves_together(stored, "q", 3, path=path)
    assert torch.equal(value(made), expected)
    for cuts in ((0, 1, 24), (0, 5, 7, 20, 24), (0, 8, 16, 24), tuple(range(25))):
        boxes = tuple(
            rearrange.Box((a, 0), (b - a, 3), Extent(path, a * 12, (b - a) * 12))
            for a, b in itertools.pairwise(cuts)
        )
        cut = Assembled(spec, (24, 3), boxes)
        made = rearrange.halves_together(cut, "q", 3, path=path)
        assert torch.equal(value(made), expected)
    with pytest.raises(CheckpointUnsupported, match="heads"):
        rearrange.halves_together(stored, "q", 5, path=path)
    with pytest.raises(CheckpointUnsupported, match="flat pieces"):
        rearrange.halves_together(Assembled(spec, (72,), ()), "q", 3, path=path)
