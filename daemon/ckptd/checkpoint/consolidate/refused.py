"""Layouts that are recognised and not read: the reason, and the tool that converts them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint.consolidate.gathered import Gathered
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointUnsupported


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout told by files that match all of `signs`; why it is refused and what helps."""

    name: str
    signs: tuple[re.Pattern[str], ...]
    what: str
    hint: str

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file that gives it away, if every sign has one."""
        found = [
            next((name for name in listing.by_name if sign.search(name)), None)
            for sign in self.signs
        ]
        return None if None in found else f"{found[0]} is there"

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return None: nothing is waited for."""
        return None

    def holds(self, relpath: str) -> bool:
        """Return False: nothing of it is pinned for its weights."""
        return False

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Refuse."""
        raise CheckpointUnsupported(self.what, path=path, hint=self.hint)


MEGATRON = Refused(
    "megatron",
    (re.compile(r"^common\.pt$"), re.compile(r"^(__\d+_\d+\.distcp|metadata\.json)$")),
    "a Megatron-Core distributed checkpoint: its tensors have Megatron's names and fused layouts",
    "convert it with Megatron-Bridge (AutoBridge.export_ckpt) and point ckptd at the result",
)
MEGATRON_LEGACY = Refused(
    "megatron-legacy",
    (re.compile(r"(^|/)mp_rank_\d\d(_\d{3})*/model_optim_rng\.pt$"),),
    "a Megatron-LM checkpoint of one file a rank",
    "convert it with Megatron-LM's tools/checkpoint/convert.py or Megatron-Bridge",
)
ORBAX = Refused(
    "orbax",
    (re.compile(r"(^|/)(_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt)$"),),
    "an orbax checkpoint: its arrays are in OCDBT/Zarr stores",
    "convert it with the trainer's own tool (MaxText: MaxText.utils.ckpt_conversion.to_huggingface)",
)
ZERO_UNIVERSAL = Refused(
    "deepspeed-universal",
    (re.compile(r"(^|/)zero/[^/]+/fp32\.pt$"),),
    "a DeepSpeed universal checkpoint",
    "point ckptd at the checkpoint it was made from",
)
