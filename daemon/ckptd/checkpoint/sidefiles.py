"""Which files beside the weights travel with a published model.

What a user of the model needs travels: tokenizer, generation config, chat template, processor
files, licence, card, custom code (as text: nothing here ever imports it). What only the trainer
needs stays: optimizer, scheduler, random states, training arguments, logs; those hold paths, names
and keys of whoever trained. Text and YAML travel by known names alone, for trainers write both. A
file of neither kind stays too and is named in the report, so that nothing is left behind unseen.
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
    # what a run was started with
    "training_args.*",
    "train_args.*",
    "training_config.*",
    "train_config.*",
    "trainer_config.*",
    "llamaboard_config.*",
    "axolotl*.y*ml",
    "args.json",
    "args.y*ml",
    "sft_args.json",
    "additional_config.json",
    "accelerate*.y*ml",
    "default_config.y*ml",
    "ds_config*.json",
    "ds_z[0-9]*.json",
    "deepspeed*.json",
    "zero[0-9]*.json",
    "fsdp*.json",
    "hparams.*",
    "hydra.y*ml",
    "overrides.y*ml",
    "launch*.json",
    "cmd*.json",
    "*.sh",
    # how it went
    "*.log",
    "*log.txt",
    "*logs.txt",
    "*_log_*.txt",
    "logs-rank*.txt",
    "std*.txt",
    "*log.jsonl",
    "logging.jsonl",
    "log_history.json",
    "*metrics*.json",
    "*metrics*.csv",
    "*_results.json",
    "*_loss.json",
    "*predictions.json",
    "running_states.json",
    "run_info.json",
    "run_config.*",
    "wandb-*",
    "swanlab*",
    "mlflow*",
    "git-info*",
    "git_*.txt",
    "*.patch",
    "*.diff",
    # what must not be seen
    "*.env",
    "*secret*",
    "*credential*",
    "*service_account*",
    "*api_key*",
    "*apikey*",
    "*access_token*",
    "*auth_token*",
    "hf_token*",
    "token.json",
    "token.txt",
    "kaggle.json",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
)
_TRAINER_FOLDERS = (
    "checkpoint-*",
    "global_step*",
    "runs",
    "logs",
    "log",
    "wandb",
    "swanlog",
    "swanlab",
    "mlruns",
    "mlflow",
    "lightning_logs",
    "tb_logs",
    "tensorboard*",
    "trackio",
    "outputs",
    "debug",
    "samples",
    "images",
    "unsloth_compiled_cache",
    "_unsloth*",
    "last_run_prepared",
    "scheduler_states",
    "lr_scheduler",
    "optimizer_*",
    "optimizer",
    "pytorch_model_fsdp_*",
    "recipe_state",
    "training_state",
    "optim",
    "dataloader",
    "rng",
    "critic",
    "trainer",
    "context",
    "secrets",
    "__pycache__",
)
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.bin",
    "*.bin.index*.json",
    "*.pt",
    "*.pth",
    "*.pth.tar",
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
    "*.md",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.vocab",
    "*.bpe",
    "*.py",
    "*.spm",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "README*",
    "*vocab*.txt",
    "merges*.txt",
    "*bpe*.txt",
    "dict*.txt",
    "tokens.txt",
    "*labels*.txt",
    "classes.txt",
    "requirements.txt",
    "recipe.yaml",
    "model_config.yaml",
    "hyperparams.yaml",
)
"""`recipe.yaml` is llm-compressor's, `model_config.yaml` NeMo's, `hyperparams.yaml` speechbrain's."""
_TOKENIZER = re.compile(r"^(tokenizer|vocab|special_tokens|added_tokens|merges)")
"""Never the trainer's, whatever else stands in the name."""
_MAX_DEPTH = 3


def fate(relpath: str) -> Fate:
    """Return what becomes of the file at `relpath` (POSIX, relative to the checkpoint)."""
    parts = PurePosixPath(relpath).parts
    name = parts[-1]
    if any(part.startswith(".") for part in parts) or not relpath.isprintable():
        return Fate.UNKNOWN  # bytes that are no text, control characters: no name for a repo
    if any(_matches(part, _TRAINER_FOLDERS) for part in parts[:-1]):
        return Fate.TRAINER_STATE
    if len(parts) > _MAX_DEPTH:
        return Fate.UNKNOWN
    if _matches(name.lower(), _TRAINER_STATE) and not _TOKENIZER.match(name):
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
