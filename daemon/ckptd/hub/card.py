"""The model card: what is known of a model merged into a README.md, everything else kept.

Pure. Tags are added, metadata is completed where the card has none, and what a trainer wrote that
is nothing to anybody else (the folder of a base model, a template's unfilled places) is corrected.
The front matter is edited as text, so that the body and all other metadata keep every byte. After
the edit the result is parsed again and must be the old metadata plus exactly what was asked for; a
card that cannot be edited this way is refused, never rewritten.

Format: https://huggingface.co/docs/hub/model-cards (YAML between two `---` lines at the top).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptd import errors
from ckptd.hub import front_matter

CARD_NAME = "README.md"
LIBRARY = "transformers"

_SECTION_BEGIN = "<!-- ckptd: what was verified; written anew with each publication -->"
_SECTION_END = "<!-- ckptd: end -->"
_FRONT_MATTER = re.compile(
    r"\A(?P<open>\ufeff?\s*---[ \t]*(?P<eol>\r\n|\n))(?P<yaml>.*?)(?P<close>^---[ \t]*(?:\r?\n|\Z))",
    re.DOTALL | re.MULTILINE,
)
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_BORROWED = ("license", "license_name", "license_link", "pipeline_tag")
"""Metadata that a model takes from the one it was made of, where nobody said otherwise."""
_LICENSE = _BORROWED[:3]
_PLACEHOLDERS = {"licence": "license"}
"""Keys with values that a trainer's template leaves to be filled in, and that say nothing."""
_NO_MODEL_BODY = '("text-generation", model="None"'
_NO_BASE_BODY = "[None](https://huggingface.co/None)"
"""What TRL writes into a card where it knows no repo, or no base model."""
_NO_TITLE = "# Model Card for Model ID\n"
"""The title of PEFT's template."""
_MAX_VALUES = 200_000
"""Values of a front matter, aliases written out; the results of hundreds of tasks have 20,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a model that its card may lack.

    `base_model` is the one it was made of, as the Hub knows it, and `relation` how (adapter,
    finetune). `borrowed` are keys and values of that model's card.
    """

    base_model: str | None = None
    relation: str | None = None
    borrowed: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self.base_model or self.relation or self.borrowed)


NOTHING = Facts()


def is_model_id(text: object) -> bool:
    """Return whether `text` may be the name of a model on the Hub, and is no path."""
    return isinstance(text, str) and _MODEL_ID.fullmatch(text) is not None


def borrowed(text: str) -> tuple[tuple[str, str], ...]:
    """Return what a model made of the one with this card may take from it; nothing if unreadable."""
    try:
        data = _metadata(text)
    except errors.HubRejected:
        return ()
    return tuple((key, data[key]) for key in _BORROWED if isinstance(data.get(key), str))


def merge(
    text: str | None,
    *,
    tags: Sequence[str],
    library: str = LIBRARY,
    facts: Facts = NOTHING,
    name: str = "",
) -> str:
    """Return the card with `tags` added to its tags, and `library_name` and `facts` where it has none.

    Tags already there keep their place and are not repeated. `text` None makes a short new card
    called `name`. Calling it on its own result changes nothing; nothing to say changes nothing
    either.

    Raises:
        errors.HubRejected: the front matter is not YAML, not a mapping, or cannot be edited safely.
    """
    if text is None:
        body = f"\n# {name}\n\n{_body(facts)}Published by ckptd.\n" if name else ""
        return merge("---\n---\n" + body, tags=tags, library=library, facts=facts)
    if not tags and not facts:
        return text
    match = _FRONT_MATTER.match(text)
    if match is None:
        return merge(f"---\n---\n{text}", tags=tags, library=library, facts=facts)
    eol, before = match["eol"], match["yaml"].replace("\r\n", "\n")
    old = _load(before)
    wanted = _wanted(old, tags=tags, library=library, facts=facts)
    front = _edited(before, old, wanted, base_model=facts.base_model)
    if front == before:
        return text
    return match["open"] + front.replace("\n", eol) + match["close"] + text[match.end() :]


def filled(text: str, *, repo_id: str | None, facts: Facts) -> str:
    """Return a trainer's card with the names that its template had no value for."""
    if repo_id is not None:
        text = text.replace(_NO_MODEL_BODY, _NO_MODEL_BODY.replace("None", repo_id))
        name = repo_id.rpartition("/")[2]
        text = text.replace(_NO_TITLE, _NO_TITLE.replace("Model ID", name))
    if facts.base_model is not None:
        text = text.replace(_NO_BASE_BODY, _NO_BASE_BODY.replace("None", facts.base_model))
    return text


def with_section(text: str, section: str) -> str:
    """Return the card with ckptd's own section at its end, or in the place of an earlier one.

    Comments mark where it begins and ends; everything outside of them keeps every byte. Calling it
    on its own result with the same section changes nothing.
    """
    own = f"{_SECTION_BEGIN}\n{section.strip()}\n{_SECTION_END}"
    begin, end = text.find(_SECTION_BEGIN), text.find(_SECTION_END)
    if 0 <= begin < end:
        return text[:begin] + own + text[end + len(_SECTION_END) :]
    return f"{text.rstrip()}\n\n{own}\n"


