"""Whole checkpoints with one file deleted, cut, emptied or out of date: which losses matter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ckptd.checkpoint import completeness
from ckptd.checkpoint.completeness import Complete, FileSet, Verdict, Waiting
from ckptd.checkpoint.listing import list_files
from tests.checkpoint import saved_files

SETTLE_S = 10.0
FOR_EVER_S = 1e9
BEGIN_S = 1_700_000_000
STATE = saved_files.torch_file({"state": {}, "param_groups": []})
TRAINER_FILES = {
    "training_args.bin": STATE,
    "optimizer.pt": STATE,
    "scheduler.pt": STATE,
    "rng_state.pth": STATE,
}
MODEL_FILES = {
    "config.json": json.dumps({"model_type": "llama", "vocab_size": 128}).encode(),
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{% for message in messages %}{{ message.content }}{% endfor %}",
    "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizerFast"}',
    "tokenizer.json": b'{"version": "1.0", "model": {"vocab": {"a": 0}}}',
    "README.md": b"# A model\n\nof a run\n",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A layout: its files in the order in which its trainer writes them."""

    make: Callable[[], dict[str, bytes]]
    folder: str
    required: Callable[[str], bool]
    """Files without which, or with less of which, it is never whole."""
    marker: str | None = None
    config_in_run: bool = False


def _hf_trainer() -> dict[str, bytes]:
    weights = {"model.safetensors": saved_files.safetensors("model.embed_tokens.weight", rows=128)}
    return _ended(MODEL_FILES | weights | TRAINER_FILES)


def _hf_trainer_sharded() -> dict[str, bytes]:
    return _ended(MODEL_FILES | _shards() | TRAINER_FILES)


def _hf_folder() -> dict[str, bytes]:
    return MODEL_FILES | {"model.safetensors": saved_files.safetensors("w")}


def _hf_sharded() -> dict[str, bytes]:
    return MODEL_FILES | _shards()


def _shards() -> dict[str, bytes]:
    names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    shards = {name: saved_files.content(name, 0) for name in names}
    return shards | {"model.safetensors.index.json": saved_files.index(3)}


def _lora() -> dict[str, bytes]:
    path = saved_files.DATA / "trainers" / "lora" / "checkpoint"
    names = ["adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"]
    names += ["tokenizer_config.json", "trainer_state.json"]
    files = {name: (path / name).read_bytes().rstrip() for name in names}  # no final newline
    ended = files.pop("trainer_state.json")
    tokenizer = {"tokenizer.json": MODEL_FILES["tokenizer.json"]}
    return (
        {"README.md": b"# card"} | files | tokenizer | TRAINER_FILES | {"trainer_state.json": ended}
    )


def _bare_lora() -> dict[str, bytes]:
    files = _lora()
    return {name: files[name] for name in ("adapter_model.safetensors", "adapter_config.json")}


def _dcp() -> dict[str, bytes]:
    files = saved_files.dcp_files()
    return {name: files[name] for name in ("__0_0.distcp", "__1_0.distcp", ".metadata")}


def _accelerate_fsdp() -> dict[str, bytes]:
    sharded = {f"pytorch_model_fsdp_0/{name}": raw for name, raw in _dcp().items()}
    return _ended(sharded | {"scheduler.pt": STATE, "rng_state_0.pth": STATE})


def _zero(stage: int) -> dict[str, bytes]:
    path = Path("global_step3")
    files = {str(path / name): raw for name, raw in saved_files.zero_tag(stage).items()}
    return files | {"zero_to_fp32.py": b"# code\n", "latest": b"global_step3"}


def _zero_of_trainer() -> dict[str, bytes]:
    args = {"training_args.bin": TRAINER_FILES["training_args.bin"]}
    return _ended(MODEL_FILES | args | _zero(3) | {"scheduler.pt": STATE})


def _lightning() -> dict[str, bytes]:
    value = {"state_dict": {"lm_head.weight": torch.ones(64, 4)}, "global_step": 3}
    return {"last.ckpt": saved_files.torch_file(value)}


def _lightning_folder() -> dict[str, bytes]:
    return _dcp() | {"meta.pt": saved_files.torch_file({"global_step": 3})}


def _dcp_safetensors() -> dict[str, bytes]:
    files = {}
    for rank in (1, 2):
        names = ("model.embed_tokens.weight", "lm_head.weight")
        info = {name: {"saved_offsets": [64 * (rank - 1), 0]} for name in names}
        files[f"shard-{rank:05d}-model-00001-of-00001.safetensors"] = saved_files.safetensors(
            *names, rows=64, DCP_SHARDING_INFO=json.dumps(info)
        )
    return files


def _verl() -> dict[str, bytes]:
    part = saved_files.torch_file({"w": torch.ones(8, 4)})
    ranks = {f"actor/model_world_size_2_rank_{rank}.pt": part for rank in (0, 1)}
    return ranks | {"actor/huggingface/config.json": MODEL_FILES["config.json"]}


