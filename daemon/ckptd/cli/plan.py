"""`ckptd plan`: what `run` would do with a checkpoint, from headers alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from ckptd import units
from ckptd.cli import arguments
from ckptd.cli.arguments import (
    Assets,
    CheckpointFolder,
    Json,
    LayoutName,
    Pipeline,
    RunName,
    Sets,
    SettingsFile,
)
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from ckptd.checkpoint.checkpoint import Checkpoint
    from ckptd.pipeline.definition import Definition, Push
    from ckptd.plan.plan import Plan, ShardPlan

_UNKNOWN_DIGEST = "0c4b7d15ae92"
"""Stands for the content digest while names are checked; shown as {digest}."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Show what `run` would do, from headers alone.",
        epilog=arguments.examples(
            "ckptd plan /runs/llama-sft/checkpoint-500 -p publish.yaml",
            "ckptd plan ./model -p reshard --set reshard.max_shard_size=2GB",
            "ckptd plan ./model -p publish --json",
        ),
    )(plan)


def plan(
    checkpoint: CheckpointFolder,
    pipeline: Pipeline,
    sets: Sets = None,
    assets: Assets = None,
    run: RunName = None,
    layout: LayoutName = "auto",
    settings: SettingsFile = None,
    as_json: Json = False,
) -> None:
    """Show stages, shards, bytes, peak memory and where it is pushed; reads no tensor byte."""
    from ckptd.checkpoint import checkpoint as checkpoints
    from ckptd.pipeline import bases, compose, origins

    wanted = arguments.definition(pipeline, sets, assets)
    limits = arguments.settings(settings)
    path = arguments.absolute(checkpoint)
    source = checkpoints.open_checkpoint(
        path, layout=layout, assets=wanted.assets, within=arguments.ANYWHERE
    )
    endpoint = limits.hub_endpoint
    place = bases.locate(wanted.stages, source, beside=path, endpoint=endpoint)
    origin = origins.of(source, beside=path, place=place)
    kind = origins.model_type(wanted.push, source, origin, endpoint=endpoint)
    push = _target(wanted, source, run or path.parent.name, kind)
    base = None if place is None else bases.open_base(place, endpoint=endpoint)
    made = compose.from_headers(source, wanted.stages, base=base)
    facts = _facts(source, wanted, made, push)
    from ckptd.runner import memory

    facts["peak_bytes"] = memory.planned_peak_bytes(
        made,
        byte_budget=limits.byte_budget,
        num_threads=limits.threads,
        push=push is not None,
    )
    output = Output(as_json=as_json)
    if as_json:
        output.value(facts)
    else:
        _print(facts, output)


def _target(
    wanted: Definition, source: Checkpoint, run: str, model_type: str | None
) -> Push | None:
    """Return where it would be pushed, with `{digest}` left open: knowing it reads every byte.

    Raises:
        CheckpointUnsupported: a placeholder has no value for this checkpoint.
    """
    from ckptd.pipeline import target

    if wanted.push is None:
        return None
    resolved = target.resolve(
        wanted.push, source, run=run, digest=_UNKNOWN_DIGEST, model_type=model_type
    )
    opened = {name: _opened(value) for name, value in resolved.model_dump().items()}
    return resolved.model_copy(update=opened)


def _opened(value: Any) -> Any:
    if isinstance(value, list):
        return [_opened(item) for item in value]
    return value.replace(_UNKNOWN_DIGEST, "{digest}") if isinstance(value, str) else value


def _facts(source: Checkpoint, wanted: Definition, made: Plan, push: Push | None) -> dict[str, Any]:
    from ckptd.pipeline import target

    pushed = None
    if push is not None:
        pushed = {**push.model_dump(mode="json"), "target": target.describe(push)}
    return {
        "checkpoint": source.path,
        "layout": source.layout,
        "step": source.step,
        "pipeline": wanted.pipeline,
        "device": wanted.device,
        "stages": [dataclasses.asdict(report) for report in made.reports],
        "undecided": _undecided(source, wanted),
        "shards": [_shard(shard) for shard in made.shards],
        "num_source_files": len(source.stamps),
        "source_bytes": source.tensor_bytes,
        "read_bytes": made.read_bytes,
        "copied_bytes": made.tensor_bytes - made.computed_bytes,
        "computed_bytes": made.computed_bytes,
        "output_bytes": made.output_bytes,
        "num_parameters": made.num_parameters,
        "needs_torch": made.needs_torch,
        "config": [] if made.config is None else ["config.json"],
        "side_files": [file.relpath for file in made.side_files],
        "left_out": source.left_out,
        "notes": source.notes,
        "hold_push": made.hold_push,
        "push": pushed,
    }


