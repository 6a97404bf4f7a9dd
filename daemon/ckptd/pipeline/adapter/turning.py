"""PEFT's methods that turn a weight's inputs, or add what one row or a seed gives: OFT, BOFT, HRA,
FourierFT, C3A.

Each is one change of a whole weight (`plan.nodes.Change`); shapes are checked against the base here.
Source: PEFT 0.21, the `layer` module of each method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptd.plan import expression, fourier
from ckptd.plan.nodes import Change, Changed, Expression

if TYPE_CHECKING:
    from ckptd.pipeline.adapter.merging import Merge

KINDS = frozenset({"oft_R", "boft_R", "boft_s", "fourierft_spectrum", "c3a_kernel", "hra_u"})
"""The tensors of these methods."""


def apply(merge: Merge, module: str, parts: Mapping[str, str]) -> None:
    """Put in what the adapter has for one module.

    Raises:
        StageRefused: a part is missing, does not fit, or is of a layer that is not merged.
    """
    match next(iter(parts)):
        case "oft_R":
            _rotate(merge, module, parts["oft_R"])
        case "boft_R" | "boft_s":
            _turn(merge, module, parts)
        case "fourierft_spectrum":
            _add_waves(merge, module, parts["fourierft_spectrum"])
        case "c3a_kernel":
            _add_circulant(merge, module, parts["c3a_kernel"])
        case _:
            _reflect(merge, module, parts["hra_u"])


def _rotate(merge: Merge, module: str, name: str) -> None:
    """Rotate a module's inputs, stretch by stretch (OFT)."""
    above = merge.adapter[name]
    place, value = _weight(merge, module, name)
    width = value.shape[1]
    size = (1 + math.isqrt(1 + 8 * above.shape[-1])) // 2
    fits = len(above.shape) == 2 and size * (size - 1) // 2 == above.shape[1] and size
    if not fits or width % size or above.shape[0] not in (1, width // size):
        merge.misfit(name, value.shape, above.shape)
    bound = merge.settings.bound
    merge.made[place] = Changed(
        value,
        width,
        Change.ROTATION,
        (),
        (above,),
        float(merge.settings.terms),
        merge.dtype(place),
        numbers=() if bound is None else (bound,),
    )


def _turn(merge: Merge, module: str, parts: Mapping[str, str]) -> None:
    """Rotate a module's inputs among changing neighbours, and stretch its outputs (BOFT)."""
    if len(parts) != 2:
        merge.settings.refuse(
            "has only one of the two tensors of BOFT",
            tensor=module,
            expected="boft_R and boft_s",
            hint="the save was not whole: save the adapter again",
        )
    turns, lengths = merge.adapter[parts["boft_R"]], merge.adapter[parts["boft_s"]]
    name = parts["boft_R"]
    place, value = _weight(merge, module, name)  # PEFT's own merge fails for convolutions
    width = value.shape[1]
    if len(turns.shape) != 4 or turns.shape[2] != turns.shape[3] or not turns.shape[0]:
        merge.misfit(name, (1, 1, width, width), turns.shape)
    num_turns, blocks, size, _ = turns.shape
    is_even = num_turns == 1 or not (size % 2 or blocks % (1 << (num_turns - 1)))
    if blocks * size != width or not is_even:
        merge.misfit(name, value.shape, turns.shape)
    if lengths.shape != (value.shape[0], 1):
        merge.misfit(parts["boft_s"], (value.shape[0], 1), lengths.shape)
    merge.made[place] = Changed(
        value, width, Change.BUTTERFLY, (lengths,), (turns,), 1.0, merge.dtype(place)
    )


def _add_waves(merge: Merge, module: str, name: str) -> None:
    """Add the inverse Fourier transform of a few numbers in places that a seed gives (FourierFT)."""
    spectrum = merge.adapter[name]
    place, value = _weight(merge, module, name, may_be_turned=True)
    total = expression.numel(value)
    if len(spectrum.shape) != 1 or not 0 < spectrum.shape[0] <= total:
        merge.misfit(name, (total,), spectrum.shape)
    if total > fourier.MAX_TOTAL:
        merge.settings.refuse(
            "FourierFT of so large a weight is not merged",
            tensor=name,
            expected=f"at most {fourier.MAX_TOTAL:,} elements",
            found=f"{total:,}",
        )
    scaling, seed = merge.settings.spectrum
    is_turned = merge.settings.turned
    height, width = value.shape[::-1] if is_turned else value.shape
    merge.made[place] = Changed(
        value,
        value.shape[1],
        Change.FOURIER,
        (),
        (spectrum,),
        scaling,
        merge.dtype(place),
        numbers=(seed, height, width, int(is_turned)),
    )


def _add_circulant(merge: Merge, module: str, name: str) -> None:
    """Add a matrix of circulant blocks (C3A)."""
    kernel = merge.adapter[name]
    place, value = _weight(merge, module, name)
    rows, width = value.shape
    if len(kernel.shape) != 3 or not expression.numel(kernel):
        merge.misfit(name, value.shape, kernel.shape)
    down, across, size = kernel.shape
    if (down * size, across * size) != (rows, width):
        merge.misfit(name, value.shape, (down * size, across * size))
    merge.made[place] = Changed(
        value, width, Change.CIRCULANT, (), (kernel,), 1.0 / width, merge.dtype(place)
    )


def _reflect(merge: Merge, module: str, name: str) -> None:
    """Reflect a module's inputs at some planes (HRA)."""
    planes = merge.adapter[name]
    place, value = _weight(merge, module, name, is_kernel=True)
    width = math.prod(value.shape[1:])
    if len(planes.shape) != 2 or planes.shape[0] != width or not planes.shape[1]:
        merge.misfit(name, (width, 1), planes.shape)
    merge.made[place] = Changed(
        value,
        width,
        Change.REFLECTION,
        (),
        (planes,),
        float(merge.settings.together),
        merge.dtype(place),
    )


def _weight(
    merge: Merge, module: str, name: str, *, is_kernel: bool = False, may_be_turned: bool = False
) -> tuple[str, Expression]:
    """Return the place of a module's weight, and what stands there: a matrix, or a kernel.

    Raises:
        StageRefused: it is of a layer that the method is not merged into.
    """
    place = merge.place(f"{module}.weight", name)
    merge.claim(place, name)
    value = merge.now(place, exact=True)
    is_matrix = len(value.shape) == 2 or (is_kernel and len(value.shape) > 2)
    if not is_matrix or value.shape[0] == 1 or (merge.settings.turned and not may_be_turned):
        kinds = "linear and convolution" if is_kernel else "linear"
        merge.settings.refuse(
            f"{merge.settings.method} is merged into {kinds} weights alone",
            tensor=name,
            found=f"shape {value.shape}" + (", turned" if merge.settings.turned else ""),
        )
    merge.trained.add(place)
    return place, value