def _pickled_sharded() -> dict[str, bytes]:
    names = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]
    shards = {
        name: saved_files.torch_file({f"w{n}": torch.ones(8, 4)})
        for n, name in enumerate(names, start=1)
    }
    weight_map = {f"w{n}": name for n, name in enumerate(names, start=1)}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return MODEL_FILES | shards | {"pytorch_model.bin.index.json": index}


def _pipeline() -> dict[str, bytes]:
    index = {"_class_name": "SomePipeline", "safety_checker": [None, None]}
    listed = {name: ["diffusers", "Kind"] for name in ("scheduler", "text_encoder", "unet")}
    return {
        "scheduler/scheduler_config.json": b'{"beta": 1}',
        "text_encoder/config.json": b'{"model_type": "clip_text_model"}',
        "text_encoder/model.safetensors": saved_files.safetensors("w"),
        "unet/config.json": b'{"sample_size": 8}',
        "unet/diffusion_pytorch_model.safetensors": saved_files.safetensors("w"),
        "model_index.json": json.dumps(index | listed).encode(),
    }


def _components() -> dict[str, bytes]:
    files = {name: raw for name, raw in _pipeline().items() if name.startswith("unet/")}
    return files | {"optimizer.bin": STATE, "scheduler.bin": STATE, "random_states_0.pkl": b"."}


def _ended(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"trainer_state.json": b'{"global_step": 3, "log_history": []}'}


def _of_model(name: str) -> bool:
    ends = (".safetensors", ".index.json", ".bin", "trainer_state.json")
    return name == "config.json" or (name.endswith(ends) and name not in TRAINER_FILES)


def _all(name: str) -> bool:
    return not name.endswith(".py")


CASES = {
    "hf_trainer": Case(_hf_trainer, "checkpoint-3", _of_model, "trainer_state.json"),
    "hf_trainer_sharded": Case(
        _hf_trainer_sharded, "checkpoint-3", _of_model, "trainer_state.json"
    ),
    "hf_folder": Case(_hf_folder, "final", _of_model),
    "hf_sharded": Case(_hf_sharded, "final", _of_model, "model.safetensors.index.json"),
    "lora": Case(
        _lora, "checkpoint-6",
        lambda name: _of_model(name) or name == "adapter_config.json", "trainer_state.json",
    ),
    "bare_lora": Case(_bare_lora, "final", _all, "adapter_config.json"),
    "dcp": Case(_dcp, "step-3", _all, ".metadata", config_in_run=True),
    "accelerate_fsdp": Case(
        _accelerate_fsdp, "checkpoint-3",
        lambda name: name.startswith("pytorch_model_fsdp_0/") or name == "trainer_state.json",
        "trainer_state.json", config_in_run=True,
    ),
    "zero_2": Case(lambda: _zero(2), "run-1", _all, "latest", config_in_run=True),
    "zero_3": Case(lambda: _zero(3), "run-1", _all, "latest", config_in_run=True),
    "zero_of_trainer": Case(
        _zero_of_trainer, "checkpoint-3",
        lambda name: name.endswith("_states.pt") or _of_model(name), "trainer_state.json",
    ),
    "lightning": Case(_lightning, "version_0", _all, config_in_run=True),
    "lightning_folder": Case(
        _lightning_folder, "last.ckpt", _all, "meta.pt", config_in_run=True,
    ),
    "dcp_safetensors": Case(_dcp_safetensors, "step-3", _all, config_in_run=True),
    "verl": Case(_verl, "global_step_3", _all),
    "pipeline": Case(_pipeline, "final", lambda name: name != "model_index.json"),
    "components": Case(_components, "checkpoint-3", lambda name: name.startswith("unet/")),
    "flat": Case(
        lambda: {"style-000010.safetensors": saved_files.safetensors("lora_unet_a.weight")},
        "final", _all,
    ),
    "pickled_sharded": Case(_pickled_sharded, "final", _of_model, "pytorch_model.bin.index.json"),
}  # fmt: skip


def _write(root: Path, case: Case, folder: str | None = None) -> Path:
    path = root / (folder or case.folder)
    for number, (name, raw) in enumerate(case.make().items()):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(raw)
        _date(path / name, number)
    if case.config_in_run:
        (root / "config.json").write_bytes(MODEL_FILES["config.json"])
    return path


def _date(path: Path, number: float) -> None:
    """Give a file the time of the `number`-th write of a save that takes a second for each."""
    at_ns = int((BEGIN_S + number) * 1e9)
    os.utime(path, ns=(at_ns, at_ns))


def _facts(path: Path, before: FileSet | None = None) -> completeness.Facts:
    return completeness.examine(path, list_files(path), before=before)


def _judge(path: Path, quiet_s: float, before: FileSet | None = None) -> Verdict:
    return completeness.verdict(_facts(path, before), quiet_s=quiet_s, settle_s=SETTLE_S)


