"""Arguments that several commands share: their declarations, and what they stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ckptd.pipeline.definition import Definition
    from ckptd.settings import Settings

ANYWHERE = Path("/")
"""How far links may lead from a checkpoint that a person named: a model cache links to blobs."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
CheckpointFolder = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of one checkpoint; never written to.")
]
Pipeline = Annotated[
    str,
    typer.Option(
        "--pipeline",
        "-p",
        metavar="PIPELINE",
        help="Definition file, or the name of one that ships: publish, publish-pr, reshard.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="STAGE.OPTION=VALUE",
        help="Replace one option of one stage; may be given several times.",
    ),
]
Assets = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with config.json, tokenizer and so on, where the checkpoint has none.",
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="NAME",
        help="What {run} stands for. Default: the folder that holds the checkpoint.",
    ),
]
LayoutName = Annotated[
    str, typer.Option("--layout", metavar="NAME", help="auto, or one that `ckptd inspect` names.")
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        metavar="FILE",
        help="Settings file. Default: $CKPTD_SETTINGS, else ckptd.yaml in the configuration folder.",
    ),
]
StateFolder = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="State folder of the daemon. Default: the one of the settings.",
    ),
]
PipelinesFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of definition files. Default: the one of the settings."
    ),
]


def examples(*lines: str) -> str:
    """Return the end of a command's help, one example a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def absolute(path: Path) -> Path:
    """Return `path` from the root on, with `.` and `..` gone and links kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow links


def definition(pipeline: str, sets: Sequence[str] | None, assets: Path | None) -> Definition:
    """Return the definition that `-p`, `--set` and `--assets` name together.

    Raises:
        UsageError: no such shipped definition, or a `--set` that does not fit.
        DefinitionError: the file cannot be read or is invalid.
    """
    from ckptd.pipeline import definition as definitions
    from ckptd.pipeline import overrides, shipped

    found = definitions.load_definition(shipped.definition_path(pipeline))
    found = overrides.apply(found, sets or ())
    if assets is not None:
        found = found.model_copy(update={"assets": absolute(assets)})
    return found


def settings(
    path: Path | None, state_path: Path | None = None, pipelines_path: Path | None = None
) -> Settings:
    """Return the settings; the two folders are the command line's word on them.

    Raises:
        SettingsError: see `ckptd.settings.load`.
    """
    from ckptd import settings as all_settings

    given = {"state_dir": state_path, "pipelines_dir": pipelines_path}
    return all_settings.load(
        path, overrides={name: absolute(to) for name, to in given.items() if to is not None}
    )
