"""The command `ckptd doctor`: facts to checks to a report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckptd import errors
from ckptd.cli import arguments
from ckptd.cli.arguments import Json, PipelinesFolder, SettingsFile, StateFolder
from ckptd.cli.output import Output, plain

if TYPE_CHECKING:
    from ckptd.cli.doctor.finding import Finding
    from ckptd.pipeline.definition import Definition
    from ckptd.settings import Settings

EXIT_FAILED = 5
"""A check failed."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        short_help="Say what on this node would not work, and how to mend it.",
        epilog=arguments.examples(
            "ckptd doctor",
            "ckptd doctor --settings /etc/ckptd/ckptd.yaml",
            "ckptd doctor --no-hub --json",
        ),
    )(doctor)


def doctor(
    settings: SettingsFile = None,
    state_dir: StateFolder = None,
    pipelines_dir: PipelinesFolder = None,
    hub: Annotated[bool, typer.Option(help="Ask the Hub; --no-hub leaves it in peace.")] = True,
    as_json: Json = False,
) -> int:
    """Check this node for the daemon that the settings describe; exit code 5 where a check fails.

    Run it as the user that the daemon runs as: most of what can be wrong are permissions.
    """
    output = Output(as_json=as_json)
    found = arguments.settings(settings, state_dir, pipelines_dir)
    findings = examine(found, ask_hub=hub)
    bad = [finding for finding in findings if finding.grade.value == "failed"]
    if as_json:
        output.value({"ok": not bad, "findings": plain(findings)})
    else:
        _tell(findings, output)
    return EXIT_FAILED if bad else 0


def examine(settings: Settings, *, ask_hub: bool) -> list[Finding]:
    """Return what every check says; reads the node and, with `ask_hub`, the Hub."""
    from ckptd.cli.doctor import device, facts, finding, node, places
    from ckptd.settings import FIXED_BYTES
    from ckptd.telemetry import node as machine

    good, problems = _definitions(settings.pipelines_dir)
    patterns = sorted({watch.path for definition in good for watch in definition.watch})
    roots = [facts.root(pattern) for pattern in patterns]
    state = facts.state(settings.state_dir)
    torch = facts.torch()
    limits = facts.inotify()
    local = [p for p, root in zip(patterns, roots, strict=True) if root.network is None]
    folders = {pattern: facts.watched_folders(pattern) for pattern in local}
    asked = {definition.device for definition in good}
    found = [
        node.user(os.geteuid()),
        *places.definitions(str(settings.pipelines_dir), len(good), problems),
        *[line for root in roots for line in places.root(root)],
        *places.state(state),
        *places.cloning(roots, state),
        places.disk(
            state,
            min_free_bytes=settings.min_free_bytes,
            largest_bytes=max((root.largest_bytes for root in roots), default=0),
        ),
        *node.inotify(limits, folders),
        node.open_files(facts.open_files()),
        node.memory(
            machine.memory_bytes(),
            slots=settings.slots,
            runner_bytes=settings.runner_memory,
            needed_bytes=settings.byte_budget + FIXED_BYTES,
        ),
        device.torch(torch, computes=any(_computes(definition) for definition in good)),
        *device.gpu(torch, files=machine.accelerators(), asked=asked),
        node.bytecode(os.environ, facts.cached_bytecode()),
        *node.unit(facts.unit(), runner_bytes=settings.runner_memory, slots=settings.slots),
    ]
    return found + (_hub(settings, good) if ask_hub else [finding.skipped("hub", "not asked")])


def _hub(settings: Settings, good: list[Definition]) -> list[Finding]:
    from ckptd.cli.doctor import facts, hub
    from ckptd.cli.serve import PUBLIC_HUB

    repos = [definition.push.repo_id for definition in good if definition.push is not None]
    targets = {repo.partition("/")[0] for repo in repos}
    endpoint = settings.hub_endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC_HUB
    token, reached = facts.hub(endpoint.rstrip("/"))
    return [
        hub.token(token, pushes=bool(repos)),
        hub.reached(reached, pushes=bool(repos)),
        *hub.account(reached, targets={name for name in targets if "{" not in name}),
        hub.clock(reached),
    ]


def _definitions(folder: Path) -> tuple[list[Definition], dict[str, str]]:
    """Return the definitions that can be used, and what is wrong with the other files."""
    from ckptd.pipeline import definition, shipped

    good, problems = [], {}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix in shipped.SUFFIXES:
            try:
                good.append(definition.load_definition(path))
            except errors.DefinitionError as error:
                problems[str(path)] = f"{len(error.problems)} problems, first {error.problems[0]}"
    return good, problems


def _computes(definition: Definition) -> bool:
    from ckptd.pipeline import registry

    return any(registry.STAGES[call.name].computes for call in definition.stages)


def _tell(findings: list[Finding], output: Output) -> None:
    output.table(
        ("", "CHECK", "FOUND"),
        [(finding.grade.value, finding.check, finding.what) for finding in findings],
    )
    hints = [finding for finding in findings if finding.hint is not None]
    if hints:
        output.data()
    for finding in hints:
        output.data(f"{finding.check}: {finding.hint}")
