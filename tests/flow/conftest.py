"""A daemon in a process of its own, against a Hub on loopback, fed by folders that tests write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd.hub.local.server import Running
from ckptd.jobs.database import Database
from ckptd.jobs.job import Job
from ckptd.jobs.store import Sighting

DEFINITION = """\
pipeline: {name}
watch:
  - path: {runs}/{glob}/checkpoint-*
    settle: {settle}
stages:
{stages}
push:
  repo_id: "ckptd/{{run}}"
  tags: [ckptd]
  git_tag: {tag}
{push}
"""
STAGES = "  - tie\n  - reshard: {max_shard_size: 100KB}\n"


class Deployment:
    """One node: a watched folder, a state folder, a daemon that tests start and kill."""

    def __init__(self, root: Path, hub: Running) -> None:
        self.root = root
        self.hub = hub
        self.runs = root / "runs"
        self.state = root / "state"
        self.definitions = root / "pipelines.d"
        self.log_path = root / "daemon.log"
        self.runs.mkdir()
        self.definitions.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def define(
        self,
        *,
        name: str = "publish",
        glob: str = "*",
        stages: str = STAGES,
        push: str = "",
        settle: str = "300ms",
        tag: str = '"step-{step}"',
    ) -> Path:
        """Write (or rewrite) a definition file."""
        path = self.definitions / f"{name}.yaml"
        text = DEFINITION.format(
            name=name, runs=self.runs, glob=glob, settle=settle, stages=stages, push=push, tag=tag
        )
        temporary = path.with_suffix(".new")
        temporary.write_text(text)
        temporary.rename(path)
        return path

    def start(self, **environment: str) -> None:
        """Start the daemon and wait until it is ready."""
        began = self.log_path.stat().st_size if self.log_path.exists() else 0
        self.launch(**environment)
        self.wait_for(lambda: b"daemon ready" in self.log_path.read_bytes()[began:])

    def launch(self, **environment: str) -> None:
        """Start the daemon."""
        env = {
            **os.environ,
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": self.hub.token,
            "HF_HOME": str(self.root / "hf"),
            "CKPTD_STATE_DIR": str(self.state),
            "CKPTD_PIPELINES_DIR": str(self.definitions),
            "CKPTD_SCAN_INTERVAL": "0.5s",
            "CKPTD_RETRY_BASE": "200ms",
            "CKPTD_NICE": "0",  # the suite waits for it, whatever else the machine does
            "CKPTD_LOG_FORMAT": "json",
            **environment,
        }
        command = [sys.executable, "-c", "from ckptd.cli.main import main; main()", "serve"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL the daemon; its runners die with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM the daemon and return its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def runner_pids(self) -> list[int]:
        """The daemon's runner processes."""
        assert self.process is not None
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def jobs(self) -> Sequence[Job]:
        """Every job, oldest first."""
        with Database(self.state / "jobs.sqlite3", read_only=True) as database:
            return database.list()

    def sightings(self) -> Sequence[Sighting]:
        """What became of every checkpoint that was seen."""
        with Database(self.state / "jobs.sqlite3", read_only=True) as database:
            return database.sightings()

    def wait_for(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Return the first true value of `condition`; fail with the log after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            if self.process is not None and self.process.poll() not in (None, -9):
                break
            time.sleep(0.05)
        log = self.log_path.read_text() if self.log_path.exists() else ""
        raise AssertionError(f"never came true; the daemon's log:\n{log[-6000:]}")

    def wait_for_ended(self, count: int) -> Sequence[Job]:
        """Return the jobs once there are `count` and each has ended."""

        def ended() -> Sequence[Job]:
            jobs = self.jobs()
            return jobs if len(jobs) >= count and all(j.state.terminal for j in jobs) else ()

        return self.wait_for(ended)

    def commits(self, repo_id: str = "ckptd/run") -> list[str]:
        """The descriptions of the commits on main that ckptd made, newest first."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.hub.url, token=self.hub.token)
        return [c.message for c in api.list_repo_commits(repo_id) if "ckptd-push-id" in c.message]

    def is_pinned(self) -> bool:
        """Whether a live pin holds all of a checkpoint, for certain."""
        notes = [*self.runs.glob(".ckptd/live/*/.ckptd-whole.json")]
        notes += self.state.glob("pins/*/live/*/.ckptd-whole.json")
        return any(json.loads(note.read_bytes())["certain"] for note in notes)

    def clean(self) -> bool:
        """Whether no staging folder and no pin is left."""
        left = [*(self.state / "work").glob("*")]
        left += (self.runs / ".ckptd" / "pins").glob("*")
        left += (self.runs / ".ckptd" / "live").glob("*")
        return not left


@pytest.fixture
def node(tmp_path: Path, hub: Running) -> Iterator[Deployment]:
    """A node with nothing running yet; what a test started is killed after it."""
    deployment = Deployment(tmp_path, hub)
    yield deployment
    if deployment.process is not None and deployment.process.poll() is None:
        deployment.kill()


def write_checkpoint(
    folder: Path, step: int, *, seed: int | None = None, rows: int = 500, layers: int = 2
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a tied two-matrix Llama in the order in which the HF Trainer writes; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(step if seed is None else seed)
    embedding = rng.standard_normal((rows, 64)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.copy()}
    for layer in range(layers):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        tensors[name] = rng.standard_normal((64, 64)).astype(np.float32)
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"args")
    (folder / "optimizer.pt").write_bytes(b"state" * 100)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tensors
