"""Kinds of work for a siege: what the trainer saves, what a definition makes of it, where it goes."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio

from ckptd.pipeline import definition
from ckptd.runner import job as runner_job
from tests.flow.conftest import STAGES, Deployment, write_checkpoint

QUANTIZED = Path(__file__).parents[1] / "data" / "quant" / "fp8_block_ragged"
ONE = 0x3F80
"""1.0 in bfloat16; numbers above it are other, finite values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One definition, which watches the runs that begin with its name."""

    name: str
    stages: str = STAGES
    proposes: bool = False
    """Whether it publishes as a pull request."""
    computes: bool = False
    """Whether runners import torch for it."""
    write: Callable[[Path, int], object] | None = None
    """Writes the checkpoint of a step; None for a small Llama."""

    def define(self, node: Deployment) -> None:
        """Write the definition."""
        node.define(
            name=self.name,
            glob=f"{self.name}*",
            stages=self.stages,
            push="  create_pr: true\n" if self.proposes else "",
        )

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint."""
        if self.write is None:
            write_checkpoint(folder, step, rows=300)
        else:
            self.write(folder, step)

    def made_of(self, folder: Path, node: Deployment) -> dict[str, str]:
        """Return name -> sha256 of the weights, git id of config and index, as a job in peace makes."""
        work = runner_job.Work(
            checkpoint_path=folder,
            name=folder.name,
            run=folder.parent.name,
            layout="auto",
            definition=definition.load_definition(node.definitions / f"{self.name}.yaml"),
            content_digest=None,
            fingerprint=None,
            pipeline_digest="",
            work_path=node.root / "expected" / folder.name,
            output_path=None,
            push=False,
            endpoint=None,
            within=None,
            byte_budget=64_000_000,
            num_threads=1,
        )
        anyio.run(functools.partial(runner_job.execute, work, report=lambda _: None))
        made = {}
        for path in (work.work_path / "out").iterdir():
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                made[path.name] = hashlib.sha256(content).hexdigest()
            elif path.name in {"config.json", "model.safetensors.index.json"}:
                blob = b"blob %d\0" % len(content) + content
                made[path.name] = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        shutil.rmtree(work.work_path)
        return made


def write_quantized(folder: Path, step: int) -> None:
    """Write a model in blocks of FP8 in two shards, other in each step."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((QUANTIZED / "config.json").read_bytes())
    for path in sorted(QUANTIZED.glob("model-*.safetensors")):
        content = bytearray(path.read_bytes())
        (length,) = struct.unpack_from("<Q", content)
        norm = json.loads(content[8 : 8 + length]).get("model.norm.weight")
        if norm is not None:
            struct.pack_into("<H", content, 8 + length + norm["data_offsets"][0], ONE + step)
        (folder / path.name).write_bytes(content)
    index = "model.safetensors.index.json"
    (folder / index).write_bytes((QUANTIZED / index).read_bytes())
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


PLAIN = Kind(name="plain")
PROPOSED = Kind(name="proposed", proposes=True)
RESIZED = Kind(
    name="resized",
    stages="  - tie\n  - resize: {pad_to_multiple_of: 64}\n  - cast: {dtype: float16}\n"
    "  - reshard: {max_shard_size: 50KB}\n",
    computes=True,
)
DEQUANTIZED = Kind(
    name="dequantized",
    stages="  - dequantize\n  - reshard: {max_shard_size: 40KB}\n",
    computes=True,
    write=write_quantized,
)
KINDS = (PLAIN, PROPOSED, RESIZED, DEQUANTIZED)
