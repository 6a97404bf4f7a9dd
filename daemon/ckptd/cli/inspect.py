"""`ckptd inspect`: what a checkpoint is, from names, headers and JSON; no tensor byte is read."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd import errors, units
from ckptd.cli import arguments, failures
from ckptd.cli.arguments import Assets, CheckpointFolder, Json, LayoutName
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from ckptd.checkpoint.checkpoint import Checkpoint
    from ckptd.checkpoint.pieces import Tensor
    from ckptd.pipeline.stage import StageContext

SETTLE_S = 10.0
"""The quiet period a definition asks for by default: the verdict is that of such a definition."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what a checkpoint is, and whether it is whole.",
        epilog=arguments.examples(
            "ckptd inspect /runs/llama-sft/checkpoint-500",
            "ckptd inspect ./model --tensors",
            "ckptd inspect ./model --json",
        ),
    )(inspect)


def inspect(
    checkpoint: CheckpointFolder,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    assets: Assets = None,
    layout: LayoutName = "auto",
    as_json: Json = False,
) -> None:
    """Show layout, completeness, tensors, dtypes, tied weights, quantization and footprint."""
    output = Output(as_json=as_json)
    path = arguments.absolute(checkpoint)
    assets = None if assets is None else arguments.absolute(assets)
    facts: dict[str, Any] = {"path": path, **_verdict(path, layout, assets)}
    refusal: errors.CheckpointRefused | None = None
    try:
        facts |= _describe(_open(path, layout, assets), tensors=tensors or as_json)
    except errors.CheckpointRefused as error:
        refusal = error
    if as_json:
        told = {"error": failures.of(refusal).as_value()} if refusal is not None else {}
        output.value(facts | told)
        if refusal is not None:
            raise typer.Exit(refusal.exit_code)
        return
    _print(facts, output)
    if refusal is not None:
        raise refusal


def _open(path: Path, layout: str, assets: Path | None) -> Checkpoint:
    from ckptd.checkpoint import checkpoint as checkpoints

    return checkpoints.open_checkpoint(
        path, layout=layout, assets=assets, within=arguments.ANYWHERE
    )


def _verdict(path: Path, layout: str, assets: Path | None) -> dict[str, Any]:
    """Return what the daemon would say of the folder now.

    Raises:
        CheckpointRefused: there is no such folder, or nobody knows the layout.
    """
    from ckptd.checkpoint import completeness, layouts, listing

    if not path.is_dir():
        _open(path, layout, assets)  # says what is wrong with the path
    files = listing.list_files(path, within=arguments.ANYWHERE)
    facts = completeness.examine(path, files, layout=layout, assets=assets)
    newest_s = max((file.mtime_ns for file in files.files), default=0) / 1e9
    verdict = completeness.verdict(facts, quiet_s=time.time() - newest_s, settle_s=SETTLE_S)
    why: str | None = None
    match verdict:
        case completeness.Complete(doubts=doubts) if doubts:
            why = f"although {'; '.join(doubts)}"
        case completeness.Waiting(why=why):
            pass
        case completeness.Broken(error=error):
            why = str(error)
    return {
        "layout": facts.layout,
        "layout_title": layouts.TITLES.get(facts.layout),
        "layout_reason": facts.reason,
        "verdict": type(verdict).__name__.lower(),
        "verdict_reason": why,
        "ignored_links": files.ignored,
    }


def _describe(source: Checkpoint, *, tensors: bool) -> dict[str, Any]:
    by_dtype: Counter[str] = Counter()
    for tensor in source.tensors.values():
        by_dtype[tensor.spec.dtype.value] += tensor.spec.nbytes
    quantization = _quantization(source)
    facts: dict[str, Any] = {
        "step": source.step,
        "architectures": source.config.get("architectures"),
        "model_type": source.config.get("model_type"),
        "parts": [f"{part.folder}{part.stem}" for part in source.parts],
        "num_tensors": len(source.tensors),
        "num_parameters": _num_parameters(source, quantization),
        "tensor_bytes": source.tensor_bytes,
        "by_dtype": dict(by_dtype.most_common()),
        "shards": {shard.name: stamp.nbytes for shard, stamp in source.stamps.items()},
        "tied": _tied(source),
        "quantization": quantization,
        "footprint": _footprint(source),
        "side_files": [file.relpath for file in source.side_files],
        "left_out": source.left_out,
        "notes": source.notes,
    }
    if tensors:
        facts["tensors"] = [
            {
                "name": name,
                "dtype": tensor.spec.dtype,
                "shape": tensor.spec.shape,
                "nbytes": tensor.spec.nbytes,
                "file": _file(tensor),
            }
            for name, tensor in source.tensors.items()
        ]
    return facts


def _file(tensor: Tensor) -> str:
    """Return the file that holds a tensor, or the first of several and their number."""
    from ckptd.checkpoint import pieces

    files = pieces.files_of(tensor)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return files[0].name + more


def _tied(source: Checkpoint) -> dict[str, Any]:
    """Return which names are one parameter; which of them are equal, only `tie` finds out."""
    from ckptd.models import ties

    specs = {name: tensor.spec for name, tensor in source.tensors.items()}
    try:
        found = ties.find(source.config, specs, path=source.path)
    except errors.StageRefused as error:
        return {"groups": [], "problem": str(error)}
    groups = [
        {
            "source": group.source,
            "source_present": group.source_present,
            "targets": [
                {
                    "name": target.name,
                    "present": target.present,
                    "config": target.flag.value(source.config),
                }
                for target in group.targets
            ],
            "to_compare": group.alike,
            "different": group.unlike,
        }
        for group in found.groups
    ]
    return {"groups": groups, "problem": None}


