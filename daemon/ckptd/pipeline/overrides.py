"""`--set stage.option=value`: a definition with single options replaced on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ckptd import errors
from ckptd.pipeline import definition, locate
from ckptd.pipeline.complaints import StageKind
from ckptd.pipeline.definition import Definition


def apply(
    base: Definition, settings: Sequence[str], *, stages: Mapping[str, StageKind] | None = None
) -> Definition:
    """Return `base` with every `stage.option=value` of `settings` set; later ones win.

    Values are read as in a definition file: `64`, `true`, `5GB`, `[a, b]`.

    Raises:
        UsageError: not of that form, a stage that the definition does not have, an unknown option,
            or a value the option does not take.
    """
    dump = base.dump()
    for setting in settings:
        name, option, value = _split(setting)
        called = [call for call in dump["stages"] if name in call]
        if not called:
            in_use = [call.name for call in base.stages]
            raise errors.UsageError(
                f"--set {setting}: {locate.unknown('stage', name, in_use)}",
                hint="only stages of the definition have options to set",
            )
        called[0][name][option] = value
        try:
            base = Definition.model_validate(
                dump, context={"stages": definition.known_stages(stages)}
            )
        except ValidationError as exc:
            raise errors.UsageError(f"--set {setting}: {_text(exc, name, stages)}") from exc
    return base


def _split(setting: str) -> tuple[str, str, Any]:
    place, equals, text = setting.partition("=")
    name, dot, option = place.strip().partition(".")
    if not equals or not dot or not option:
        raise errors.UsageError(f"--set {setting}: write stage.option=value")
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = locate.MAX_DEPTH
    try:
        return name, option, yaml.load(text)
    except (YAMLError, ValueError, LookupError) as exc:  # the others: `2024-02-31`, `!!int x`
        raise errors.UsageError(
            f"--set {setting}: the value cannot be read",
            hint="values are YAML: patterns are quoted, and a list of them is "
            f"""--set '{name}.{option}=["*norm*"]'""",
        ) from exc


def _text(error: ValidationError, name: str, stages: Mapping[str, StageKind] | None) -> str:
    detail = error.errors()[0]
    if detail["type"] == "extra_forbidden":
        known = definition.known_stages(stages)[name].options.model_fields
        return locate.unknown("option", str(detail["loc"][-1]), known)
    return locate.explain(detail)
