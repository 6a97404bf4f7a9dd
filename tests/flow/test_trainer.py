"""Real Hugging Face Trainer runs with rotation, fed to the daemon while they train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ckptd.jobs.job import State
from tests.flow.conftest import Deployment

TRAINING = """
import sys, time
import torch
from transformers import (
    LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed,
)

class Pace(TrainerCallback):
    # A step of a model this small takes 20 ms: no checkpoint would live for a tenth of a second.
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.3)

for kind in ("tied", "untied"):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=kind == "tied",
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    data = [{"input_ids": x, "labels": x} for x in torch.randint(3, 90, (64, 16))]
    arguments = TrainingArguments(
        output_dir=f"{sys.argv[1]}/{kind}", max_steps=12, save_steps=4, save_total_limit=1,
        per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Pace()]).train()
    model.save_pretrained(f"{sys.argv[1]}/reference-{kind}")
"""


def test_every_checkpoint_of_a_rotating_trainer_is_published(
    node: Deployment, tmp_path: Path
) -> None:
    """save_total_limit=1 deletes checkpoints as they come; each is published, whole and exact."""
    node.define(stages="  - tie\n  - resize: {pad_to_multiple_of: 64}\n  - reshard\n")
    node.start()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINING, str(node.runs)],
        check=True,
        capture_output=True,
    )
    jobs = node.wait_for_ended(6)

    assert [job.state for job in jobs] == [State.PUBLISHED] * 6
    assert sorted((job.spec.run, job.spec.step) for job in jobs) == [
        (run, step) for run in ("tied", "untied") for step in (4, 8, 12)
    ]
    tokens = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(0))
    for kind in ("tied", "untied"):
        path = _download(node, kind, tmp_path)
        published, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        reference = AutoModelForCausalLM.from_pretrained(node.runs / f"reference-{kind}")
        assert published.config.vocab_size == 128
        assert published.config.tie_word_embeddings is (kind == "tied")
        with torch.no_grad():
            ours = published(tokens).logits[..., :90]
            theirs = reference(tokens).logits
        assert torch.equal(ours, theirs)


def _download(node: Deployment, kind: str, tmp_path: Path) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        f"ckptd/{kind}",
        revision="step-12",
        local_dir=tmp_path / f"published-{kind}",
        endpoint=node.hub.url,
        token=node.hub.token,
    )
    return Path(folder)
