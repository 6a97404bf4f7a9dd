"""Stage `dequantize`: quantized weights as plain ones, block of rows by block of rows.

The format is told by config.json or by the tensors themselves; what belongs together is found over
all files. Tensors that are plain already stay bit for bit. The config loses its quantization and
says the new dtype, files that describe the quantization stay behind, and nothing quantized may
remain: that is checked before a byte is read.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ckptd import units
from ckptd.checkpoint.dtypes import Dtype
from ckptd.checkpoint.header import StoredTensor
from ckptd.errors import StageRefused
from ckptd.models import architectures
from ckptd.pipeline.stage import Patterns, Stage, StageContext, StageOptions
from ckptd.pipeline.stages.cast import WeightDtype
from ckptd.plan import dequantize, expression
from ckptd.plan.draft import Draft, StageReport
from ckptd.plan.nodes import Expression, Load
from ckptd.quant import configuration, leftovers, registry
from ckptd.quant.formula import Arith
from ckptd.quant.group import Format, Found, Group, Stored


class DequantizeOptions(StageOptions):
    """Options of `dequantize`."""

    dtype: WeightDtype | None = None
    """The dtype of the weights that are made: bfloat16, float16 or float32. By default the one that
    config.json loads the model in."""
    arith: Literal["float32", "library"] = "float32"
    """float32: computed in float32 and rounded once. library: the roundings of the library that
    wrote the checkpoint, bit for bit, in its dtype unless `dtype` asks for another."""
    only: Patterns = ("*",)
    """Names of the weights to dequantize, as shell patterns. All by default."""
    keep: Patterns = ()
    """Names of weights that stay quantized; config.json then keeps its quantization, and lists the
    others as plain."""
    requantize: Literal["none"] = Field(default="none")
    """What the plain weights are quantized to again: nothing."""


def plan(draft: Draft, options: DequantizeOptions, context: StageContext) -> Draft:
    """Return the draft with its quantized weights as plain ones; a plain checkpoint stays as it is.

    Raises:
        CheckpointUnsupported: a format or a variant that is not decoded, or something quantized
            that would remain.
        CheckpointCorrupt: a partner tensor is missing or does not fit; names it.
        StageRefused: a pattern matches nothing, or the format cannot be left half quantized.
    """
    stored = _now_stored(draft, context)
    if draft.in_pieces and stored.quantization:
        _refuse_pieces(draft, context)
    chosen = registry.choose(stored)
    if chosen is None:
        leftovers.check(_specs(draft.tensors), path=context.source_path)
        return draft.with_report(StageReport(stage="dequantize", summary="nothing is quantized"))
    found = chosen.find(stored)
    taken = _taken(found, options, context)
    names = {group.name for group in taken}
    kept = [group for group in found.groups if group.name not in names]
    skip_key = _skip_key(chosen, draft.config, context) if kept else None
    _require_whole(taken, kept, context)
    dtype = _dtype(draft.config, found, options)
    tensors, home = _replaced(draft, found, taken, kept, dtype, options, context)
    said = dtype or dequantize.most_common_dtype(found)
    config = configuration.plain(draft.config, str(said.torch_name))
    gone = configuration.SIDE_FILES | set(chosen.side_files)
    changed = dataclasses.replace(
        draft,
        tensors=tensors,
        home=home,
        config=config,
        side_files=tuple(file for file in draft.side_files if file.relpath not in gone),
    )
    if skip_key is None:
        leftovers.check(_specs(tensors), path=context.source_path)
    else:
        config = _half_plain(dataclasses.replace(changed, config=draft.config), skip_key, taken)
        changed = dataclasses.replace(changed, config=config)
    report = _report(draft, changed, chosen, found, taken, options)
    return changed.with_report(report)


def _refuse_pieces(draft: Draft, context: StageContext) -> None:
    """Refuse quantized weights that lie in several pieces: formats read whole tensors.

    Raises:
        StageRefused: names the first.
    """
    for name, value in draft.tensors.items():
        if not isinstance(value, Load):
            raise StageRefused(
                "is quantized and lies in several pieces",
                stage="dequantize",
                path=context.source_path,
                tensor=name,
                hint="consolidate first with a pipeline without stages, then dequantize the result",
            )


def _now_stored(draft: Draft, context: StageContext) -> Stored:
    """Return what formats may look at: the stored tensors that no earlier stage changed."""
    stored = context.stored
    untouched = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if draft.tensors.get(name) == expression.load(tensor)
    }
    return dataclasses.replace(stored, tensors=untouched)


def _taken(found: Found, options: DequantizeOptions, context: StageContext) -> list[Group]:
    """Return the groups that the patterns choose.

    Raises:
        StageRefused: a pattern matches no quantized weight.
    """
    names = [group.name for group in found.groups]
    for key, patterns in (("only", options.only), ("keep", options.keep)):
        for pattern in patterns:
            if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise StageRefused(
                    f"{key} pattern {pattern!r} matches no quantized weight",
                    stage="dequantize",
                    path=context.source_path,
                    hint="see the names with `ckptd inspect --tensors`",
                )
    return [
        group
        for group in found.groups
        if _matches(group.name, options.only) and not _matches(group.name, options.keep)
    ]


def _skip_key(chosen: Format, config: Mapping[str, Any], context: StageContext) -> str:
    """Return where the config lists what is plain, which a half quantized checkpoint needs.

    Raises:
        StageRefused: the format has no such list, or config.json has no quantization config.
    """
    said = any(isinstance(config.get(key), Mapping) for key in configuration.QUANTIZATION_KEYS)
    if chosen.skip_key is None or not said:
        lacks = f"{chosen.name} has" if said else "config.json has"
        raise StageRefused(
            f"{lacks} no list of plain modules: it is dequantized whole or not at all",
            stage="dequantize",
            path=context.source_path,
            hint="leave `only` and `keep` out",
        )
    return chosen.skip_key


def _require_whole(taken: Sequence[Group], kept: Sequence[Group], context: StageContext) -> None:
    """Refuse to divide weights that are stored in one tensor (stacked experts)."""
    shared = {name for group in taken for name in group.consumed}
    for group in kept:
        for name in group.consumed:
            if name in shared:
                raise StageRefused(
                    "holds weights of which some are to stay quantized and some are not",
                    stage="dequantize",
                    path=context.source_path,
                    tensor=name,
                    hint="keep all of its weights or none",
                )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _dtype(config: Mapping[str, Any], found: Found, options: DequantizeOptions) -> Dtype | None:
    """Return the dtype to make, or None for the library's own of each weight."""
    if options.dtype is not None:
        return options.dtype
    if options.arith == "library":
        return None
    return dequantize.default_dtype(config, found)


