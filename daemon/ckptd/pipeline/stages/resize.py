"""Stage `resize`: the vocabulary in another size, in every tensor that has a row for each token.

Old rows are copied byte for byte; only new ones are computed, in one streaming pass over the old
ones. Tensors that are equal (a tied pair, both present) stay equal. The default never shrinks:
embeddings are often padded beyond the tokenizer, and cutting them silently loses nothing but trust.
"""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from ckptd.errors import StageRefused
from ckptd.models import configuration, embeddings
from ckptd.models.embeddings import Fill, Vocabulary, VocabularyTensor
from ckptd.pipeline import tokenizer
from ckptd.pipeline.stage import Stage, StageContext, StageOptions
from ckptd.plan import expression
from ckptd.plan.draft import Draft, StageReport
from ckptd.plan.nodes import Expression, Grown, NewRows

_DEFAULT_STD = 0.02


class ResizeOptions(StageOptions):
    """Options of `resize`; at least one of `to`, `to_tokenizer` and `pad_to_multiple_of`."""

    to: Annotated[int, Field(gt=0)] | None = None
    """The number of rows. With `pad_to_multiple_of`, rounded up to it."""
    to_tokenizer: bool = False
    """As many rows as the tokenizer beside the weights needs. Never fewer than there are, unless
    `allow_shrink` is set."""
    pad_to_multiple_of: Annotated[int, Field(gt=0)] | None = None
    """Round the number of rows up to a multiple, 64 or 128 for fast matrix products."""
    mean_resizing: bool = True
    """New rows around the mean of the old ones (with their covariance times 1e-9), so that new
    tokens start out improbable to nobody. False: normal with the config's initializer_range."""
    allow_shrink: bool = False
    """Cut rows away where the number asked for is smaller."""
    seed: int = 0
    """Seed of the new rows: the same seed gives the same rows on any device."""

    @model_validator(mode="after")
    def _ask_for_something(self) -> Self:
        if self.to is None and not self.to_tokenizer and self.pad_to_multiple_of is None:
            raise ValueError("give `to`, `to_tokenizer: true` or `pad_to_multiple_of`")
        if self.to is not None and self.to_tokenizer:
            raise ValueError("`to` and `to_tokenizer` exclude each other")
        return self


def plan(draft: Draft, options: ResizeOptions, context: StageContext) -> Draft:
    """Return the draft with every vocabulary tensor in the new size, and the config's sizes set.

    Raises:
        StageRefused: a tensor cannot be placed or grown, rows would be lost, or the tokenizer's
            size is not known.
    """
    vocabulary = embeddings.find(draft.config, draft.tensors, path=context.source_path)
    num_rows = _num_rows(draft, options, vocabulary, context)
    std = _std(draft)
    tensors = dict(draft.tensors)
    for tensor in vocabulary.tensors:
        if tensor.rows > num_rows and not options.allow_shrink:
            raise _shrinking(context, tensor.name, num_rows, tensor.rows)
        tensors[tensor.name] = _resized(tensors[tensor.name], tensor, num_rows, options, std)
    config = configuration.written(draft.config, vocabulary.writes(num_rows))
    report = StageReport(
        stage="resize",
        summary=f"{vocabulary.rows} to {num_rows} rows in {len(vocabulary.tensors)} tensors",
        facts={
            "rows_before": vocabulary.rows,
            "rows": num_rows,
            "tensors": [tensor.name for tensor in vocabulary.tensors],
        },
        warnings=_dangling(config, num_rows),
    )
    return draft.with_report(report, tensors=tensors, config=config)


def _num_rows(
    draft: Draft, options: ResizeOptions, vocabulary: Vocabulary, context: StageContext
) -> int:
    wanted = vocabulary.rows
    if options.to is not None:
        wanted = options.to
    elif options.to_tokenizer:
        wanted = tokenizer.num_ids(draft.side_files, context.source_path)
        if not options.allow_shrink:
            wanted = max(wanted, vocabulary.rows)
    multiple = options.pad_to_multiple_of or 1
    return math.ceil(wanted / multiple) * multiple


def _resized(
    value: Expression, tensor: VocabularyTensor, num_rows: int, options: ResizeOptions, std: float
) -> Expression:
    if num_rows <= tensor.rows:
        return expression.rows(value, 0, num_rows, axis=tensor.axis)
    shape = (
        *value.shape[: tensor.axis],
        num_rows - tensor.rows,
        *value.shape[tensor.axis + 1 :],
    )
    new = Grown(
        source=value,
        shape=shape,
        axis=tensor.axis,
        first=0,
        method=_method(tensor.fill, mean_resizing=options.mean_resizing),
        std=std,
        seed=options.seed,
    )
    return expression.concat([value, new], axis=tensor.axis)


def _method(fill: Fill, *, mean_resizing: bool) -> NewRows:
    if fill is Fill.ROWS:
        return NewRows.MEAN if mean_resizing else NewRows.NORMAL
    if fill is Fill.MEAN and mean_resizing:
        return NewRows.BIAS_MEAN
    return NewRows.ZERO


def _std(draft: Draft) -> float:
    """The standard deviation the model's own initialisation uses."""
    path = configuration.text_path(draft.config)
    for prefix in dict.fromkeys((f"{path}." if path else "", "")):
        for key in ("initializer_range", "init_std", "initializer_factor"):
            value = configuration.get(draft.config, f"{prefix}{key}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
    return _DEFAULT_STD


def _dangling(config: dict[str, object], num_rows: int) -> tuple[str, ...]:
    return tuple(
        f"{key} is {value}, beyond the {num_rows} rows"
        for key, value in configuration.integers(config).items()
        if key.endswith("_token_id") and value >= num_rows
    )


def _shrinking(context: StageContext, tensor: str, num_rows: int, rows: int) -> StageRefused:
    return StageRefused(
        "would lose rows",
        stage="resize",
        path=context.source_path,
        tensor=tensor,
        expected=f"at least {rows} rows",
        found=f"{num_rows} asked for",
        hint="set allow_shrink: true if the rows beyond are unused",
    )


STAGE = Stage(
    name="resize",
    summary="the vocabulary in another size",
    options=ResizeOptions,
    plan=plan,
    rank=20,
    computes=True,
)
