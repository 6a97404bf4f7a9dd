"""Stage `footprint`: what the model needs in memory, and a limit on it, from headers alone.

Parameters are exact. Buffers that a model computes for itself when it is loaded (rotary tables) are
not on disk and are estimated; the report says so. The key-value cache is counted where a context
length is given. The check runs before a tensor byte is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ckptd import units
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckFailed, StageRefused
from ckptd.pipeline import kv_cache
from ckptd.pipeline.stage import ByteSize, Stage, StageContext, StageOptions
from ckptd.plan import expression
from ckptd.plan.draft import Draft, StageReport

_LARGEST = 5
_DTYPES = {str(dtype.torch_name): dtype for dtype in Dtype if dtype.is_plain_float}


def fraction(value: object) -> object:
    """Return a share as a number: `10%` is 0.1; anything else is left to the validator."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip().removesuffix("%")) / 100
    return value


class FootprintOptions(StageOptions):
    """Options of `footprint`."""

    max: ByteSize | None = None
    """Largest memory the loaded model may take: 24GB, 80GiB or bytes. No limit by default."""
    device: str | None = None
    """A device whose memory is the limit: cpu, cuda, cuda:1. None by default."""
    headroom: Annotated[float, Field(ge=0, lt=1), BeforeValidator(fraction)] = 0.1
    """The share of the device's memory that must stay free: 0.1 or 10%."""
    context: Annotated[int, Field(gt=0)] | None = None
    """Context length in tokens for which the key-value cache is counted. Not counted by default."""
    batch: Annotated[int, Field(gt=0)] = 1
    """Sequences at once, for the key-value cache."""
    on_exceed: Literal["fail", "warn", "hold_push"] = "fail"
    """What happens over the limit: the job fails, goes on with a warning, or produces the model
    without publishing it."""


def plan(draft: Draft, options: FootprintOptions, context: StageContext) -> Draft:
    """Return the draft with its memory needs reported and the limits applied.

    Raises:
        CheckFailed: over a limit with `on_exceed: fail`; says needs and limit in bytes.
        StageRefused: `device` is not there, or the config lacks what a KV cache is counted from.
    """
    facts = measure(draft, options, context)
    limits = _limits(options, context)
    # What undecided comparisons may still drop must not fail the job before they are made.
    needed = facts["total_bytes"] - draft.undecided_bytes
    exceeded = [
        f"needs {units.format_bytes(needed)} ({needed:,} bytes), {name} allows "
        f"{units.format_bytes(limit)} ({limit:,} bytes)"
        for name, limit in limits.items()
        if needed > limit
    ]
    if exceeded and options.on_exceed == "fail":
        raise CheckFailed(
            "; ".join(exceeded),
            check="footprint",
            hint="raise `max`, cast or shrink the model, or set on_exceed: warn",
        )
    report = StageReport(
        stage="footprint",
        summary=f"{units.format_bytes(facts['total_bytes'])} when loaded",
        facts=facts | {"limits": limits},
        warnings=tuple(exceeded),
    )
    hold = draft.hold_push
    if exceeded and options.on_exceed == "hold_push":
        hold = f"footprint: {exceeded[0]}"
    return draft.with_report(report, hold_push=hold)


def measure(draft: Draft, options: FootprintOptions, context: StageContext) -> dict[str, Any]:
    """Return the model's bytes in memory as JSON values: parameters, buffers, cache, largest.

    Raises:
        StageRefused: a KV cache is asked for and the config does not say its dimensions.
    """
    by_dtype: Counter[str] = Counter()
    for value in draft.tensors.values():
        by_dtype[str(value.dtype)] += expression.nbytes(value)
    largest = sorted(draft.tensors.items(), key=lambda item: -expression.nbytes(item[1]))
    buffers = _rotary_bytes(_text_config(draft.config))
    cache = 0 if options.context is None else _cache_bytes(draft, options, context)
    parameters = sum(by_dtype.values())
    return {
        "parameter_bytes": parameters,
        "by_dtype": dict(by_dtype),
        "largest": {name: expression.nbytes(value) for name, value in largest[:_LARGEST]},
        "buffer_bytes": buffers,
        "buffers_estimated": True,
        "cache_bytes": cache,
        "total_bytes": parameters + buffers + cache,
    }


def _limits(options: FootprintOptions, context: StageContext) -> dict[str, int]:
    limits = {} if options.max is None else {"max": options.max}
    if options.device is not None:
        memory = context.device_bytes(options.device)
        if memory is None:
            raise StageRefused(
                f"there is no device {options.device!r} on this machine",
                stage="footprint",
                path=context.source_path,
                hint="give the limit as `max: 24GB` instead",
            )
        limits[options.device] = math.floor(memory * (1 - options.headroom))
    return limits


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("text_config", "llm_config", "language_config", "decoder", "generator"):
        nested = config.get(key)
        if isinstance(nested, Mapping) and kv_cache.head_size(nested) is not None:
            return nested
    return config


def _rotary_bytes(config: Mapping[str, Any]) -> int:
    """Two float32 tables of half a head, which models with rotary positions keep as buffers."""
    rotary = {"rope_theta", "rope_scaling", "rope_parameters", "rotary_pct", "rotary_dim"}
    head = kv_cache.head_size(config)
    return 0 if head is None or not rotary & set(config) else 2 * 4 * (head // 2)


def _cache_bytes(draft: Draft, options: FootprintOptions, context: StageContext) -> int:
    """Return the bytes of the key-value cache in the dtype that the model computes in."""
    assert options.context is not None
    config = draft.config if draft.config.get("is_encoder_decoder") else _text_config(draft.config)
    elements = kv_cache.num_elements(config, context=options.context, batch=options.batch)
    if elements is None:
        raise StageRefused(
            "config.json does not tell how large a key-value cache is",
            stage="footprint",
            path=context.source_path,
            hint="leave `context` out",
        )
    return elements * _compute_dtype(draft).bits // 8


def _compute_dtype(draft: Draft) -> Dtype:
    """The dtype that config.json loads the model in, else that of most of its weights."""
    for config in (draft.config, _text_config(draft.config)):
        said = config.get("dtype", config.get("torch_dtype"))
        if isinstance(said, str) and said in _DTYPES:
            return _DTYPES[said]
    sizes: Counter[Dtype] = Counter()
    for value in draft.tensors.values():
        if value.dtype.is_plain_float:
            sizes[value.dtype] += expression.nbytes(value)
    return sizes.most_common(1)[0][0] if sizes else Dtype.BF16


STAGE = Stage(
    name="footprint",
    summary="memory the model needs, and a limit on it",
    options=FootprintOptions,
    plan=plan,
    repeatable=True,
    takes_parts=True,
)
