"""The command line as a user has it: in this process with its output caught, or as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd.cli import main

COMMAND = [sys.executable, "-c", "from ckptd.cli.main import main; main()"]
DEFINITION = """\
pipeline: test
stages:
  - tie
  - footprint: {max: 1GB}
  - reshard: {max_shard_size: 5KB}
push:
  repo_id: "acme/{run}"
  git_tag: "step-{step}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one call of `ckptd` left."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The one JSON value on standard output."""
        return json.loads(self.out)


Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep state and settings of this user out of the tests, and the tests out of them."""
    for name in [name for name in os.environ if name.startswith("CKPTD_")]:
        monkeypatch.delenv(name)
    for name in ("STATE_DIRECTORY", "CONFIGURATION_DIRECTORY", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg-state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def state_path(tmp_path: Path) -> Path:
    """The state folder that commands use where none is named."""
    return tmp_path / "xdg-state" / "ckptd"


@pytest.fixture
def ckptd(capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that calls `ckptd` in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = main.call([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code=code, out=out, err=err)

    return call


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of `ckptd` as a process: like a user's, not like the tests' own."""
    without = {"HF_HUB_DISABLE_IMPLICIT_TOKEN"}
    return {name: value for name, value in os.environ.items() if name not in without}


@pytest.fixture
def process(environment: dict[str, str]) -> Call:
    """Return a function that runs `ckptd` as a process of its own to its end."""

    def run(*arguments: object, **variables: str) -> Result:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return Result(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Return a function that starts `ckptd` as a process; it is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def definition(tmp_path: Path) -> Path:
    """A definition file: tie, footprint, reshard, push."""
    path = tmp_path / "test.yaml"
    path.write_text(DEFINITION)
    return path


@pytest.fixture
def silent_definition(tmp_path: Path) -> Path:
    """A definition that pushes nothing."""
    path = tmp_path / "silent.yaml"
    path.write_text(DEFINITION.partition("push:")[0])
    return path


Make = Callable[..., Path]


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Make:
    """Return a function that writes a small Llama as a trainer does."""

    def make(name: str = "checkpoint-20", *, seed: int = 0, run: str = "demo") -> Path:
        folder = tmp_path / "runs" / run / name
        folder.mkdir(parents=True)
        random = np.random.default_rng(seed)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 60,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        }
        (folder / "config.json").write_text(json.dumps(config))
        shapes: dict[str, Sequence[int]] = {
            "model.embed_tokens.weight": (60, 16),
            "model.layers.0.self_attn.q_proj.weight": (16, 16),
            "model.layers.1.self_attn.q_proj.weight": (16, 16),
            "model.norm.weight": (16,),
        }
        arrays = {
            name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
        }
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20}))
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "optimizer.pt").write_bytes(b"state")
        (folder / "strange.xyz").write_bytes(b"?")
        return folder

    return make


@pytest.fixture
def checkpoint(make_checkpoint: Make) -> Path:
    """One checkpoint, `runs/demo/checkpoint-20`."""
    return make_checkpoint()


def lines_until(stream: Any, text: str) -> list[str]:
    """Read lines of a process until one holds `text`."""
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines}")
