"""Scaled rotary embeddings in GGUF files: as metadata, or as a small tensor of factors.

llama.cpp keeps the scaling of Llama 3 and LongRoPE as one factor for each frequency; config.json
keeps the settings they came from. Those of Llama 3 are found again and verified: settings that do
not give exactly the stored factors are refused, not guessed. Source: llama.cpp's converters
(`generate_extra_tensors`), transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

if TYPE_CHECKING:
    from ckptd.checkpoint.gguf_config import Facts

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
MAX_FACTORS = 4096
_TOLERANCE = 1e-5
"""Relative: the factors were computed in float32 or float64 and stored in float32."""
_LLAMA3_SETTINGS = ((1.0, 4.0, 8192), (1.0, 4.0, 4096), (1.0, 1.0, 8192))
"""Low and high frequency factor and original context of the models that are scaled so."""


def scaling(facts: Facts) -> dict[str, Any]:
    """Return `rope_scaling` as config.json has it, or nothing where nothing is scaled.

    Raises:
        CheckpointUnsupported: a scaling that config.json cannot express.
        CheckpointCorrupt: the factors are not a vector of float32.
    """
    kind = facts.metadata.get(f"{facts.architecture}.rope.scaling.type")
    if LLAMA3 in facts.tensors:
        return _of_llama3(facts)
    if LONG in facts.tensors and SHORT in facts.tensors:
        original = facts.number("rope.scaling.original_context_length")
        found: dict[str, Any] = {
            "rope_type": "longrope",
            "long_factor": _factors(facts, LONG),
            "short_factor": _factors(facts, SHORT),
        }
        positions = facts.number("context_length")
        if facts.architecture != "phi3":  # there it stands beside
            found["original_max_position_embeddings"] = original
            found["factor"] = positions / original if original else 1.0
        return {"rope_scaling": found}
    if kind in (None, "none") or facts.number("rope.scaling.factor", 1.0) == 1.0:
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": facts.number(_FACTOR)}}
    if kind == "yarn":
        return {"rope_scaling": _yarn(facts)}
    raise _unsupported(facts, f"scales its rotary embedding in the way {kind!r}")


_FACTOR = "rope.scaling.factor"


def _yarn(facts: Facts) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "yarn", "factor": facts.number(_FACTOR)}
    for key, name in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        value = facts.optional(f"rope.scaling.{key}")
        if value is not None:
            found[name] = value
    return found


def _of_llama3(facts: Facts) -> dict[str, Any]:
    factors = _factors(facts, LLAMA3)
    factor = max(factors, default=1.0)
    if all(one == 1.0 for one in factors):
        return {}
    base = facts.number("rope.freq_base", 10000.0)
    for low, high, original in _LLAMA3_SETTINGS:
        made = _llama3_factors(len(factors), base, factor, low, high, original)
        if _alike(made, factors):
            return {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
            }
    raise _unsupported(facts, "has factors of its rotary embedding that no known settings give")


def _llama3_factors(
    count: int, base: float, factor: float, low: float, high: float, original: int
) -> list[float]:
    made = []
    for place in range(count):
        wavelength = 2 * math.pi * base ** (place / count)
        if wavelength < original / high:
            made.append(1.0)
        elif wavelength > original / low:
            made.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low) if high != low else 0.0
            made.append(1 / ((1 - smooth) / factor + smooth))
    return made


def _alike(made: Sequence[float], stored: Sequence[float]) -> bool:
    pairs = zip(made, stored, strict=True)
    return all(math.isclose(one, other, rel_tol=_TOLERANCE) for one, other in pairs)


def _factors(facts: Facts, name: str) -> list[float]:
    """Return the factors of a small tensor of float32."""
    tensor = facts.tensors[name]
    spec, extent = tensor.spec, tensor.extent
    if spec.dtype is not Dtype.F32 or len(spec.shape) != 1 or spec.numel > MAX_FACTORS:
        raise CheckpointCorrupt(
            "is not a vector of factors",
            path=facts.path,
            tensor=name,
            expected=f"F32, at most {MAX_FACTORS}",
            found=f"{spec.dtype} {list(spec.shape)}",
        )
    with extent.path.open("rb") as file:
        file.seek(extent.offset)
        raw = file.read(extent.nbytes)
    if len(raw) != extent.nbytes:
        raise CheckpointCorrupt("ends early", path=facts.path, tensor=name)
    values = struct.unpack(f"<{spec.numel}f", raw)
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise CheckpointCorrupt(
            "has factors that are no positive numbers", path=facts.path, tensor=name
        )
    return [float(f"{value:.7g}") for value in values]


def _unsupported(facts: Facts, what: str) -> CheckpointUnsupported:
    return CheckpointUnsupported(
        what,
        path=facts.path,
        hint="give the original config.json with --assets (`assets:` in a definition)",
    )
