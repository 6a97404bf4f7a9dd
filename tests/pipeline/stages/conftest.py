"""Tiny random models saved by transformers, and whole jobs on them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.jobs.job import Outcome
from ckptd.pipeline import compose, definition
from ckptd.pipeline.definition import Definition
from ckptd.plan.plan import Plan
from ckptd.runner import job

ROWS, WIDTH = 99, 32
SMALL: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": ROWS,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": ROWS,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
GPT: dict[str, Any] = {
    "vocab_size": ROWS,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "bloom": ("BloomForCausalLM", "BloomConfig", GPT | {"hidden_size": WIDTH}),
    "falcon": ("FalconForCausalLM", "FalconConfig", BERT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": SMALL,
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL),
    "llama base": ("LlamaModel", "LlamaConfig", SMALL),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": SMALL | {"model_type": "llama"},
            "vision_config": VISION,
            "image_token_index": 5,
        },
    ),
    "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ | {"decoder_vocab_size": ROWS}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": ROWS,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 64,
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL),
    "qwen2 tied": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | TIED),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"pad_token_id": 1}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 untied": ("T5ForConditionalGeneration", "T5Config", T5 | UNTIED),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
    ),
}
DEFINITION = "pipeline: test\nwatch:\n  - path: /runs/*\nstages:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that transformers wrote; the model has the weights it was written from."""

    family: str
    model: Any
    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the checkpoint."""
        return config_of(self.path)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors of the checkpoint."""
        return weights_of(self.path)

    def modified(
        self,
        path: Path,
        *,
        change: Mapping[str, torch.Tensor] | None = None,
        drop: tuple[str, ...] = (),
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write this checkpoint with other tensors and other keys of config.json to `path`."""
        weights = {name: v for name, v in self.weights.items() if name not in drop}
        weights |= change or {}
        shutil.copytree(self.path, path)
        for stale in path.glob("*.safetensors*"):
            stale.unlink()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(self.config | dict(config or {})))
        return path

    def load(self, path: Path) -> Any:
        """Return the model at `path`; transformers must find every key it wants, and no other."""
        model, info = type(self.model).from_pretrained(path, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not info[kind], f"{kind}: {info[kind]}"
        return model.eval()

    def logits(self, model: Any) -> torch.Tensor:
        """Return what the model says about the old tokens, the same input every time."""
        ids = torch.arange(3, 19)[None]
        given: dict[str, torch.Tensor] = {"input_ids": ids}
        if self.family == "whisper":
            sound = torch.sin(torch.arange(8 * 64, dtype=torch.float32)).reshape(1, 8, 64)
            given = {"input_features": sound, "decoder_input_ids": ids}
        elif model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
        with torch.no_grad():
            made = model(**given)
        found = made.logits[..., :ROWS] if hasattr(made, "logits") else made.last_hidden_state
        assert isinstance(found, torch.Tensor)
        return found


def config_of(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder."""
    value: dict[str, Any] = json.loads((path / "config.json").read_text())
    return value


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def build(family: str) -> Any:
    """Return a random model of the family; every parameter gets values of its own."""
    name, config_name, options = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config_name)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05 + 0.01)
    return model.eval()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """The saved tiny model of a family; one folder for the session, which no test writes to."""

    @functools.cache
    def saved(name: str) -> Saved:
        path = tmp_path_factory.mktemp(name.replace(" ", "-")) / "checkpoint-7"
        model = build(name)
        model.save_pretrained(path)  # what is not saved (computed positions) is not random
        return Saved(family=name, model=type(model).from_pretrained(path).eval(), path=path)

    return saved


def defined(stages: str) -> Definition:
    """Return a definition with these stages, written as YAML list items."""
    lines = "".join(f"  {line}\n" for line in stages.strip().splitlines())
    return definition.parse_definition(DEFINITION + lines, "test.yaml")


def planned(source: Path, stages: str) -> Plan:
    """Return the plan from headers alone."""
    return compose.from_headers(checkpoint.open_checkpoint(source), defined(stages).stages)


def work(source: Path, stages: str, out: Path) -> job.Work:
    """Return a job without a push, with its staging folder beside `out`."""
    wanted = defined(stages)
    return job.Work(
        checkpoint_path=source,
        name=source.name,
        run="run",
        layout="auto",
        definition=wanted,
        content_digest=None,
        fingerprint=None,
        pipeline_digest=definition.pipeline_digest(wanted),
        work_path=out.with_name(f"{out.name}.work"),
        output_path=out,
        push=False,
        endpoint=None,
        within=None,
        byte_budget=64 << 20,
        num_threads=2,
    )


def run(source: Path, stages: str, out: Path) -> Outcome:
    """Do a whole job; its failure is raised as itself, not in a group."""
    try:
        return anyio.run(
            functools.partial(job.execute, work(source, stages, out), report=lambda _: None)
        )
    except* errors.CkptdError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
