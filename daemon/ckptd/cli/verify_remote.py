"""`ckptd verify-remote`: is a published model what was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckptd import errors, units
from ckptd.cli import arguments
from ckptd.cli.arguments import Json, SettingsFile
from ckptd.cli.output import Output

if TYPE_CHECKING:
    from ckptd.hub.audit import Audit

EXIT_DIFFERS = 5
"""A check failed."""


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="verify-remote",
        short_help="Compare a published model with its own ckptd.json.",
        epilog=arguments.examples(
            "ckptd verify-remote acme/llama-sft",
            "ckptd verify-remote acme/llama-sft@step-4000 --deep",
        ),
    )(verify_remote)


def verify_remote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="REPO[@REV]", help="Model repo, with a branch, tag or commit; else main."
        ),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Download every file and hash it, large ones too.")
    ] = False,
    settings: SettingsFile = None,
    as_json: Json = False,
) -> int:
    """Compare a published model with its own ckptd.json; exit code 5 where they differ.

    Names, sizes and sha256 are those of the Hub's tree; small files are read, and with --deep all.
    """
    import anyio

    from ckptd.hub import audit
    from ckptd.hub.client import HubClient

    output = Output(as_json=as_json)
    repo_id, revision = _parts(model)
    endpoint = arguments.settings(settings).hub_endpoint

    def begun(name: str, nbytes: int) -> None:
        if deep:
            output.talk(f"reading {name}, {units.format_bytes(nbytes)}")

    async def run() -> Audit:
        client = HubClient(endpoint=endpoint)
        return await audit.audit(client, repo_id, revision, deep=deep, begun=begun)

    found = anyio.run(run)
    _tell(found, revision, output)
    return EXIT_DIFFERS if found.differences else 0


def _parts(model: str) -> tuple[str, str]:
    repo_id, at, revision = model.partition("@")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")) or (at and not revision):
        raise errors.UsageError(
            f"{model!r} names no model", hint="write OWNER/NAME or OWNER/NAME@REVISION"
        )
    return repo_id, revision or "main"


def _tell(found: Audit, revision: str, output: Output) -> None:
    record = found.record
    if output.as_json:
        output.value(
            {
                "ok": not found.differences,
                "repo_id": found.repo_id,
                "revision": revision,
                "commit": found.commit,
                "ckptd": record.ckptd,
                "source": record.source,
                "pipeline": record.pipeline,
                "files": record.files,
                "has_side_files": record.has_side_files,
                "hashed_bytes": found.hashed_bytes,
                "differences": found.differences,
            }
        )
        return
    size = units.format_bytes(sum(file.nbytes for file in record.files))
    output.fields(
        {
            "model": f"{found.repo_id}@{revision}",
            "commit": found.commit,
            "made by": f"ckptd {record.ckptd}, pipeline {record.pipeline.get('name')} "
            f"({str(record.pipeline.get('digest'))[:12]})",
            "from": f"{record.source.get('run')}/{record.source.get('name')}, "
            f"step {record.source.get('step')}",
            "content": record.source.get("digest"),
            "files": f"{len(record.files)} recorded, {size}; "
            f"{units.format_bytes(found.hashed_bytes)} read and hashed",
        }
    )
    if not record.has_side_files:
        output.talk("its record names weights alone: other files were not compared")
    for difference in found.differences:
        output.data(f"differs: {difference}")
    if not found.differences:
        output.data("every recorded file is as it was made")
