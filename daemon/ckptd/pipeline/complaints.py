"""What is wrong with the list of stages, told so that pydantic places it with everything else.

Pydantic reports all that is wrong with a model at once, each with its place. Checks that look at
several entries (order, repeats) or that choose a model by name (options of a stage) are made here
and raised as pydantic errors with places of their own, so that nothing hides anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from ckptd.pipeline import locate


class StageKind(Protocol):
    """What a definition needs to know of a stage."""

    @property
    def name(self) -> str:
        """The word in the file."""

    @property
    def options(self) -> type[BaseModel]:
        """The model of its options."""

    @property
    def rank(self) -> int | None:
        """Its place in the order: stages of a lower rank must come before it; None: anywhere."""

    @property
    def repeatable(self) -> bool:
        """Whether a definition may have it more than once."""


def stage_entry(entry: object, stages: Mapping[str, StageKind]) -> tuple[str, dict[str, Any]]:
    """Return the stage that one item of `stages` names, and its options as they are written.

    Raises:
        ValidationError: not a name or a name with options, or no such stage.
    """
    loc: locate.Loc = ()
    options: object = None
    match entry:
        case str():
            name = entry
        case dict() if len(entry) == 1:
            [(name, options)] = entry.items()
            loc = (str(name),)
        case dict() if len(entry) > 1:
            listed = ", ".join(map(str, entry))
            raise invalid([((), f"one stage an item: begin each of {listed} with its own '- '")])
        case _:
            raise invalid([((), "must be the name of a stage, or a name with options")])
    if name not in stages:
        text = locate.unknown("stage", str(name), stages)
        raise invalid([(loc, text)], kind="unknown_stage", input_value=name)
    if options is not None and not isinstance(options, dict):
        example = next(iter(stages[name].options.model_fields), "option")
        text = f"options must be a mapping, such as {name}: {{{example}: ...}}"
        raise invalid([(loc, text)], input_value=options)
    return name, options or {}


def stage_order(entries: object, stages: Mapping[str, StageKind]) -> list[tuple[locate.Loc, str]]:
    """Return what is wrong with the order of the known stages among `entries`, with places."""
    if not isinstance(entries, list):
        return []
    names = [_name_of(entry) for entry in entries]
    wrong: list[tuple[locate.Loc, str]] = []
    for position, name in enumerate(names):
        if name not in stages:
            continue
        stage = stages[name]
        if name in names[:position] and not stage.repeatable:
            wrong.append(((position,), f"{name} is there twice: give it once"))
            continue
        later = [other for other in names[position + 1 :] if other in stages]
        late = [other for other in later if _precedes(stages[other], stage)]
        if late:
            listed = ", ".join(dict.fromkeys(late))
            wrong.append(((position,), f"{name} cannot work before {listed}: put it after"))
    return wrong


def _precedes(one: StageKind, other: StageKind) -> bool:
    return one.rank is not None and other.rank is not None and one.rank < other.rank


def refuse_repeats(texts: Sequence[str], key: str) -> None:
    """Pass if no text is there twice.

    Raises:
        ValidationError: names each repeat, at `key` of its list item.
    """
    repeats = [
        ((position, key), f"{text!r} is there twice")
        for position, text in enumerate(texts)
        if text in texts[:position]
    ]
    if repeats:
        raise invalid(repeats)


def invalid(
    found: Sequence[tuple[locate.Loc, str]], *, kind: str = "invalid", input_value: object = None
) -> ValidationError:
    """Return the pydantic error that says each text at its place."""
    return ValidationError.from_exception_data(
        "definition", [_line(kind, loc, text, input_value) for loc, text in found]
    )


def under(
    prefix: locate.Loc,
    error: ValidationError,
    *,
    more: Sequence[tuple[locate.Loc, str]] = (),
) -> ValidationError:
    """Return `error` with every place moved below `prefix`, and `more` added."""
    lines = [
        _line(detail["type"], (*prefix, *detail["loc"]), detail["msg"], detail["input"])
        for detail in error.errors()
    ]
    lines += [_line("invalid", loc, text, None) for loc, text in more]
    return ValidationError.from_exception_data("definition", lines)


def _line(kind: str, loc: locate.Loc, text: str, value: object) -> InitErrorDetails:
    # The text goes in as a value: in a template, braces would be taken for fields.
    error = PydanticCustomError(kind, "{text}", {"text": text})
    return InitErrorDetails(type=error, loc=loc, input=value)


def _name_of(entry: object) -> str:
    if isinstance(entry, dict) and len(entry) == 1:
        return str(next(iter(entry)))
    return entry if isinstance(entry, str) else ""