def _quantization(source: Checkpoint) -> dict[str, Any] | None:
    """Return what is quantized, how, and what `dequantize` would make of it; None where nothing is.

    A format that is not decoded is a `problem`, not a failure of the command.
    """
    from ckptd.pipeline.stages import dequantize
    from ckptd.plan import draft
    from ckptd.quant import configuration

    declared = configuration.declared(source.config)
    facts: dict[str, Any] = {"method": declared.get("quant_method"), "config": declared or None}
    try:
        made = dequantize.plan(
            draft.from_checkpoint(source), dequantize.DequantizeOptions(), _context(source)
        )
    except errors.CheckpointRefused as error:
        return facts | {"problem": str(error)}
    found = dict(made.reports[-1].facts)
    return facts | {"problem": None} | found if found else None


def _num_parameters(source: Checkpoint, quantization: dict[str, Any] | None) -> int:
    """Return the model's parameters; of packed weights, those that they decode to."""
    if quantization is not None and quantization["problem"] is None:
        return int(quantization["num_parameters"])
    return sum(tensor.spec.numel for tensor in source.tensors.values())


def _footprint(source: Checkpoint) -> dict[str, Any]:
    from ckptd.pipeline.stages import footprint
    from ckptd.plan import draft

    options = footprint.FootprintOptions()
    return footprint.measure(draft.from_checkpoint(source), options, _context(source))


def _context(source: Checkpoint) -> StageContext:
    from ckptd.pipeline import devices
    from ckptd.pipeline.stage import StageContext
    from ckptd.quant import stored

    return StageContext(
        source_path=source.path,
        stored=stored.of_checkpoint(source),
        same_content=lambda left, right: None,
        device_bytes=devices.memory_bytes,
    )


def _print(facts: dict[str, Any], output: Output) -> None:
    why = f": {facts['verdict_reason']}" if facts["verdict_reason"] else ""
    shown: dict[str, object] = {
        "checkpoint": facts["path"],
        "layout": _layout_text(facts),
        "verdict": facts["verdict"] + why,
    }
    if "num_tensors" in facts:
        shown |= _printed(facts)
    output.fields(shown)
    if facts.get("tensors"):
        output.data()
        output.table(
            ("TENSOR", "DTYPE", "SHAPE", "BYTES", "FILE"),
            [
                (
                    tensor["name"],
                    tensor["dtype"].value,
                    "x".join(map(str, tensor["shape"])) or "scalar",
                    f"{tensor['nbytes']:,}",
                    tensor["file"],
                )
                for tensor in facts["tensors"]
            ],
            right=("BYTES",),
        )


def _layout_text(facts: dict[str, Any]) -> str:
    title = f": {facts['layout_title']}" if facts["layout_title"] else ""
    return f"{facts['layout']}{title} ({facts['layout_reason']})"


def _model_text(facts: dict[str, Any]) -> str:
    if facts["parts"]:
        return ", ".join(facts["parts"])
    names = ", ".join(facts["architectures"] or ()) or "no class named"
    return f"{names} ({facts['model_type'] or 'no model_type'})"


def _travels_text(facts: dict[str, Any]) -> str | None:
    has_config = facts["layout"] != "peft" and not facts["parts"]
    return ", ".join((*(("config.json",) if has_config else ()), *facts["side_files"])) or None


def _printed(facts: dict[str, Any]) -> dict[str, object]:
    dtypes = ", ".join(f"{units.format_bytes(n)} {dtype}" for dtype, n in facts["by_dtype"].items())
    needs = facts["footprint"]
    quantization = facts["quantization"]
    return {
        "step": facts["step"],
        "model": _model_text(facts),
        "weights": f"{facts['num_tensors']:,} tensors, {facts['num_parameters']:,} parameters in "
        f"{len(facts['shards'])} file{'s' if len(facts['shards']) != 1 else ''}",
        "dtypes": dtypes,
        "tied": _tied_text(facts["tied"]),
        "quantized": _quantized_text(quantization),
        "footprint": f"{units.format_bytes(needs['total_bytes'])} when loaded",
        "largest": "\n".join(
            f"{units.format_bytes(size)} {name}" for name, size in needs["largest"].items()
        ),
        "travels": _travels_text(facts),
        "left out": ", ".join((*facts["left_out"], *facts["ignored_links"])) or None,
        "notes": "\n".join(facts["notes"]) or None,
    }


def _quantized_text(quantization: dict[str, Any] | None) -> str:
    if quantization is None:
        return "no"
    if quantization["problem"]:
        return f"{quantization['method'] or 'yes'}; {quantization['problem']}"
    schemes = [f"{count} weights: {how}" for how, count in quantization["schemes"].items()]
    before, after = quantization["bytes_before"], quantization["bytes_after"]
    made = (
        f"`dequantize` makes {', '.join(quantization['dtype'])}: {units.format_bytes(before)} "
        f"become {units.format_bytes(after)}"
    )
    return "\n".join((quantization["format"], *schemes, made))


def _tied_text(tied: dict[str, Any]) -> str:
    if tied["problem"]:
        return str(tied["problem"])
    lines = []
    for group in tied["groups"]:
        for target in group["targets"]:
            name = target["name"]
            said = f"config says {'tied' if target['config'] else 'apart'}"
            if not target["present"]:
                state = "not in the file"
            elif name in group["different"]:
                state = "in the file, of another dtype or shape"
            elif not group["source_present"]:
                state = "in the file in its place"
            else:
                state = "in the file too, `tie` compares them"
            lines.append(f"{name} = {group['source']}: {state}; {said}")
    return "\n".join(lines) or "nothing"
