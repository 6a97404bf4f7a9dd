"""Master weights: the float32 copies an optimizer keeps, in the dtype that the model is said to have.

A trainer's own consolidation gives the copies themselves; the model that is published is the one
that was trained with, so they are cast once, to the dtype that config.json names. A pipeline with
a stage `cast` decides itself: `cast: {dtype: float32}` keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.pipeline.definition import StageCall
from ckptd.plan import expression
from ckptd.plan.draft import Draft, StageReport


def cast(current: Draft, source: Checkpoint, stages: Sequence[StageCall]) -> Draft:
    """Return the draft with the source's master weights in the config's dtype, said in a report."""
    dtype = said_dtype(source.config)
    wrong = [
        n for n in source.masters & current.tensors.keys() if current.tensors[n].dtype != dtype
    ]
    if dtype is None or not wrong or any(call.name == "cast" for call in stages):
        return current
    tensors = dict(current.tensors)
    for name in wrong:
        tensors[name] = expression.cast(tensors[name], dtype)
    report = StageReport(
        stage="consolidate",
        summary=f"{len(wrong)} master weights to {dtype.torch_name}, the dtype of config.json",
        facts={"dtype": dtype.torch_name, "changed": len(wrong)},
    )
    return current.with_report(report, tensors=tensors)


def said_dtype(config: Mapping[str, Any]) -> Dtype | None:
    """Return the plain floating-point dtype that a config names, itself or for its text model."""
    text = config.get("text_config")
    for part in (config, text):
        if isinstance(part, Mapping):
            for key in ("dtype", "torch_dtype"):
                try:
                    dtype = dtypes.from_torch_name(str(part[key])) if key in part else None
                except ValueError:
                    dtype = None
                if dtype is not None and dtype.is_plain_float:
                    return dtype
    return None
