"""Side files: what a user of the model needs travels, what only the trainer needs stays."""

from __future__ import annotations

import pytest

from ckptd.checkpoint.sidefiles import Fate, fate

TRAVELS = [
    "scheduler/scheduler_config.json",
    "value_head.safetensors",
    "2_Dense/model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "modeling_custom.py",
    "configuration_custom.py",
    "config.json",
    "adapter_config.json",
    "additional_chat_templates/rag.jinja",
    "1_Pooling/config.json",
]
TRAINER_STATE = [
    "scheduler.bin",
    "scheduler_1.bin",
    "recipe_state.pt",
    "training_state/optimizer_state.safetensors",
    "optim/__0_0.distcp",
    "rng/rng_dp_rank_0.pt",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "scaler.pt",
    "training_args.bin",
    "trainer_state.json",
    "random_states_0.pkl",
    "all_results.json",
    "latest",
    "events.out.tfevents.1700000000.host",
    "zero_to_fp32.py",
    "global_step2/zero_pp_rank_0.pt",
    "runs/x/events.json",
    "checkpoint-2/config.json",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "optimizer_0/__0_0.distcp",
    "wandb/settings.json",
    "__pycache__/x.py",
    "ckptd.json",
]
WEIGHTS = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "model.fp16.safetensors",
    "model.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "consolidated.00.pth",
]
UNKNOWN = [".env", ".git/config.json", "a/b/c/d.json", "data.bin.gz", "x\ny.json", "\udcff.json"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (TRAVELS, Fate.TRAVELS),
        (TRAINER_STATE, Fate.TRAINER_STATE),
        (WEIGHTS, Fate.WEIGHTS),
        (UNKNOWN, Fate.UNKNOWN),
    ],
)
def test_each_known_file_has_its_fate(names: list[str], expected: Fate) -> None:
    """Names that trainers and libraries write go where they belong; others stay behind."""
    assert {name: fate(name) for name in names} == dict.fromkeys(names, expected)
