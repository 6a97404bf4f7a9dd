"""The stage `verify`: what is published was loaded, found finite, and run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptd import errors
from ckptd.jobs.job import State
from ckptd.plan.draft import Verification
from ckptd.runner import verification
from ckptd.runner.evaluator import DeviceFailed
from tests.models.loading import quantized_files
from tests.runner.conftest import Bench


@pytest.fixture
def llama(tmp_path: Path) -> Bench:
    """A real tiny Llama with a tokenizer-less folder, as a Trainer would leave it."""
    path = tmp_path / "runs" / "checkpoint-3"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    (path / "trainer_state.json").write_text('{"global_step": 3}')
    return Bench(source=path, root=tmp_path)


def spoil(folder: Path, name: str, value: float) -> None:
    """Put a value into a tensor of a checkpoint."""
    path = folder / "model.safetensors"
    state = load_file(path)
    state[name].view(-1)[0] = value
    save_file(state, path, metadata={"format": "pt"})


def test_a_good_model_is_loaded_run_and_compared(llama: Bench) -> None:
    """After a resize the logits are the source's, and the report holds what was generated."""
    outcome = llama.run(
        "- tie\n- resize: {to: 64}\n- reshard: {max_shard_size: 20KB}\n"
        "- verify: {compare: true, tolerance: 1.0e-6, generate: 3}"
    )
    assert outcome.state is State.HELD  # not pushed, as asked
    found = outcome.reports["verify"]
    assert found["logits"]["shape"] == [1, 16, 64]
    assert found["difference"]["largest"] <= 1e-6
    assert len(found["generated"]) == 19
    stages = json.loads((llama.out / "ckptd.json").read_text())["pipeline"]["stages"]
    assert stages[-1]["facts"]["generated"] == found["generated"]


