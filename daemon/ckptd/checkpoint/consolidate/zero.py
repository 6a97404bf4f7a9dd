"""Checkpoints of DeepSpeed ZeRO, stages 1, 2 and 3: float32 master weights in flat partitions.

Every rank has one file with its part of the optimizer's flat float32 vectors. Stages 1 and 2 cut
each parameter group's vector, padded to a multiple of twice the number of ranks, into equal parts:
their sequence is the vector, in the order of `param_shapes`. Stage 3 cuts each parameter into as
many parts as there are ranks, padded to a whole number of elements each; a rank's vectors hold its
parts one after the other. Buffers and frozen parameters are in the model files, in their own dtype.
Source: DeepSpeed's `zero_to_fp32`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.checkpoint import pieces, torch_file
from ckptd.checkpoint.consolidate.flat import Vector, trimmed
from ckptd.checkpoint.consolidate.gathered import Gathered, has_plain_weights
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import Extent, FileStamp, StoredTensor, TensorSpec
from ckptd.checkpoint.inert import Inert, TensorRef
from ckptd.checkpoint.listing import Listing
from ckptd.checkpoint.pieces import Box, Tensor
from ckptd.checkpoint.torch_file import TorchFile
from ckptd.errors import CheckpointCorrupt, CheckpointIncomplete, CheckpointUnsupported

_OPTIM = re.compile(
    r"^(?P<tag>(?:[^/]+/)?)(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)"
    r"_optim_states\.pt$"
)
_MODEL = re.compile(
    r"^(?P<tag>(?:[^/]+/)?)(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$"
)
_OTHERS = re.compile(r"^(?:[^/]+/)?(layer_\d+-.*model_.*states|expert_\d+_|.*_expert_).*\.pt$")
_TAG_STEP = re.compile(r"(\d+)/$")
_LATEST = "latest"
_CONVERT = "gather it with DeepSpeed's zero_to_fp32.py, or save with stage3_gather_16bit_weights"


@dataclass(frozen=True, slots=True)
class Zero:
    """A folder of rank files, or one above it, with `latest` or one tag's folder."""

    name: str = "deepspeed"

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the first rank file, where no gathered weights are beside it."""
        if has_plain_weights(listing) or "pytorch_model.bin" in listing.by_name:
            return None
        return next((f"{name} is there" for name in listing.by_name if self.holds(name)), None)

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return `latest`, which is written beside the tags; None within one."""
        return _LATEST if _LATEST in listing.by_name else None

    def holds(self, relpath: str) -> bool:
        """Return whether it is a rank's file of this family."""
        return any(pattern.match(relpath) for pattern in (_OPTIM, _MODEL, _OTHERS))

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Return the master weights, buffers and frozen parameters of the newest tag."""
        tag = _tag(path, listing)
        names = [name for name in listing.by_name if self.holds(name) and name.startswith(tag)]
        names = [name for name in names if tag or "/" not in name]
        _refuse_parallel(path, names)
        model = {int(m["rank"] or 0): n for n in names if (m := _MODEL.match(n))}
        optim = {int(m["rank"]): n for n in names if (m := _OPTIM.match(n))}
        if not model or not optim:
            raise CheckpointIncomplete(
                f"no {'optimizer' if model else 'model'} files of ZeRO",
                path=path / tag,
                hint="wait for the save to end; without ZeRO, save the model's state dict",
            )
        return _Partitions(path, tag, model, optim).gathered()


def _tag(path: Path, listing: Listing) -> str:
    """Return the folder, with its slash, that holds the rank files.

    Raises:
        CheckpointIncomplete: `latest` names a tag that is not there.
        CheckpointUnsupported: several tags, and nothing says which.
    """
    tags = {m["tag"] for n in listing.by_name if (m := _OPTIM.match(n) or _MODEL.match(n))}
    if "" in tags or len(tags) == 1:
        return "" if "" in tags else next(iter(tags))
    if _LATEST in listing.by_name:
        with (path / _LATEST).open("rb") as file:
            said = file.read(256).decode("utf-8", "replace").strip() + "/"
        if said in tags:
            return said
        raise CheckpointIncomplete(
            "latest names a tag that is not there",
            path=path / _LATEST,
            expected=", ".join(sorted(tags)[:5]),
            found=said[:80],
            hint="wait for the save to end",
        )
    raise CheckpointUnsupported(
        f"holds {len(tags)} tags", path=path, found=", ".join(sorted(tags)[:5]),
        hint="point at the folder of one of them",
    )  # fmt: skip


def _refuse_parallel(path: Path, names: Iterable[str]) -> None:
    for name in names:
        match = _OPTIM.match(name) or _MODEL.match(name)
        if match is None or int(match["mp"]):
            kind = "tensor-parallel" if match else "pipeline or expert"
            raise CheckpointUnsupported(
                f"{kind} parts of ZeRO are not put together",
                path=path / name,
                hint="convert it with the training framework's own tool (Megatron-DeepSpeed's "
                "or the universal checkpoint's)",
            )


class _Partitions:
    """The rank files of one tag, read."""

    def __init__(
        self, path: Path, tag: str, model: Mapping[int, str], optim: Mapping[int, str]
    ) -> None:
        self.tag = tag
        self.folder = path / tag
        self.stamps: dict[Path, FileStamp] = {}
        self.optim = self._ranks(path, optim)
        first = self._optimizer(0)
        count = first.get("partition_count")
        if isinstance(count, list | tuple):  # one a group where experts are divided otherwise
            count = max((c for c in count if type(c) is int), default=None)
        self.num_ranks = count if type(count) is int else len(optim)
        self._require(optim, "optimizer")
        stage = "3" if "fp32_flat_groups" in first else "1 or 2"
        self.is_stage3 = stage == "3"
        self.model = self._ranks(path, model)
        if self.is_stage3:
            self._require(model, "model")
        self.shapes = self.model[0].value.get("param_shapes")
        said = self.model[0].value.get("dp_world_size")
        if type(said) is int and said != self.num_ranks:
            raise self._corrupt(
                "its files disagree on the number of ranks", f"{said}", f"{self.num_ranks}"
            )

    def gathered(self) -> Gathered:
        """Return the tensors."""
        tensors = {name: self._stored(0, name, value) for name, value in self._buffers()}
        frozen = {spec.name: tensor for spec, tensor in self._frozen()}
        masters = self._stage3() if self.is_stage3 else self._stage2()
        trained = {tensor.spec.name: tensor for tensor in masters}
        tensors |= frozen | trained
        shared = self.model[0].value.get("shared_params") or {}
        for name, source in dict(shared).items():
            if source in tensors:
                found = tensors[source]
                spec = TensorSpec(str(name), found.spec.dtype, found.spec.shape)
                tensors[str(name)] = _renamed(found, spec)
        step = _TAG_STEP.search(self.tag)
        shared_masters = {str(n) for n, source in dict(shared).items() if source in trained}
        return Gathered(
            tensors=self._in_order(tensors),
            stamps=self.stamps,
            masters=frozenset(trained) | shared_masters,
            step=int(step[1]) if step else None,
        )

    def _in_order(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors in the order of the model's state dict."""
        order = {name: place for place, name in enumerate(self._module())}
        names = sorted(tensors, key=lambda name: order.get(name, len(order)))
        return {name: tensors[name] for name in names}

    def _ranks(self, path: Path, names: Mapping[int, str]) -> list[TorchFile]:
        files = []
        for rank in sorted(names):
            file = torch_file.read(path / names[rank])
            if not isinstance(file.value, Mapping):
                raise CheckpointCorrupt("not a file of DeepSpeed", path=file.path)
            self.stamps[file.path] = file.stamp
            files.append(file)
        return files

    def _require(self, names: Mapping[int, str], kind: str) -> None:
        missing = [rank for rank in range(self.num_ranks) if rank not in names]
        if missing or len(names) != self.num_ranks:
            what = f"the {kind} file of rank {missing[0]} is missing" if missing else "extra ranks"
            error = CheckpointIncomplete if missing else CheckpointCorrupt
            raise error(
                what,
                path=self.folder,
                expected=f"{self.num_ranks} {kind} files",
                found=f"{len(names)}",
                hint="wait for the save to end, or copy the missing file",
            )

    def _optimizer(self, rank: int) -> Mapping[str, Any]:
        value = self.optim[rank].value.get("optimizer_state_dict")
        if not isinstance(value, Mapping) or not (
            "fp32_flat_groups" in value or "single_partition_of_fp32_groups" in value
        ):
            raise CheckpointUnsupported(
                "no float32 master weights of ZeRO", path=self.optim[rank].path, hint=_CONVERT
            )
        return value

    def _module(self) -> Mapping[str, Any]:
        value = self.model[0].value.get("module")
        return value if isinstance(value, Mapping) else {}

    def _buffers(self) -> Iterator[tuple[str, TensorRef]]:
        names = self.model[0].value.get("buffer_names") or ()
        for name, value in self._module().items():
            if name in names:
                if not isinstance(value, TensorRef):
                    raise self._corrupt(f"buffer {name!r} is not a tensor", "a tensor", "other")
                yield name, value

    def _stored(self, rank: int, name: str, tensor: TensorRef) -> Tensor:
        return pieces.stored(self.model[rank], tensor, name)

    def _frozen(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        shapes = self.model[0].value.get("frozen_param_shapes") or {}
        for name, size in dict(shapes).items():
            shape = self._shape(name, size)
            parts = [self._fragment(rank, name) for rank in range(len(self.model))]
            spec = TensorSpec(name, parts[0][1].dtype, shape)
            if not self.is_stage3:
                if parts[0][1].shape != shape:
                    raise self._corrupt("a frozen parameter has another shape", f"{shape}", name)
                yield spec, self._stored(0, name, parts[0][1])
                continue
            yield spec, self._flat(spec, Vector(parts).cut(0, spec.numel))

    def _fragment(self, rank: int, name: str) -> tuple[TorchFile, TensorRef]:
        fragments = self.model[rank].value.get("frozen_param_fragments") or {}
        value = fragments.get(name) if isinstance(fragments, Mapping) else None
        if not isinstance(value, TensorRef) or not value.is_contiguous:
            raise CheckpointCorrupt(
                "its frozen part is missing", path=self.model[rank].path, tensor=name
            )
        return self.model[rank], value

    def _groups(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Return names and shapes of the parameters, group by group."""
        if not isinstance(self.shapes, list) or not all(
            isinstance(group, Mapping) for group in self.shapes
        ):
            raise CheckpointUnsupported(
                "has no param_shapes",
                path=self.model[0].path,
                hint="written by DeepSpeed before 0.5: " + _CONVERT,
            )
        return [
            [(name, self._shape(name, size)) for name, size in group.items()]
            for group in self.shapes
        ]

    def _shape(self, name: Any, size: Any) -> tuple[int, ...]:
        if (
            not isinstance(name, str)
            or not isinstance(size, tuple | list)
            or not all(type(length) is int and 0 <= length < 1 << 62 for length in size)
        ):
            raise self._corrupt("a parameter's shape is not one", "sizes", str(name)[:80])
        return tuple(size)

    def _flats(self, rank: int, key: str) -> list[tuple[TorchFile, TensorRef]]:
        value = self._optimizer(rank)[key]
        if not isinstance(value, list | tuple) or not all(
            isinstance(part, TensorRef) and part.is_contiguous for part in value
        ):
            kind = value.of if isinstance(value, Inert) else type(value).__name__
            raise CheckpointUnsupported(
                f"{key} is not a list of flat tensors",
                path=self.optim[rank].path,
                found=kind,
                hint=_CONVERT,
            )
        if len({part.dtype for part in value}) > 1 or (value and value[0].dtype is not self.dtype):
            raise self._corrupt("master weights of several dtypes", str(self.dtype), "others")
        return [(self.optim[rank], part) for part in value]

    @property
    def dtype(self) -> Dtype:
        """The dtype of the master weights: that of the first one."""
        groups = self._optimizer(0)
        key = "fp32_flat_groups" if self.is_stage3 else "single_partition_of_fp32_groups"
        found = groups[key]
        first = found[0] if isinstance(found, list | tuple) and found else None
        return first.dtype if isinstance(first, TensorRef) else Dtype.F32

    def _stage2(self) -> Iterator[Tensor]:
        groups = self._groups()
        flats = [
            self._flats(rank, "single_partition_of_fp32_groups") for rank in range(self.num_ranks)
        ]
        if any(len(flat) != len(groups) for flat in flats):
            raise self._corrupt("ranks have other groups than the model", f"{len(groups)}", "other")
        for number, group in enumerate(groups):
            vector = Vector([flat[number] for flat in flats])
            begin = 0
            for name, shape in group:
                spec = TensorSpec(name, self.dtype, shape)
                yield self._flat(spec, vector.cut(begin, spec.numel))
                begin += spec.numel
            unit = 2 * self.num_ranks
            if -(-begin // unit) != -(-vector.numel // unit):
                raise self._corrupt(
                    f"the elements of group {number} are not those of its parameters",
                    f"{begin}, padded to a multiple of {unit}",
                    f"{vector.numel}",
                )

    def _stage3(self) -> Iterator[Tensor]:
        vectors = [Vector(self._flats(rank, "fp32_flat_groups")) for rank in range(self.num_ranks)]
        begin = 0
        for name, shape in (one for group in self._groups() for one in group):
            spec = TensorSpec(name, self.dtype, shape)
            part = -(-spec.numel // self.num_ranks)
            yield self._flat(spec, trimmed(vectors, begin, part, spec.numel))
            begin += part
        for rank, vector in enumerate(vectors):
            if vector.numel != begin:
                raise CheckpointCorrupt(
                    "its elements are not those of the parameters",
                    path=self.optim[rank].path,
                    expected=f"{begin} elements",
                    found=f"{vector.numel}",
                )

    def _flat(self, spec: TensorSpec, runs: Iterable[tuple[int, Extent]]) -> Tensor:
        boxes = []
        at = 0
        for numel, extent in runs:
            numel = min(numel, spec.numel - at)
            if numel <= 0:
                break
            nbytes = numel * spec.dtype.bits // 8
            boxes.append(Box((at,), (numel,), Extent(extent.path, extent.offset, nbytes)))
            at += numel
        return pieces.assemble(spec, boxes, path=self.optim[0].path, grid=(spec.numel,))

    def _corrupt(self, what: str, expected: str, found: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(what, path=self.folder, expected=expected, found=found)


def _renamed(tensor: Tensor, spec: TensorSpec) -> Tensor:
    if isinstance(tensor, pieces.Assembled):
        return pieces.Assembled(spec, tensor.grid, tensor.boxes)
    return StoredTensor(spec, tensor.extent)


ZERO = Zero()
