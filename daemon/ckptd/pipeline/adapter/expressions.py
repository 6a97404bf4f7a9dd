"""Expressions that merging needs besides those of `plan.expression`."""

from __future__ import annotations

from ckptd.plan import expression
from ckptd.plan.nodes import Expression, Load


def reshaped(value: Expression, shape: tuple[int, ...]) -> Expression:
    """Return a stored tensor's elements in another shape."""
    if value.shape == shape:
        return value
    if isinstance(value, Load):
        return Load(value.extent, value.dtype, shape)
    return expression.view(expression.flat(value), shape)
