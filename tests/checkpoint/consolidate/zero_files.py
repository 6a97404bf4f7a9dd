"""ZeRO checkpoints written as DeepSpeed writes them, from whole tensors: no DeepSpeed is needed.

The layout of the files is that of DeepSpeed 0.19 (the real ZeRO-3 fixture has the same keys).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]


def write(
    path: Path,
    groups: Sequence[Weights],
    *,
    stage: int,
    num_ranks: int,
    frozen: Weights | None = None,
    buffers: Weights | None = None,
    shared: Mapping[str, str] | None = None,
    lean: bool = False,
) -> None:
    """Write a tag's folder; `groups` are the optimizer's parameter groups in float32.

    `lean` leaves the padding at the end of the last partition out, as elastic checkpoints do.
    """
    path.mkdir(parents=True)
    frozen, buffers = frozen or {}, buffers or {}
    for rank in range(num_ranks):
        optimizer: dict[str, Any] = {"zero_stage": stage, "partition_count": num_ranks}
        if stage == 3:
            optimizer["fp32_flat_groups"] = [
                torch.cat([_part(t, rank, num_ranks) for t in group.values()]) for group in groups
            ]
        else:
            optimizer["partition_count"] = [num_ranks] * len(groups)
            optimizer["single_partition_of_fp32_groups"] = [
                _cut(group, rank, num_ranks, lean=lean) for group in groups
            ]
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path / f"bf16_{name}")
        if stage < 3 and rank:
            continue
        model = {
            "module": {
                name: tensor.to(torch.bfloat16) if stage < 3 else torch.empty(0)
                for group in groups
                for name, tensor in group.items()
            }
            | dict(frozen)
            | dict(buffers),
            "buffer_names": list(buffers),
            "param_shapes": [{n: t.shape for n, t in group.items()} for group in groups],
            "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
            "frozen_param_fragments": {
                name: _part(tensor, rank, num_ranks) if stage == 3 else tensor
                for name, tensor in frozen.items()
            },
            "shared_params": dict(shared or {}),
            "dp_world_size": num_ranks,
            "mp_world_size": 1,
            "ds_version": "0.19.8",
        }
        prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        torch.save(model, path / f"{prefix}mp_rank_00_model_states.pt")


def _part(tensor: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """Stage 3: each tensor by itself, padded to a whole number of elements a rank."""
    flat = tensor.flatten()
    size = -(-flat.numel() // num_ranks)
    padded = torch.nn.functional.pad(flat, (0, size * num_ranks - flat.numel()), value=-1.0)
    return padded[rank * size : (rank + 1) * size].clone()


def _cut(group: Weights, rank: int, num_ranks: int, *, lean: bool) -> torch.Tensor:
    """Stages 1 and 2: one vector a group, padded to a multiple of twice the ranks."""
    flat = torch.cat([tensor.flatten() for tensor in group.values()])
    unit = 2 * num_ranks
    padding = -flat.numel() % unit
    size = (flat.numel() + padding) // num_ranks
    padded = flat if lean else torch.nn.functional.pad(flat, (0, padding), value=-1.0)
    return padded[rank * size : (rank + 1) * size].clone()