def over(own: dict[str, str], base: dict[str, str]) -> dict[str, str]:
    """Return `own` metadata, and of `base` what it lacks; a license is of one of the two, whole."""
    has_license = any(key in own for key in _LICENSE)
    return {k: v for k, v in base.items() if not (has_license and k in _LICENSE)} | own


def _body(facts: Facts) -> str:
    if facts.base_model is None:
        return ""
    made = "An adapter of" if facts.relation == "adapter" else "Made from"
    return f"{made} `{facts.base_model}`.\n\n"


def _metadata(text: str) -> dict[str, Any]:
    match = _FRONT_MATTER.match(text)
    return {} if match is None else _load(match["yaml"].replace("\r\n", "\n"))


def _load(front: str) -> dict[str, Any]:
    """Return the front matter as plain values."""
    try:
        data = front_matter.load(front)
    except front_matter.BROKEN as exc:
        raise _refused(f"its front matter is not valid YAML: {_one_line(exc)}") from exc
    _require_bounded(data)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise _refused(f"its front matter is a {type(data).__name__}, not a mapping")
    return data


def _tags_of(data: dict[str, Any]) -> list[Any]:
    tags = data.get("tags")
    if tags is None:
        return []
    return tags if isinstance(tags, list) else [tags]


def _wanted(
    old: dict[str, Any], *, tags: Sequence[str], library: str, facts: Facts
) -> dict[str, Any]:
    """Return the metadata that the card is to have."""
    new = {key: value for key, value in old.items() if _PLACEHOLDERS.get(key) != value}
    new["library_name"] = old.get("library_name") or library
    if not _names_models(old.get("base_model")):
        new.pop("base_model", None)
        if facts.base_model is not None:
            new["base_model"] = facts.base_model
    if facts.relation is not None and new.get("base_model"):
        new["base_model_relation"] = old.get("base_model_relation") or facts.relation
    has_license = any(old.get(key) for key in _LICENSE)
    new |= {
        key: value
        for key, value in facts.borrowed
        if not old.get(key) and not (has_license and key in _LICENSE)
    }
    had = [tag for _, tag in _corrected(_tags_of(old), facts.base_model) if tag is not None]
    added = [tag for tag in dict.fromkeys(tags) if tag not in had]
    if had != _tags_of(old) or added:
        new["tags"] = [*had, *added]
        if not new["tags"]:
            del new["tags"]
    return new


def _names_models(value: object) -> bool:
    """Whether this is a base_model that the Hub takes."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(is_model_id(one) for one in values)


def _corrected(tags: list[Any], base_model: str | None) -> list[tuple[Any, Any]]:
    """Return each tag and what it is to be; None for one that is to go.

    A tag that names a base model by its folder names it as the Hub does, where that is known.
    """
    pairs: list[tuple[Any, Any]] = []
    for tag in tags:
        start, _, model = str(tag).rpartition(":")
        if str(tag).startswith("base_model:") and not is_model_id(model):
            heir = None if base_model is None else f"{start}:{base_model}"
            pairs.append((tag, None if heir in tags else heir))
        else:
            pairs.append((tag, tag))
    return pairs


def _edited(
    front: str, old: dict[str, Any], wanted: dict[str, Any], *, base_model: str | None
) -> str:
    """Return the front matter with the values `wanted`.

    Raises:
        errors.HubRejected: the result is not the old metadata plus exactly what was asked for.
    """
    try:
        for key in old.keys() - wanted.keys():
            front = front_matter.drop(front, str(key))
        for key, value in wanted.items():
            if key != "tags" and _comparable({key: old.get(key)}) != _comparable({key: value}):
                front = front_matter.put(front, key, value)
        tags = _tags_of(old)
        for tag, heir in _corrected(tags, base_model):
            if tag != heir and "tags" in wanted:
                front = front_matter.replace(front, "tags", tag, heir)
                tags = _tags_of(_load(front))
        added = wanted["tags"][len(tags) :] if isinstance(wanted.get("tags"), list) else []
        front = front_matter.add(front, "tags", added)
    except front_matter.Uneditable as exc:
        raise _refused(str(exc)) from exc
    if _comparable(_load(front)) != _comparable(wanted):
        raise _refused("it is written in a way that cannot be edited without rewriting it")
    return front


def _comparable(data: dict[str, Any]) -> dict[str, str]:
    """Return the values as text, in which a metric that is not a number equals itself.

    One tag alone and a list of one are the same.
    """
    values = {str(key): repr(value) for key, value in data.items()}
    return values | ({"tags": repr(_tags_of(data))} if data.get("tags") is not None else {})


def _refused(why: str) -> errors.HubRejected:
    return errors.HubRejected(
        f"{CARD_NAME}: {why}",
        hint="correct the card on the Hub, or leave `tags` out of the definition's push",
    )


def _require_bounded(data: Any) -> None:
    """Refuse aliases that make a few lines into millions of values, or a value hold itself."""
    left = _MAX_VALUES
    waiting = [data]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            raise _refused(f"its front matter has more than {_MAX_VALUES:,} values")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]
