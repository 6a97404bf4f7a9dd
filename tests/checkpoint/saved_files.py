"""What the files of the recorded saves hold: small, and as their readers want them.

Only what completeness looks at is real: headers, archives, metadata and JSON. Weights are holes.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ckptd.checkpoint import header
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import TensorSpec
from tests.checkpoint.consolidate import zero_files

DATA = Path(__file__).parents[1] / "data"
CONFIG = json.dumps({"model_type": "llama", "vocab_size": 10}).encode()
_ROWS = 64


def safetensors(*names: str, rows: int = _ROWS, **metadata: str) -> bytes:
    """Return a safetensors file of matrices with these names."""
    specs = [TensorSpec(name, Dtype.F32, (rows, 4)) for name in names]
    head = header.encode(specs, metadata=metadata)
    return head + bytes(sum(spec.nbytes for spec in specs))


def index(num_shards: int, suffix: str = "safetensors") -> bytes:
    """Return the index of shards that hold one tensor each."""
    weight_map = {
        f"w{n}": f"model-{n:05d}-of-{num_shards:05d}.{suffix}" for n in range(1, num_shards + 1)
    }
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def torch_file(value: Any) -> bytes:
    """Return what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def content(relpath: str, round_: int) -> bytes:
    """Return the file at `relpath` of a trace as its `round_`-th save (from 0 on) leaves it."""
    for pattern, make in _CONTENTS:
        if match := re.search(pattern, relpath):
            return make(match, round_)
    raise LookupError(relpath)


def _trainer_state(match: re.Match[str], round_: int) -> bytes:
    return json.dumps({"global_step": int(match[1]), "log_history": []}).encode()


def _shard_of_a_rank(match: re.Match[str], round_: int) -> bytes:
    info = {"w": {"saved_offsets": [_ROWS * (int(match[1]) - 1), 0]}}
    return safetensors("w", DCP_SHARDING_INFO=json.dumps(info))


def _shard(match: re.Match[str]) -> bytes:
    """Return a shard of a model that has as many elements however many shards there are."""
    return safetensors(f"w{int(match[1])}", rows=3 * _ROWS // int(match[2]))


@functools.cache
def dcp_files() -> dict[str, bytes]:
    """Return the files of a real distributed checkpoint: those that the traces recorded."""
    with tarfile.open(DATA / "trainers" / "trainers.tar.xz") as archive:
        members = [m for m in archive if m.isfile() and m.name.startswith("dcp_plain/")]
        return {Path(m.name).name: _read(archive, m) for m in members}


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def written(write: Callable[[Path], None]) -> dict[str, bytes]:
    """Return the files that `write` puts into the folder it makes, by name in its order."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "made")
        return {file.name: file.read_bytes() for file in sorted((Path(folder) / "made").iterdir())}


@functools.cache
def zero_tag(stage: int) -> dict[str, bytes]:
    """Return the files of one tag of DeepSpeed, of two ranks."""
    group = {"w": torch.ones(9, 4)}
    return written(lambda path: zero_files.write(path, [group], stage=stage, num_ranks=2))


_CONTENTS: list[tuple[str, Callable[[re.Match[str], int], bytes]]] = [
    (r"(?:checkpoint-)(\d+)/trainer_state\.json$", _trainer_state),
    (r"adapter_config\.json$", lambda *_: b'{"peft_type": "LORA", "r": 4}'),
    (r"adapter_model\.safetensors$", lambda *_: safetensors("q.lora_A.weight")),
    (r"shard-(\d{5})-model-00001-of-00001\.safetensors$", _shard_of_a_rank),
    (r"model-(\d{5})-of-(\d{5})\.safetensors$", lambda match, _: _shard(match)),
    (r"sharded/model\.safetensors\.index\.json$", lambda _, round_: index((4, 3)[round_])),
    (r"model\.safetensors\.index\.json$", lambda *_: index(1)),
    (r"model\.safetensors$", lambda *_: safetensors("w")),
    (r"config\.json$", lambda *_: CONFIG),
    (r"\.json$", lambda *_: b'{"version": "1.0"}'),
    (r"(\.metadata|__[01]_0\.distcp)$", lambda m, _: dcp_files()[m[1]]),
    (r"(\w+_states\.pt)$", lambda m, _: zero_tag(2)[m[1]]),
    (r"latest$", lambda _, round_: f"global_step{round_ + 1}".encode()),
    (r"_rank_\d\.pt$", lambda *_: torch_file({"w": torch.ones(8, 4)})),
    (r"\.ckpt$", lambda _, round_: torch_file({"state_dict": {"a.w": torch.ones(8 + round_)}})),
    (r"\.(md|jinja|py|bin|pt|pth)$", lambda *_: b"of the trainer, not looked into\n" * 4),
]
"""Pattern of the path -> its whole content; the first that is found in it counts."""
