"""The JSON schema of definition files, for editors.

Made from the same models that read definitions, with the options of every stage of the registry,
so that an editor completes and checks what ckptd takes. The file that ships
(`pipelines/pipeline.schema.json`) is `python -m ckptd.pipeline.schema > FILE`; a test keeps it in
step. Checks across entries (order of stages, names the Hub refuses) are only made by ckptd itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from ckptd.pipeline import definition
from ckptd.pipeline.complaints import StageKind

SCHEMA_NAME = "pipeline.schema.json"


def json_schema(stages: Mapping[str, StageKind] | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a definition file."""
    known = definition.known_stages(stages)
    schema = definition.Definition.model_json_schema()
    definitions = schema["$defs"]
    choices: dict[str, Any] = {}
    bare = []
    for name, stage in known.items():
        options = stage.options.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for inner, inner_schema in options.pop("$defs", {}).items():
            definitions[f"{name}.{inner}"] = inner_schema
        definitions[name] = options
        choices[name] = {"$ref": f"#/$defs/{name}"}
        if not options.get("required"):
            choices[name] = {"anyOf": [choices[name], {"type": "null"}]}
            bare.append(name)
    definitions["StageCall"] = {
        "title": "Stage",
        "description": "The name of a stage, or its name with options.",
        "anyOf": [
            {"enum": bare},
            {
                "type": "object",
                "properties": choices,
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        ],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "ckptd pipeline definition",
    }


def text(stages: Mapping[str, StageKind] | None = None) -> str:
    """Return the schema as it stands in the file that ships."""
    return json.dumps(json_schema(stages), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
