"""Stage `footprint`: transformers' own count as the judge, and limits that hold before any work."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ckptd import errors
from ckptd.jobs.job import State
from ckptd.pipeline import devices, kv_cache
from tests.pipeline.stages.conftest import FAMILIES, SMALL, planned, run

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def facts(plan):
    (report,) = (report for report in plan.reports if report.stage == "footprint")
    return report.facts


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_parameter_bytes_are_those_that_transformers_counts(name, family) -> None:
    """Tied weights count once; what is saved and no parameter is the buffers' part."""
    saved = family(name)
    found = facts(planned(saved.path, "- tie\n- footprint"))
    expected = saved.model.get_memory_footprint(return_buffers=False)
    buffers = {key for key, _ in saved.model.named_buffers()}
    on_disk = sum(v.nbytes for key, v in saved.weights.items() if key in buffers)
    # Positions that are computed are parameters in memory, and are not saved.
    computed = sum(
        v.nbytes
        for key, v in saved.model.named_parameters()
        if name == "marian" and "embed_positions" in key
    )
    assert found["parameter_bytes"] == expected + on_disk - computed
    assert sum(found["by_dtype"].values()) == found["parameter_bytes"]
    assert found["buffers_estimated"] is True


def test_an_equal_copy_counts_until_it_is_known_to_be_one(family, tmp_path) -> None:
    """From headers the limit allows for a tie that contents may show; afterwards it is exact."""
    saved = family("llama")
    twice = saved.modified(tmp_path / "twice", change={HEAD: saved.weights[EMBEDDING].clone()})
    tied = sum(v.nbytes for v in saved.weights.values()) - saved.weights[HEAD].nbytes + 32
    stages = f"- tie\n- footprint: {{max: {tied}}}"
    outcome = run(twice, stages, tmp_path / "out")
    assert outcome.reports["footprint"]["total_bytes"] == tied
    with pytest.raises(errors.CheckFailed, match="footprint"):
        run(saved.path, stages, tmp_path / "other")  # its head differs: both stay


def test_what_is_undecided_is_counted_as_later_stages_leave_it(family, tmp_path) -> None:
    """A cast between tie and footprint changes the bytes that a tie may still take away."""
    saved = family("llama")
    twice = saved.modified(tmp_path / "twice", change={HEAD: saved.weights[EMBEDDING].clone()})
    tied = sum(v.numel() * 8 for v in saved.weights.values()) - saved.weights[HEAD].numel() * 8
    stages = f"- tie\n- cast: {{dtype: float64}}\n- footprint: {{max: {tied + 32}}}"
    outcome = run(twice, stages, tmp_path / "out")
    assert outcome.reports["footprint"]["parameter_bytes"] == tied


def test_the_limit_is_exact(family) -> None:
    """As many bytes as needed pass, one less fails and says both numbers."""
    path = family("llama").path
    total = facts(planned(path, "- footprint"))["total_bytes"]
    planned(path, f"- footprint: {{max: {total}}}")
    with pytest.raises(errors.CheckFailed, match=f"{total:,} bytes.*{total - 1:,} bytes") as caught:
        planned(path, f"- footprint: {{max: {total - 1}}}")
    assert caught.value.exit_code == 5