def _undecided(source: Checkpoint, wanted: Definition) -> list[str]:
    """Return the pairs whose contents `tie` will compare, which may change what is planned."""
    from ckptd import errors
    from ckptd.models import ties

    if not any(call.name == "tie" for call in wanted.stages):
        return []
    specs = {name: tensor.spec for name, tensor in source.tensors.items()}
    try:
        pairs = ties.find(source.config, specs, path=source.path).pairs
    except errors.StageRefused:
        return []
    return [f"{left} = {right}?" for left, right in pairs]


def _shard(shard: ShardPlan) -> dict[str, Any]:
    from ckptd.plan.plan import Computed

    computed = sum(part.nbytes for part in shard.segments if isinstance(part, Computed))
    tensor_bytes = sum(spec.nbytes for spec in shard.tensors)
    return {
        "name": shard.name,
        "nbytes": shard.nbytes,
        "num_tensors": len(shard.tensors),
        "copied_bytes": tensor_bytes - computed,
        "computed_bytes": computed,
    }


def _print(facts: dict[str, Any], output: Output) -> None:
    size = units.format_bytes
    step = "" if facts["step"] is None else f", step {facts['step']}"
    computed = facts["computed_bytes"]
    shown: dict[str, object] = {
        "checkpoint": f"{facts['checkpoint']} ({facts['layout']}{step})",
        "pipeline": facts["pipeline"],
    }
    for stage in facts["stages"]:
        warnings = [f"warning: {warning}" for warning in stage["warnings"]]
        shown[f"  {stage['stage']}"] = "\n".join((stage["summary"], *warnings))
    shown |= {
        "undecided": "\n".join(f"{pair} compared when it runs" for pair in facts["undecided"])
        or None,
        "reads": f"{size(facts['read_bytes'])}; the source holds {size(facts['source_bytes'])} in "
        f"{_files(facts['num_source_files'])}",
        "copies": size(facts["copied_bytes"]),
        "computes": f"{size(computed)} on {facts['device']}" if computed else "nothing, no torch",
        "writes": f"{size(facts['output_bytes'])} in {_files(len(facts['shards']))}",
        "side files": ", ".join((*facts["config"], *facts["side_files"])),
        "left out": ", ".join(facts["left_out"]) or None,
        "peak memory": f"at most about {size(facts['peak_bytes'])}",
        "pushes": _push_text(facts["push"]),
        "but": facts["hold_push"] and f"not pushed: {facts['hold_push']}",
        "notes": "\n".join(facts["notes"]) or None,
    }
    output.fields(shown)
    output.data()
    output.table(
        ("SHARD", "BYTES", "TENSORS", "COPIED", "COMPUTED"),
        [
            (
                shard["name"],
                f"{shard['nbytes']:,}",
                f"{shard['num_tensors']:,}",
                f"{shard['copied_bytes']:,}",
                f"{shard['computed_bytes']:,}",
            )
            for shard in facts["shards"]
        ],
        right=("BYTES", "TENSORS", "COPIED", "COMPUTED"),
    )


def _push_text(push: dict[str, Any] | None) -> str:
    if push is None:
        return "nothing"
    lines = [f"to {push['target']}: {push['commit_message']!r}"]
    if push["create_pr"]:
        lines[0] = f"a pull request to {push['repo_id']}: {push['commit_message']!r}"
    if push["git_tag"]:
        lines.append(f"git tag {push['git_tag']}")
    if push["tags"]:
        lines.append(f"card tags {', '.join(push['tags'])}")
    return "\n".join(lines)


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"