def _each(case: Case, root: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield (file, mutation, folder); each file is as it was before the next one is mutated."""
    path = _write(root, case)
    for name in case.make():
        file = path / name
        raw, times = file.read_bytes(), file.stat()
        cuts = {"one byte less": len(raw) - 1, "half": len(raw) // 2, "empty": 0}
        for kind, size in cuts.items():
            file.write_bytes(raw[:size])
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            yield name, kind, path
        file.unlink()
        yield name, "delete", path
        file.write_bytes(raw)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_intact_checkpoint_is_complete_after_the_quiet_period(
    case: Case, tmp_path: Path
) -> None:
    """No false alarm: as it was written, and copied in the order of names without its times."""
    path = _write(tmp_path, case)
    facts = _facts(path)
    assert isinstance(_judge(path, SETTLE_S), Complete), _judge(path, SETTLE_S)
    copy = tmp_path / "copies" / path.name
    for number, file in enumerate(sorted(p for p in path.rglob("*") if p.is_file())):
        (copy / file.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / file.relative_to(path))
        _date(copy / file.relative_to(path), number / 1000)
    if case.config_in_run:
        shutil.copy(tmp_path / "config.json", tmp_path / "copies")
    assert isinstance(_judge(copy, SETTLE_S, facts.file_set), Complete), _judge(copy, SETTLE_S)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loss_that_matters_is_never_taken_for_complete(case: Case, tmp_path: Path) -> None:
    """Weights, what says where they are, config and last file: not even after endless quiet."""
    num_tried = 0
    for name, kind, path in _each(case, tmp_path):
        if case.required(name):
            is_counted = (name, kind) == ("latest", "delete")  # it says less than the shards do
            verdict = _judge(path, SETTLE_S if is_counted else FOR_EVER_S)
            assert not isinstance(verdict, Complete), (name, kind)
            num_tried += 1
    assert num_tried


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loss_that_does_not_matter_does_not_block(case: Case, tmp_path: Path) -> None:
    """Trainer state may be gone; torn, or had by the checkpoint before, it is waited for a while."""
    before = _facts(_write(tmp_path / "before", case)).file_set
    for name, kind, path in _each(case, tmp_path):
        if case.required(name) or (kind != "delete" and _is_json(name)):
            continue
        if name in TRAINER_FILES and case.marker is not None and kind == "delete":
            assert isinstance(_judge(path, SETTLE_S), Complete), (name, kind)
        if not (name == "chat_template.jinja" and kind == "empty"):
            assert isinstance(_judge(path, FOR_EVER_S), Complete), (name, kind)
            assert isinstance(_judge(path, FOR_EVER_S, before), Complete), (name, kind)
        if name in TRAINER_FILES and kind != "delete":
            assert isinstance(_judge(path, SETTLE_S), Waiting), (name, kind)
        if name == "chat_template.jinja":
            assert not isinstance(_judge(path, SETTLE_S, before), Complete), (name, kind)
        if kind == "delete" and not name.endswith(".py"):
            verdict = _judge(path, SETTLE_S, before)
            assert isinstance(verdict, Waiting), (name, kind)
            assert name.rpartition("/")[2].split("_rank")[0][:6] in verdict.why, verdict


def _is_json(name: str) -> bool:
    return name.endswith(".json")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torn_json_of_a_model_is_never_taken_for_complete(case: Case, tmp_path: Path) -> None:
    """Generation config and tokenizer travel with the model: what is there must be whole."""
    for name, kind, path in _each(case, tmp_path):
        if _is_json(name) and kind != "delete" and not case.required(name):
            assert not isinstance(_judge(path, FOR_EVER_S), Complete), (name, kind)


MARKED = {name: case for name, case in CASES.items() if case.marker is not None}


@pytest.mark.parametrize("case", MARKED.values(), ids=MARKED)
def test_a_last_file_of_an_earlier_save_does_not_end_this_one(case: Case, tmp_path: Path) -> None:
    """Older than all weights by an hour, or than some of them: of another save, for ever."""
    path = _write(tmp_path, case)
    assert case.marker is not None
    _date(path / case.marker, -3600)
    assert isinstance(_judge(path, FOR_EVER_S), Waiting)


@pytest.mark.parametrize("case", MARKED.values(), ids=MARKED)
def test_a_save_into_the_same_folder_is_waited_for_until_it_is_whole_again(
    case: Case, tmp_path: Path
) -> None:
    """The earlier save's files stay until they are overwritten, one after the other, the last last."""
    path = _write(tmp_path, case)
    assert isinstance(_judge(path, FOR_EVER_S), Complete)
    files = case.make()
    weights = [name for name in files if case.required(name) and name != case.marker]
    weights = [name for name in weights if not _is_json(name)]
    for number, (name, raw) in enumerate(files.items()):
        for share in (2, 1):
            (path / name).write_bytes(raw[: len(raw) // share])
            _date(path / name, 1000 + number)
            if name == case.marker and share == 1:
                continue
            if weights and list(files).index(name) >= list(files).index(weights[0]):
                assert isinstance(_judge(path, SETTLE_S), Waiting), (name, share)
    _date(path / case.marker, 1000 + len(files)) if case.marker else None
    assert isinstance(_judge(path, SETTLE_S), Complete)
