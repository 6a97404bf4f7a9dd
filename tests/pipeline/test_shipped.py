"""The definitions that ship, the schema beside them, and the real stages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ckptd.pipeline import definition, registry, schema
from ckptd.pipeline.definition import Definition

PIPELINES_PATH = Path(__file__).parents[2] / "pipelines"
SHIPPED = sorted(PIPELINES_PATH.glob("*.yaml"))


def test_all_are_there() -> None:
    """The definitions that the documents name exist."""
    assert {"publish.yaml", "publish-pr.yaml", "reshard.yaml", "dequantize.yaml"} <= {
        path.name for path in SHIPPED
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_definition_is_valid(path: Path) -> None:
    """Every definition that ships passes its own check, is named after its file, round-trips."""
    found = definition.load_definition(path)
    assert found.pipeline == path.stem
    assert Definition.model_validate(json.loads(json.dumps(found.dump()))) == found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_definition_is_documented(path: Path) -> None:
    """Every key has a comment on its line, above it, or on the first line below it."""
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        if not re.match(r"\s*(- )?\w+:", line) or "#" in line:
            continue
        below = "#" in "".join(lines[number + 1 : number + 2])
        above = number > 0 and lines[number - 1].lstrip().startswith("#")
        assert below or above, f"{path.name}:{number + 1}: {line}"


def test_schema_file_is_in_step() -> None:
    """The schema that ships is what the models say: `python -m ckptd.pipeline.schema` makes it."""
    assert (PIPELINES_PATH / schema.SCHEMA_NAME).read_text("utf-8") == schema.text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_definition_names_the_schema(path: Path) -> None:
    """Editors find the schema by the first line."""
    assert path.read_text("utf-8").startswith(
        f"# yaml-language-server: $schema={schema.SCHEMA_NAME}\n"
    )


def test_schema_documents_every_field() -> None:
    """An editor can show a description for every key of a definition and of every stage."""
    found = schema.json_schema()
    blocks: dict[str, Any] = {"": found} | found["$defs"]
    for name, block in blocks.items():
        for key, field in block.get("properties", {}).items():
            assert "description" in field, f"{name}.{key}"


def test_schema_refers_to_what_is_there() -> None:
    """Every reference of the schema leads somewhere."""
    text = schema.text()
    known = json.loads(text)["$defs"].keys()
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) <= known


def test_schema_takes_units() -> None:
    """An editor does not complain about `5GB`, which every example uses."""
    size = schema.json_schema()["$defs"]["reshard"]["properties"]["max_shard_size"]
    assert "string" in json.dumps(size)


@pytest.mark.parametrize("name", list(registry.STAGES))
def test_every_stage_option_round_trips(name: str) -> None:
    """The options of every stage survive the way to the runner, with defaults and without."""
    needed = {"resize": "{to: 5}", "cast": "{dtype: bf16, keep: ['*norm*']}"}
    text = f"pipeline: p\nstages:\n  - {name}: {needed.get(name, '{}')}\n"
    found = definition.parse_definition(text, "p.yaml")
    sent = json.loads(json.dumps(found.dump()))
    assert Definition.model_validate(sent) == found
    assert definition.pipeline_digest(Definition.model_validate(sent)) == (
        definition.pipeline_digest(found)
    )
