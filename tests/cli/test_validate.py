"""`ckptd validate`: every problem of every file, with its place."""

from __future__ import annotations

from pathlib import Path

from ckptd.pipeline import shipped
from tests.cli.conftest import Call


def test_shipped_definitions_are_valid(ckptd: Call) -> None:
    """Everything that ships passes, by name."""
    result = ckptd("validate", *shipped.names())
    assert result.code == 0
    assert result.out.count(": OK: ") == len(shipped.names())


def test_every_problem(ckptd: Call, definition: Path) -> None:
    """All problems of all files come on standard output, one a line, like a linter's."""
    bad = Path("bad.yaml")
    bad.write_text("pipeline: BAD\nstages:\n  - tie\n  - tie\nwrong: 1\n")
    result = ckptd("validate", definition, bad)
    assert result.code == 3
    problems = [line for line in result.out.splitlines() if line.startswith("bad.yaml:")]
    assert len(problems) >= 3
    assert f"{definition}: OK" in result.out


def test_json(ckptd: Call, definition: Path) -> None:
    """The JSON value lists the files; problems stand in `error` too."""
    Path("bad.yaml").write_text("pipeline: x\n")
    result = ckptd("validate", definition, "bad.yaml", "--json")
    assert result.code == 3
    assert [file["ok"] for file in result.value["files"]] == [True, False]
    assert result.value["error"]["problems"][0]["path"] == "bad.yaml"


def test_folder(ckptd: Call, definition: Path) -> None:
    """A folder stands for the definitions in it; an empty one is a mistake."""
    assert ckptd("validate", definition.parent).code == 0
    Path("empty").mkdir()
    assert ckptd("validate", "empty").code == 2


def test_schema(ckptd: Call) -> None:
    """The hidden command prints the schema that ships."""
    out = ckptd("schema").out
    assert out == (shipped.folder("pipelines") / "pipeline.schema.json").read_text("utf-8")
