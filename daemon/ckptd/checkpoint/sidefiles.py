"""Which files beside the weights travel with a published model.

What a user of the model needs travels: tokenizer, generation config, chat template, processor
files, licence, card, custom code (as text: nothing here ever imports it). What only the trainer
needs stays: optimizer, scheduler, random states, training arguments, logs. A file of neither kind
stays too and is named in the report, so that nothing is left behind unseen.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from pathlib import PurePosixPath


class Fate(enum.Enum):
    """What becomes of a file of the source folder."""

    TRAVELS = "travels"
    TRAINER_STATE = "trainer state"
    WEIGHTS = "weights"
    UNKNOWN = "unknown"


_TRAINER_STATE = (
    "optimizer*",
    "optim_world_size_*",
    "extra_state_world_size_*",
    "scheduler.*",
    "scheduler_[0-9]*",
    "rng_state*",
    "random_states*",
    "scaler*",
    "training_args.bin",
    "trainer_state.json",
    "sampler*.bin",
    "dl_state_dict.bin",
    "custom_checkpoint_*.pkl",
    "tokens_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "trainer_log.jsonl",
    "training_loss*.png",
    "events.out.tfevents*",
    "latest",
    "zero_to_fp32.py",
    "zero_to_torch.py",
    "recipe_state.pt",
    "train_state.pt",
    "data.pt",
    "dlrover_latest.txt",
    "step_scheduler.pt",
    "losses.json",
    "fsdp_config.json",
    "training_info.json",
    "ckptd.json",
)
_TRAINER_FOLDERS = (
    "checkpoint-*",
    "global_step*",
    "runs",
    "logs",
    "wandb",
    "optimizer_*",
    "optimizer",
    "pytorch_model_fsdp_*",
    "recipe_state",
    "training_state",
    "optim",
    "dataloader",
    "rng",
    "critic",
    "__pycache__",
)
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.bin",
    "*.bin.index*.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.distcp",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)
_SMALL_WEIGHTS = re.compile(r"^(value_head|\d+_[A-Za-z]+/model)\.safetensors$")
"""Weights beside the model's that its users read by these names: the value head of a reward model,
modules of sentence-transformers."""
_TRAVELS = (
    "*.json",
    "*.txt",
    "*.md",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "*.bpe",
    "*.py",
    "*.yaml",
    "*.yml",
    "*.spm",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_MAX_DEPTH = 3


def fate(relpath: str) -> Fate:
    """Return what becomes of the file at `relpath` (POSIX, relative to the checkpoint)."""
    parts = PurePosixPath(relpath).parts
    name = parts[-1]
    if len(parts) > _MAX_DEPTH or any(part.startswith(".") for part in parts):
        return Fate.UNKNOWN
    if not relpath.isprintable():
        return Fate.UNKNOWN  # bytes that are no text, control characters: no name for a repo
    if any(_matches(part, _TRAINER_FOLDERS) for part in parts[:-1]):
        return Fate.TRAINER_STATE
    if _matches(name, _TRAINER_STATE):
        return Fate.TRAINER_STATE
    if _SMALL_WEIGHTS.match(relpath):
        return Fate.TRAVELS
    if _matches(name, _WEIGHTS):
        return Fate.WEIGHTS
    if _matches(name, _TRAVELS):
        return Fate.TRAVELS
    return Fate.UNKNOWN


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
