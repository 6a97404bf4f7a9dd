"""Small checkpoints, jobs on them, and failures half-way."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ckptd import errors
from ckptd.jobs import progress
from ckptd.jobs.job import Outcome
from ckptd.pipeline import definition
from ckptd.runner import job

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 16,
    "tie_word_embeddings": False,
}
SIDE_FILES = {
    "tokenizer_config.json": '{"a": 1}',
    "generation_config.json": "{}",
    "chat_template.jinja": "{{ x }}",
    "README.md": "# A model\n",
    "LICENSE": "free",
    "assets/vocab.txt": "deep",
}
TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
NUM_LAYERS = 8
SHARDED = "- tie\n- reshard: {max_shard_size: 4KB}"
"""Ten files of one tensor each."""


def tensors() -> dict[str, np.ndarray]:
    """Return an embedding, a head and a few layers, every value another one."""
    made = {"lm_head.weight": (60, 16), "model.embed_tokens.weight": (60, 16)}
    made |= {f"model.layers.{n}.mlp.up_proj.weight": (50, 16) for n in range(NUM_LAYERS)}
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape, dtype=np.float32) for name, shape in made.items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint as a Trainer leaves it, with everything beside the weights."""
    path = tmp_path / "runs" / "checkpoint-7"
    (path / "assets").mkdir(parents=True)
    save_file(tensors(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name, text in SIDE_FILES.items():
        (path / name).write_text(text)
    for name in TRAINER_FILES:
        (path / name).write_bytes(b"pickled")
    (path / "trainer_state.json").write_text('{"global_step": 7}')
    return path


@dataclass(slots=True, kw_only=True)
class Bench:
    """Runs jobs on one source, in one staging folder, into one output folder."""

    source: Path
    root: Path
    reports: list[progress.Report] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where the finished model goes."""
        return self.root / "out"

    @property
    def staging(self) -> Path:
        """The staging folder, the caller's to remove."""
        return self.root / "work"

    def work(self, stages: str = SHARDED, **changes: Any) -> job.Work:
        """Return the job."""
        lines = "".join(f"  {line}\n" for line in stages.splitlines())
        text = f"pipeline: test\nwatch:\n  - path: /runs/*\nstages:\n{lines}"
        wanted = definition.parse_definition(text, "test.yaml")
        given: dict[str, Any] = {
            "checkpoint_path": self.source,
            "name": self.source.name,
            "run": "run",
            "layout": "auto",
            "definition": wanted,
            "content_digest": None,
            "fingerprint": None,
            "pipeline_digest": definition.pipeline_digest(wanted),
            "work_path": self.staging,
            "output_path": self.out,
            "push": False,
            "endpoint": None,
            "within": None,
            "byte_budget": 16 << 20,
            "num_threads": 1,
        }
        return job.Work(**(given | changes))

    def run(
        self,
        stages: str = SHARDED,
        *,
        report: Callable[[progress.Report], None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Do the job; its failure is raised as itself, not in a group."""
        told = report or self.reports.append
        try:
            return anyio.run(
                functools.partial(job.execute, self.work(stages, **changes), report=told)
            )
        except* (errors.CkptdError, KilledError) as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    def fail_after(self, count: int, stages: str = SHARDED, **changes: Any) -> None:
        """Do the job and break it when `count` files are durable and noted."""
        done = 0

        def report(event: progress.Report) -> None:
            nonlocal done
            done += isinstance(event, progress.ShardFinished)
            if done >= count:
                raise KilledError

        with pytest.raises(KilledError):
            self.run(stages, report=report, **changes)


class KilledError(Exception):
    """A failure of no kind that anybody expects."""


@pytest.fixture
def bench(source: Path, tmp_path: Path) -> Bench:
    """One source, one staging folder, one output folder."""
    return Bench(source=source, root=tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` with its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a folder."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
