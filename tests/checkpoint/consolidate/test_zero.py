"""ZeRO: partitions become the parameters again, without their padding; what is missing is missed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.completeness import Complete, Waiting
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CheckpointIncomplete, CheckpointRefused, CheckpointUnsupported
from ckptd.plan import draft, plan
from tests.checkpoint.consolidate import zero_files
from tests.checkpoint.consolidate.conftest import judge, same, values

Weights = dict[str, torch.Tensor]
STAGES = [1, 2, 3]


@pytest.fixture
def groups(weights: Weights) -> list[Weights]:
    """Two parameter groups in float32, with odd numbers of elements."""
    plain = {name: tensor.float() for name, tensor in weights.items()}
    names = list(plain)
    return [{n: plain[n] for n in names[:3]}, {n: plain[n] for n in names[3:]}]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_partitions_become_the_parameters(
    stage: int, num_ranks: int, groups: list[Weights], run_path: Path
) -> None:
    """Any number of ranks, more than some tensors have elements; only copies are planned."""
    zero_files.write(run_path / "global_step7", groups, stage=stage, num_ranks=num_ranks)
    (run_path / "latest").write_text("global_step7")
    for path in (run_path, run_path / "global_step7"):
        source = open_checkpoint(path)
        assert same(values(source), groups[0] | groups[1])
        assert (source.layout, source.step) == ("deepspeed", 7)
        assert not plan.make(draft.from_checkpoint(source)).needs_torch
        assert isinstance(judge(path), Complete)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_shared_and_buffers_are_in_it(
    stage: int, groups: list[Weights], run_path: Path
) -> None:
    """Frozen parameters and buffers keep their dtype, second names get the same bytes."""
    frozen = {"model.frozen.weight": torch.randn(3, 5).bfloat16()}
    buffers = {"model.running": torch.arange(5), "model.scale": torch.randn(3)}
    zero_files.write(
        run_path / "step",
        groups,
        stage=stage,
        num_ranks=2,
        frozen=frozen,
        buffers=buffers,
        shared={"head.weight": "model.embed_tokens.weight"},
    )
    source = open_checkpoint(run_path / "step")
    expected = groups[0] | groups[1] | frozen | buffers
    expected["head.weight"] = expected["model.embed_tokens.weight"]
    assert same(values(source), expected)
    assert source.masters == expected.keys() - frozen.keys() - buffers.keys()


def test_a_lean_last_partition_is_no_fault(groups: list[Weights], run_path: Path) -> None:
    """Elastic checkpoints leave the padding out."""
    zero_files.write(run_path / "step", groups, stage=2, num_ranks=3, lean=True)
    assert same(values(open_checkpoint(run_path / "step")), groups[0] | groups[1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_rank_is_waited_for(stage: int, groups: list[Weights], run_path: Path) -> None:
    """`latest` is no commit: whichever file of a rank is not there, it is not whole."""
    zero_files.write(run_path / "global_step7", groups, stage=stage, num_ranks=3)
    (run_path / "latest").write_text("global_step7")
    assert isinstance(judge(run_path), Complete)
    for file in sorted((run_path / "global_step7").iterdir()):
        data = file.read_bytes()
        file.unlink()
        assert isinstance(judge(run_path), Waiting), file.name
        with pytest.raises(CheckpointIncomplete):
            open_checkpoint(run_path)
        file.write_bytes(data)


def test_latest_chooses_among_tags(groups: list[Weights], run_path: Path) -> None:
    """Without it several tags are a question; one that is not there is waited for."""
    for step in (3, 7):
        changed = [{n: t + step for n, t in group.items()} for group in groups]
        zero_files.write(run_path / f"global_step{step}", changed, stage=2, num_ranks=2)
    with pytest.raises(CheckpointUnsupported, match="2 tags"):
        open_checkpoint(run_path)
    (run_path / "latest").write_text("global_step3")
    assert open_checkpoint(run_path).step == 3
    (run_path / "latest").write_text("global_step9")
    assert isinstance(judge(run_path), Waiting)


def test_under_the_trainer_its_state_is_the_marker(groups: list[Weights], run_path: Path) -> None:
    """HF Trainer without gathering: config in the folder, trainer_state.json last."""
    path = run_path / "checkpoint-7"
    zero_files.write(path / "global_step7", groups, stage=3, num_ranks=2)
    (path / "config.json").write_text((run_path / "config.json").read_text())
    (path / "latest").write_text("global_step7")
    (path / "rng_state_0.pth").write_bytes(b"x")
    assert isinstance(judge(path), Waiting)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    verdict = judge(path)
    assert isinstance(verdict, Complete)
    assert verdict.layout == "deepspeed"
    assert same(values(open_checkpoint(path)), groups[0] | groups[1])
    (path / "model.safetensors").write_bytes(b"")
    assert not isinstance(judge(path), Complete)  # gathered weights, not whole yet


def _changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


def _optim(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: _changed(
        folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        lambda value: change(value["optimizer_state_dict"]),
    )


def _model(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: _changed(folder / "mp_rank_00_model_states.pt", change)


KEY = "single_partition_of_fp32_groups"


@pytest.mark.parametrize(
    "break_it",
    [
        _optim(lambda value: value.pop(KEY)),
        _optim(lambda value: value.update({KEY: value[KEY][:1]})),
        _optim(lambda value: value[KEY].__setitem__(0, value[KEY][0][:5].clone())),
        _optim(lambda value: value[KEY].__setitem__(0, value[KEY][0].half())),
        _optim(lambda value: value.update({KEY: 7})),
        _optim(lambda value: value.update(partition_count=5)),
        _model(lambda value: value.pop("param_shapes")),
        _model(lambda value: value["param_shapes"][0].update({"more": torch.Size((500,))})),
        _model(lambda value: value["param_shapes"][0].update({"more": (-1,)})),
        _model(lambda value: value.update(dp_world_size=4)),
        lambda f: (f / "mp_rank_01_model_states.pt").write_bytes(b""),
        lambda f: (f / "layer_01-model_00-model_states.pt").write_bytes(b""),
    ],
)
def test_files_that_do_not_agree_are_refused(
    break_it: Callable[[Path], None], groups: list[Weights], run_path: Path
) -> None:
    """Sizes, groups, dtypes, numbers of ranks, tensor and pipeline parallel parts: by name."""
    folder = run_path / "step"
    zero_files.write(folder, groups, stage=2, num_ranks=2)
    break_it(folder)
    with pytest.raises(CheckpointRefused) as caught:
        open_checkpoint(folder)
    assert str(caught.value.path).startswith(str(folder))
    assert list_files(folder).files
