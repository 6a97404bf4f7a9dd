"""A head that was trained with an adapter and that the base does not have: a classifier, a reward.

PEFT saves it whole (`modules_to_save`, by itself for its task types), beside an adapter of a model
that was loaded for another purpose than its files were written for. The merged model is then of
that other class: its config says so, the base's own head, which the class does not have, stays out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from ckptd.models import architectures, configuration
from ckptd.models.architectures import Role
from ckptd.models.configuration import Write
from ckptd.pipeline.adapter.settings import Settings
from ckptd.plan.draft import Draft
from ckptd.plan.nodes import Expression

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""What the class of a task is called after the model's name, by PEFT's task types."""
_NAMES = ("score.", "classifier.", "qa_outputs.")
_PURPOSE = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")


def is_new(settings: Settings, target: str) -> bool:
    """Return whether a tensor that the base lacks is of a head that the adapter's task brings."""
    return settings.task in _CLASSES and target.startswith(_NAMES)


def dtype_of(base: Mapping[str, Expression]) -> Expression:
    """Return the base's largest tensor of floats, whose dtype a new head gets, as PEFT's merge has.

    There is one: something was merged.
    """
    floats = (value for value in base.values() if value.dtype.is_plain_float)
    return max(floats, key=lambda value: (len(value.shape) > 1, *sorted(value.shape)[::-1]))


def added(draft: Draft, heads: Mapping[str, Expression], settings: Settings) -> Draft:
    """Return the draft of a model of the adapter's task, with `heads` in the place of its own.

    Raises:
        StageRefused: the model's family has no class for the task.
    """
    if not heads:
        return draft
    old = architectures.find(draft.config)
    purpose = _CLASSES[settings.task or ""]
    name = ("" if old is None else _PURPOSE.sub("", old.name)) + purpose
    if old is None or name not in architectures.table()["architectures"]:
        settings.refuse(
            "belongs to a head that the base model has no class for",
            tensor=next(iter(heads)),
            expected=f"a class of transformers, {name}",
            hint="name a base with that head: `base:`",
        )
    gone = set() if old.name == name else set(_own_heads(old, draft.tensors))
    tensors = {key: value for key, value in draft.tensors.items() if key not in gone}
    last = list(draft.home.values())[-1]
    config = configuration.written(draft.config, _writes(name, heads, settings))
    return dataclasses.replace(
        draft,
        tensors={**tensors, **heads},
        home={key: home for key, home in draft.home.items() if key not in gone}
        | dict.fromkeys(heads, last),
        config=config,
    )


def _own_heads(
    architecture: architectures.Architecture, tensors: Mapping[str, Expression]
) -> Iterable[str]:
    """Yield the tensors of the base's own head, and of what stands beside it in its module."""
    found = {row: architecture.locate(row.name, tensors) or row.name for row in architecture.rows}
    body = {name.partition(".")[0] for row, name in found.items() if row.role is Role.INPUT}
    for row, name in found.items():
        if row.role not in (Role.HEAD, Role.BIAS, Role.LOGITS_BIAS):
            continue
        top = name.partition(".")[0]
        start = name if top in (*body, architecture.base_prefix) else f"{top}."
        yield from (tensor for tensor in tensors if tensor.startswith(start))


def _writes(
    name: str, heads: Mapping[str, Expression], settings: Settings
) -> Iterable[configuration.Write]:
    yield Write(key="architectures", value=[name])
    if settings.task == "QUESTION_ANS":
        return
    last = list(heads)[-1]
    count = heads[last].shape[0]
    labels = [f"LABEL_{number}" for number in range(count)]
    yield Write(key="id2label", value={str(at): label for at, label in enumerate(labels)})
    yield Write(key="label2id", value={label: at for at, label in enumerate(labels)})