def _replaced(
    draft: Draft,
    found: Found,
    taken: Sequence[Group],
    kept: Sequence[Group],
    dtype: Dtype | None,
    options: DequantizeOptions,
    context: StageContext,
) -> tuple[dict[str, Expression], dict[str, str]]:
    """Return tensors and homes with each group's weight where its first tensor stood."""
    tensors: dict[str, Expression] = {}
    home: dict[str, str] = {}
    for name, new, group in dequantize.arranged(draft.tensors, found, taken=taken, kept=kept):
        value = draft.tensors[name]
        if isinstance(group, StoredTensor):
            value = expression.load(group)
        elif group is not None:
            value = dequantize.weight(group, dtype=dtype or group.dtype, arith=Arith(options.arith))
        if new in tensors:
            raise StageRefused(
                "is in the checkpoint twice, plain and quantized",
                stage="dequantize",
                path=context.source_path,
                tensor=new,
                hint="remove the one that is left over from an earlier save",
            )
        tensors[new], home[new] = value, draft.home[name]
    return tensors, home


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _half_plain(changed: Draft, key: str, taken: Sequence[Group]) -> dict[str, Any]:
    """Return the config with the modules of `taken` added to those that are plain.

    Where it lists none, loaders take the head and what is tied to it for plain; a list ends that,
    so that it names all that is plain.
    """
    config = dict(changed.config)
    for name in configuration.QUANTIZATION_KEYS:
        said = config.get(name)
        if isinstance(said, Mapping):
            listed = said.get(key)
            listed = listed if isinstance(listed, list) else _plain_modules(changed)
            more = [_module(group.name) for group in taken]
            config[name] = {**said, key: [*listed, *(one for one in more if one not in listed)]}
    return config


def _plain_modules(changed: Draft) -> list[str]:
    """Return the modules of plain matrices, and those that are tied and in no file."""
    known = architectures.find(changed.config)
    tied = [tie.target for tie in known.ties] if known is not None else []
    matrices = [
        name
        for name, value in changed.tensors.items()
        if name.endswith(".weight") and value.dtype.is_plain_float and len(value.shape) > 1
    ]
    absent = [name for name in tied if name not in changed.tensors]
    return list(dict.fromkeys(_module(name) for name in (*matrices, *absent)))


def _specs(tensors: Mapping[str, Expression]) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
    return {name: (value.dtype, value.shape) for name, value in tensors.items()}


def _report(
    before: Draft,
    after: Draft,
    chosen: Format,
    found: Found,
    taken: Sequence[Group],
    options: DequantizeOptions,
) -> StageReport:
    schemes = Counter(group.scheme for group in taken)
    made = sorted({str(after.tensors[group.name].dtype.torch_name) for group in taken})
    sizes = [units.format_bytes(one.tensor_bytes) for one in (before, after)]
    how = "; ".join(f"{count} {scheme}" for scheme, count in schemes.most_common())
    return StageReport(
        stage="dequantize",
        summary=f"{len(taken)} weights from {chosen.name} ({how}) to {', '.join(made)}: "
        f"{sizes[0]} become {sizes[1]}",
        facts={
            "format": chosen.name,
            "schemes": dict(schemes),
            "dtype": made,
            "arith": options.arith,
            "dequantized": len(taken),
            "kept": len(found.groups) - len(taken),
            "dropped": len(found.dropped),
            "bytes_before": before.tensor_bytes,
            "bytes_after": after.tensor_bytes,
            "num_parameters": sum(expression.numel(value) for value in after.tensors.values()),
        },
    )


STAGE = Stage(
    name="dequantize",
    summary="quantized weights as plain ones",
    options=DequantizeOptions,
    plan=plan,
    computes=True,
)