def test_values_that_are_not_finite_fail_the_job(llama: Bench) -> None:
    """The tensor is named; nothing lands under the output's name."""
    spoil(llama.source, "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(errors.CheckFailed, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        llama.run("- verify")
    assert not llama.out.exists()


def test_a_held_push_says_why(llama: Bench) -> None:
    """With hold_push the output is kept and the reason is the verdict."""
    spoil(llama.source, "lm_head.weight", float("inf"))
    outcome = llama.run("- verify: {on_failure: hold_push}")
    assert outcome.state is State.HELD
    assert outcome.reason is not None
    assert "lm_head.weight" in outcome.reason


def test_a_warning_goes_on(llama: Bench) -> None:
    """With warn the job ends as it would have, with the verdict in its report."""
    spoil(llama.source, "lm_head.weight", float("inf"))
    outcome = llama.run("- verify: {on_failure: warn}")
    assert "lm_head.weight" in outcome.reports["verify"]["warnings"][0]


def test_another_model_than_the_source_is_noticed(llama: Bench) -> None:
    """A cast that costs more than the tolerance fails, with both figures."""
    with pytest.raises(errors.CheckFailed, match="tolerance"):
        llama.run("- cast: {dtype: bfloat16}\n- verify: {compare: true, tolerance: 1.0e-9}")


def test_missing_tensors_are_named(llama: Bench) -> None:
    """A checkpoint that lacks a tensor is found out."""
    path = llama.source / "model.safetensors"
    state = load_file(path)
    del state["model.norm.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(errors.CheckFailed, match=r"missing keys: model\.norm\.weight"):
        llama.run("- verify")


def test_an_architecture_that_does_not_run_here_is_loaded_all_the_same(llama: Bench) -> None:
    """Without a native module the tensors are checked, and the report says that nothing ran."""
    path = llama.source / "config.json"
    config = json.loads(path.read_text()) | {
        "architectures": ["StrangeForCausalLM"],
        "model_type": "strange",
    }
    path.write_text(json.dumps(config))
    outcome = llama.run("- verify")
    assert any("StrangeForCausalLM" in text for text in outcome.reports["verify"]["warnings"])


def test_an_architecture_that_only_transformers_runs_is_run_there(tmp_path: Path) -> None:
    """With the extra installed the forward is transformers', and the logits are compared."""
    path = tmp_path / "runs" / "checkpoint-4"
    config = transformers.CohereConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.CohereForCausalLM(config).save_pretrained(path)
    bench = Bench(source=path, root=tmp_path)
    outcome = bench.run("- resize: {to: 64}\n- verify: {compare: true, tolerance: 1.0e-5}")
    assert outcome.reports["verify"]["forward"] == "transformers"
    assert outcome.reports["verify"]["difference"]["largest"] < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("cls", ["LlamaForCausalLM", "CohereForCausalLM"])
def test_a_dequantized_model_is_compared_with_its_quantized_source(
    cls: str, dtype: str, tmp_path: Path
) -> None:
    """Both are decoded alike, to the output's dtype; also where transformers runs the forward."""
    path = tmp_path / "runs" / "checkpoint-5"
    torch.manual_seed(0)
    model_class = getattr(transformers, cls)
    config = model_class.config_class(**quantized_files.SMALL)
    state = model_class(config).to(torch.bfloat16).state_dict()
    state.pop("lm_head.weight" if config.tie_word_embeddings else "", None)
    stored, _ = quantized_files.fp8(state)
    quantized_files.written(path, stored, config, quantized_files.FP8, architectures=[cls])
    bench = Bench(source=path, root=tmp_path)
    outcome = bench.run(
        f"- dequantize: {{dtype: {dtype}}}\n- verify: {{compare: true, tolerance: 1.0e-6}}"
    )
    found = outcome.reports["verify"]
    assert found["difference"]["largest"] <= 1e-6 * found["difference"]["largest_logit"]
    assert found["parameters"] == sum(value.numel() for value in state.values())


def test_a_model_of_sound_is_loaded_and_not_run(tmp_path: Path) -> None:
    """Whoever takes neither tokens nor pictures is checked, and the report says that nothing ran."""
    path = tmp_path / "runs" / "checkpoint-6"
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
        max_source_positions=12, max_target_positions=20, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(path)
    outcome = Bench(source=path, root=tmp_path).run("- verify")
    assert any("input_features" in text for text in outcome.reports["verify"]["warnings"])


def test_a_forward_that_fails_is_a_problem(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not run is not verified, and the error says why."""

    def fails(*_: object) -> None:
        raise ValueError("no such sizes")

    monkeypatch.setattr(verification, "_run", fails)
    with pytest.raises(errors.CheckFailed, match="no such sizes"):
        llama.run("- verify")


def test_a_source_that_does_not_load_is_a_problem(llama: Bench) -> None:
    """What cannot be compared, though it was asked for, is never called verified."""
    wanted = Verification(
        forward=True, tokens=(), compare=True, tolerance=1.0, generate=0, on_failure="warn"
    )
    absent = llama.root / "absent"
    verdict = verification.verify(llama.source, wanted, source_path=absent, device="cpu")
    assert "cannot be compared" in verdict.problems[0]


WANTED = Verification(
    forward=True, tokens=(), compare=False, tolerance=0.0, generate=0, on_failure="fail"
)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is a GPU that is full; the CPU is what it was."""
    run = verification._run
    room = iter([False])

    def full(model, ids):
        if not next(room, True):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return run(model, ids)

    monkeypatch.setattr(verification, "_run", full)


@pytest.mark.usefixtures("small_gpu")
def test_a_full_gpu_says_nothing_about_the_model(llama: Bench) -> None:
    """With device: auto the CPU gives the verdict, and a note says why."""
    wanted = dataclasses.replace(WANTED, on_failure="fail")
    verdict = verification.verify(llama.source, wanted, source_path=llama.source, device="auto")
    assert verdict.problems == ()
    assert "verified on the CPU" in verdict.notes[0]
    assert verdict.facts["logits"]["shape"] == [1, 16, 61]


@pytest.mark.usefixtures("small_gpu")
def test_a_full_gpu_that_was_asked_for_is_tried_later(llama: Bench) -> None:
    """The failure names the device and what it had no room for; no verdict is given."""
    wanted = dataclasses.replace(WANTED, on_failure="hold_push")
    with pytest.raises(DeviceFailed, match=r"Tried to allocate 3\.00 GiB"):
        verification.verify(llama.source, wanted, source_path=llama.source, device="cpu")