def test_a_limit_fails_before_a_tensor_byte_is_read(family, tmp_path) -> None:
    """With nothing but a hole behind the header, the job fails by the limit and leaves nothing."""
    saved = family("llama")
    source = saved.modified(tmp_path / "source")
    weights = source / "model.safetensors"
    raw = weights.read_bytes()
    with weights.open("r+b") as file:
        file.truncate(8 + int.from_bytes(raw[:8], "little"))
        file.truncate(len(raw))
    with pytest.raises(errors.CheckFailed, match="max allows"):
        run(source, "- tie\n- resize: {to: 4000}\n- footprint: {max: 100KB}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_the_footprint_is_that_of_what_is_published(family) -> None:
    """A cast before it halves it, a resize before it adds its rows."""
    path = family("llama").path
    before = facts(planned(path, "- footprint"))["parameter_bytes"]
    half = facts(planned(path, "- cast: {dtype: bfloat16}\n- footprint"))["parameter_bytes"]
    more = facts(planned(path, "- resize: {to: 199}\n- footprint"))["parameter_bytes"]
    assert half * 2 == before
    assert more - before == 2 * 100 * 32 * 4


def test_over_the_limit_may_be_a_warning(family, tmp_path) -> None:
    """`on_exceed: warn` makes the model, and the report holds the sentence."""
    outcome = run(
        family("llama").path, "- footprint: {max: 1KB, on_exceed: warn}", tmp_path / "out"
    )
    assert "max allows" in outcome.reports["footprint"]["warnings"][0]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_over_the_limit_may_hold_the_push(family, tmp_path) -> None:
    """`on_exceed: hold_push` makes the model and says why it is not published."""
    outcome = run(
        family("llama").path, "- footprint: {max: 1KB, on_exceed: hold_push}", tmp_path / "out"
    )
    assert outcome.state is State.HELD
    assert outcome.reason is not None
    assert outcome.reason.startswith("footprint: needs")


def test_a_device_is_a_limit_with_headroom(family, monkeypatch) -> None:
    """The memory of the device, less the share that must stay free, is what the model may take."""
    path = family("llama").path
    total = facts(planned(path, "- footprint"))["total_bytes"]
    assert facts(planned(path, "- footprint: {device: cpu}"))["limits"]["cpu"] > total
    monkeypatch.setattr(devices, "memory_bytes", {"cuda:1": 2 * total}.get)
    planned(path, "- footprint: {device: 'cuda:1', headroom: 50%}")
    with pytest.raises(errors.CheckFailed, match="cuda:1 allows"):
        planned(path, "- footprint: {device: 'cuda:1', headroom: 0.51}")


def test_a_device_that_is_not_there_is_refused(family) -> None:
    """A node without that GPU cannot say what fits on it."""
    with pytest.raises(errors.StageRefused, match="cuda:97"):
        planned(family("llama").path, "- footprint: {device: 'cuda:97'}")


CACHED = ["bloom", "falcon", "gemma2", "gpt2", "gpt_neox", "gptj", "llama", "llava", "mixtral"]


@pytest.mark.parametrize("name", [*CACHED, "opt", "phi3", "qwen2 tied"])
def test_the_cache_is_as_large_as_transformers_makes_it(name, family) -> None:
    """Keys and values of a real forward pass, byte for byte."""
    saved = family(name)
    with torch.no_grad():
        made = saved.model(input_ids=torch.arange(24).reshape(2, 12), use_cache=True)
    cache: DynamicCache = made.past_key_values
    expected = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = facts(planned(saved.path, "- footprint: {context: 12, batch: 2}"))
    assert found["cache_bytes"] == expected
    assert found["total_bytes"] == (
        found["parameter_bytes"] + found["buffer_bytes"] + found["cache_bytes"]
    )


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        # Llama 3 8B: 32 layers, 8 KV heads of 128
        (
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "hidden_size": 4096,
            },
            2 * 32 * 8 * 128 * 1000,
        ),
        # an old config.json without grouped heads says null
        (
            {
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": None,
                "hidden_size": 64,
            },
            2 * 2 * 4 * 16 * 1000,
        ),
        # DeepSeek V3: one latent of 512 and a rotary key of 64 for all heads
        (
            {
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
                "num_key_value_heads": 128,
                "hidden_size": 7168,
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 64,
            },
            61 * 576 * 1000,
        ),
        # two layers with a window of 100, one without, two that use another's cache
        (
            {
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "head_dim": 8,
                "sliding_window": 100,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
                + ["full_attention"] * 2,
            },
            2 * 4 * 8 * (100 + 100 + 1000),
        ),
        # Falcon 7B: one head for all, whatever num_kv_heads says
        (
            {
                "num_hidden_layers": 32,
                "num_attention_heads": 71,
                "num_kv_heads": 71,
                "hidden_size": 4544,
                "multi_query": True,
                "new_decoder_architecture": False,
            },
            2 * 32 * 64 * 1000,
        ),
    ],
)
def test_the_cache_by_hand(config, elements) -> None:
    """Figures worked out from published configurations, for a thousand tokens."""
    assert kv_cache.num_elements(config, context=1000, batch=1) == elements


def test_absurd_layer_counts_cost_nothing() -> None:
    """A hostile config.json is counted, not unrolled; what shares everything keeps nothing."""
    config = {"num_hidden_layers": 2**70, "num_attention_heads": 4, "head_dim": 8}
    assert kv_cache.num_elements(config, context=10, batch=1) == 2**70 * 2 * 4 * 8 * 10
    shared = config | {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 3}
    assert kv_cache.num_elements(shared, context=10, batch=1) == 0


@pytest.mark.parametrize(
    "more",
    [
        {"is_encoder_decoder": True},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"mamba_d_state": 16},
        {"global_head_dim": 64},
        {"num_attention_heads": None},
    ],
)
def test_a_cache_that_nobody_can_tell_is_refused(more, family, tmp_path) -> None:
    """Other kinds of state, or dimensions that are missing: no figure rather than a wrong one."""
    config = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | more
    assert kv_cache.num_elements(config, context=1000, batch=1) is None
    source = family("llama").modified(
        tmp_path / "source", config={"num_key_value_heads": None} | more
    )
    with pytest.raises(errors.StageRefused, match="leave `context` out"):
        planned(source, "- footprint: {context: 1000}")
