"""Which files of a folder are its weights: one file, a set with an index, or something refused.

A folder may hold leftovers of an earlier save beside the current one (a stale index beside a new
single file, old shards beside a new index). Readers that take the first name they know load the
stale ones silently; here the newer of the two wins, and a tie is refused.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint import index, sidefiles
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
_DISTRIBUTED = (
    "*.distcp",
    ".metadata",
    "*/.metadata",
    "*mp_rank_*_states.pt",
    "pytorch_model_fsdp*",
)
_BELOW = re.compile(r"/(model\.safetensors|pytorch_model\.bin)(\.index\.json)?$")
_VARIANT = re.compile(r"^model\.[^.]+(-\d{5}-of-\d{5})?\.safetensors$")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The weight files of a checkpoint.

    `weight_map` is tensor -> shard name for an indexed set, None for the single file; `notes` says
    what was found beside them and left alone.
    """

    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the weight files of a set are called; sets of several variants may share a folder."""

    single: str
    index: str
    shard: re.Pattern[str]

    @classmethod
    def of(cls, variant: str | None, *, stem: str = "model") -> Names:
        """Return the names of the plain set, or of the one that `variant` (such as fp16) names.

        Their `stem` is that of transformers, unless it is said to be another library's.
        """
        infix = "" if variant is None else f".{variant}"
        shard = rf"^{re.escape(stem + infix)}-\d{{5}}-of-\d{{5}}\.safetensors$"
        return cls(
            single=f"{stem}{infix}.safetensors",
            index=f"{stem}.safetensors.index{infix}.json",
            shard=re.compile(shard),
        )


def find(
    path: Path, listing: Listing, *, variant: str | None = None, stem: str = "model"
) -> WeightFiles:
    """Return the weight files of the folder at `path`, whose files are `listing`.

    Raises:
        CheckpointIncomplete: no weights, or the index names shards that are not there.
        CheckpointUnsupported: weights of a kind this version does not read.
        CheckpointCorrupt: a broken index, or two sets of weights of the same age.
    """
    names = Names.of(variant, stem=stem)
    ages = {file.relpath: file.mtime_ns for file in listing.files}
    if names.single not in ages and names.index not in ages:
        raise _no_weights(path, listing, names)
    if names.index not in ages:
        newer = [n for n, age in ages.items() if names.shard.match(n) and age > ages[names.single]]
        if newer:
            raise _no_index(path / newer[0], names)
        return WeightFiles(shards=(names.single,), weight_map=None)
    if names.single not in ages:
        return _indexed(path, ages, names)
    return _newer(path, ages, names)


def _newer(path: Path, ages: Mapping[str, int], names: Names) -> WeightFiles:
    single = WeightFiles(
        shards=(names.single,),
        weight_map=None,
        notes=(f"{names.index} is left over from an earlier save and was ignored",),
    )
    try:
        indexed = _indexed(path, ages, names)
    except CheckpointIncomplete:
        return single
    if indexed.shards == (names.single,):
        return indexed
    if ages[names.single] == ages[names.index]:
        raise CheckpointCorrupt(
            f"holds both {names.single} and a whole set of shards of the same age",
            path=path,
            hint="remove the set that is left over from an earlier save",
        )
    if ages[names.single] > ages[names.index]:
        return single
    note = f"{names.single} is older than the index and was ignored"
    return WeightFiles(shards=indexed.shards, weight_map=indexed.weight_map, notes=(note,))


def _indexed(path: Path, ages: Mapping[str, int], names: Names) -> WeightFiles:
    weight_map = index.read_weight_map(path / names.index)
    shards = tuple(sorted(set(weight_map.values())))
    absent = [shard for shard in shards if shard not in ages]
    if absent:
        tensor = next(name for name, shard in weight_map.items() if shard == absent[0])
        raise CheckpointIncomplete(
            f"the index names shards that are not there: {', '.join(absent[:5])}",
            path=path / names.index,
            tensor=tensor,
            expected=f"{len(shards)} shards",
            found=f"{len(shards) - len(absent)}",
            hint="wait for the save to end, or copy the missing shards",
        )
    return WeightFiles(shards=shards, weight_map=weight_map)


def _no_index(shard_path: Path, names: Names) -> CheckpointIncomplete:
    return CheckpointIncomplete(
        f"a shard, and no {names.index} yet",
        path=shard_path,
        hint="the index is written last: wait for the save to end, or save again",
    )


def _no_weights(
    path: Path, listing: Listing, wanted: Names
) -> CheckpointIncomplete | CheckpointUnsupported:
    names = [file.relpath for file in listing.files]
    if shard := next((n for n in names if wanted.shard.match(n)), None):
        return _no_index(path / shard, wanted)
    if wanted.single != SINGLE_NAME and (SINGLE_NAME in names or INDEX_NAME in names):
        return CheckpointIncomplete(
            "no weights of this variant",
            path=path,
            expected=f"{wanted.single} or {wanted.index}",
            found="weights without a variant",
            hint="leave `variant` out to load those",
        )
    refusal = _of_another_kind(path, names)
    if refusal is not None:
        return refusal
    return CheckpointIncomplete(
        "no weights",
        path=path,
        expected=f"{wanted.single} or {wanted.index}",
        found=", ".join(sorted(names)[:6]) or "an empty folder",
        hint=_elsewhere(path, names) or "point at a folder written by save_pretrained or a Trainer",
    )


def _elsewhere(path: Path, names: Sequence[str]) -> str | None:
    """Return in words where else there is a model, in a folder below or under another name."""
    below = {name.rpartition("/")[0] for name in names if _BELOW.search(name)}
    if below:
        found = min(below, key=lambda folder: (folder.count("/"), folder))
        return f"a model lies in {found}: point at {path / found}, or watch .../*/{found}"
    alone = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(alone) == 1 and CONFIG_NAME in names:
        return f"point at the file itself: {path / alone[0]}"
    return None


_NAMED_ADAPTER = ("/adapter_model.safetensors", "/adapter_model.bin")
"""How PEFT saves every adapter that is not called `default`."""


def _of_another_kind(path: Path, names: Sequence[str]) -> CheckpointUnsupported | None:
    """Return the refusal of weights that are there and not read, if any are."""
    candidates = [n for n in names if sidefiles.fate(n) is sidefiles.Fate.WEIGHTS]

    def first(*patterns: str, among: Sequence[str] = candidates) -> str | None:
        hits = (n for n in among if any(fnmatch.fnmatchcase(n, p) for p in patterns))
        return next(hits, None)

    if found := first("adapter_model.safetensors", "adapter_model.bin"):
        return CheckpointUnsupported(
            "an adapter without its base model",
            path=path / found,
            hint="merge it into the base model and save that",
        )
    if first("*/adapter_model.safetensors", "*/adapter_model.bin", among=names):
        folders = {n.rpartition("/")[0] for n in names if n.endswith(_NAMED_ADAPTER)}
        return CheckpointUnsupported(
            "holds adapters with names of their own, each in a folder",
            path=path,
            found=", ".join(sorted(folders)),
            hint=f"point at one of them, or watch it: .../*/{min(folders)}",
        )
    if found := first("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.ckpt", "*.pt"):
        return CheckpointUnsupported(
            "pickled weights are not read",
            path=path / found,
            hint="save as safetensors (the default of save_pretrained)",
        )
    if found := first("*.h5", "*.msgpack", "*.onnx"):
        return CheckpointUnsupported(
            "weights of TensorFlow, Flax or ONNX are not read",
            path=path / found,
            hint="load them into transformers (from_tf=True, from_flax=True) and save_pretrained them",
        )
    if found := first(*_DISTRIBUTED, among=names):
        return CheckpointUnsupported(
            "a distributed checkpoint is not read",
            path=path / found,
            hint="save a full state dict as safetensors",
        )
    if found := next((n for n in names if _VARIANT.match(n)), None):
        return CheckpointUnsupported(
            "only weights of a named variant are there",
            path=path / found,
            hint=f"save them under the plain name {SINGLE_NAME}, or load that `variant`",
        )
    return None
