"""Stage `cast`: floating-point weights in another dtype, with patterns for those that stay.

Each value is rounded once. Integer, boolean and 8-bit or narrower tensors are never touched, and a
checkpoint that says it is quantized is refused: its scales are floats, too.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from ckptd.checkpoint import dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import StageRefused
from ckptd.pipeline.stage import Patterns, Stage, StageContext, StageOptions
from ckptd.plan import expression
from ckptd.plan.draft import Draft, StageReport

_CONFIG_KEYS = ("dtype", "torch_dtype")
_QUANTIZED_BITS = 8
"""Floats of this width or less are somebody's quantized weights, whatever config.json says."""
_DEQUANTIZE = "dequantize it first; a cast would break its scales"
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parse_dtype(text: object) -> Dtype:
    """Return the weight dtype that `text` names: bfloat16, bf16, float16, fp16, float32...

    Raises:
        ValueError: not the name of a floating-point dtype of 16 bits or more.
    """
    if isinstance(text, Dtype):
        return text
    dtype = dtypes.from_torch_name(_SHORT.get(str(text), str(text)))
    if not dtype.is_plain_float:
        raise ValueError(f"{text!r} is not a weight dtype (write bfloat16, float16 or float32)")
    return dtype


WeightDtype = Annotated[
    Dtype,
    BeforeValidator(parse_dtype),
    PlainSerializer(lambda dtype: dtype.torch_name, return_type=str),
    WithJsonSchema({"enum": ["bfloat16", "float16", "float32", "float64", "bf16", "fp16", "fp32"]}),
]
"""A floating-point dtype that weights are stored in."""


class CastOptions(StageOptions):
    """Options of `cast`."""

    dtype: WeightDtype
    """The dtype to cast to: bfloat16, float16 or float32."""
    keep: Patterns = ()
    """Names (shell patterns such as `*norm*`, `*.router.*`) of tensors that stay as they are."""


def plan(draft: Draft, options: CastOptions, context: StageContext) -> Draft:
    """Return the draft with its floating-point tensors cast and the config's dtype set.

    Raises:
        StageRefused: the checkpoint is quantized, or a `keep` pattern matches nothing.
    """
    _refuse_quantized(draft, context)
    for pattern in options.keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in draft.tensors):
            raise StageRefused(
                f"keep pattern {pattern!r} matches no tensor",
                stage="cast",
                path=context.source_path,
                hint="see the names with `ckptd inspect --tensors`",
            )
    tensors = dict(draft.tensors)
    kept, changed, already = 0, 0, 0
    for name, value in draft.tensors.items():
        if not value.dtype.is_plain_float:
            continue
        if value.dtype is options.dtype:
            already += 1
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.keep):
            kept += 1
            continue
        tensors[name] = expression.cast(value, options.dtype)
        changed += 1
    target = options.dtype.torch_name
    report = StageReport(
        stage="cast",
        summary=f"{changed} tensors to {target}, {kept} kept by pattern",
        facts={"dtype": target, "changed": changed, "kept": kept},
    )
    said = any(key in draft.config for key in _CONFIG_KEYS)
    config = draft.config
    if changed or (already and said):  # a config that says another dtype would load as that
        config = _with_dtype(draft.config, target)
    return draft.with_report(report, tensors=tensors, config=config)


def _refuse_quantized(draft: Draft, context: StageContext) -> None:
    """Refuse what config.json or a tensor's dtype shows to be quantized."""
    for config in (draft.config, *draft.config.values()):
        method = config.get("quantization_config") if isinstance(config, Mapping) else None
        if method:
            name = method.get("quant_method") if isinstance(method, Mapping) else None
            raise StageRefused(
                f"the checkpoint is quantized ({name or 'unnamed method'})",
                stage="cast",
                path=context.source_path,
                hint=_DEQUANTIZE,
            )
    for name, value in draft.tensors.items():
        if value.dtype.startswith("F") and value.dtype.bits <= _QUANTIZED_BITS:
            raise StageRefused(
                f"is {value.dtype}, quantized",
                stage="cast",
                path=context.source_path,
                tensor=name,
                hint=_DEQUANTIZE,
            )


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Set `dtype` (or `torch_dtype`, where the file says that) here and in nested configs."""
    changed = {
        key: _with_dtype(value, dtype)
        if isinstance(value, Mapping) and any(one in value for one in _CONFIG_KEYS)
        else value
        for key, value in config.items()
    }
    keys = [key for key in _CONFIG_KEYS if key in changed] or ["dtype"]
    return changed | dict.fromkeys(keys, dtype)


STAGE = Stage(
    name="cast",
    summary="floating-point weights in another dtype",
    options=CastOptions,
    plan=plan,
    rank=50,
    computes=True,
    takes_adapters=True,
    takes_parts=True,
)
