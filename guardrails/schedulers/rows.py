"""The state of many constraints at once: one record whose floats are arrays, a row per constraint."""

from __future__ import annotations

from typing import Any

import numpy as np

from guardrails.errors import RolloutError
from guardrails.rollout import FloatArray

LARGEST = 1e9
"""Strengths, gains and violations are kept within this, so that no product of them can overflow."""


def spread(state: Any, n: int) -> Any:
    """Return ``state`` with every float replaced by an ``(n,)`` float64 array of it."""
    if isinstance(state, tuple):
        return _rebuilt(state, [spread(value, n) for value in state])
    return np.full(n, state, dtype=np.float64)


def stack(states: list[Any]) -> Any:
    """Return the states of n constraints, all at the same update, as one state of ``(n,)`` arrays."""
    first = states[0]
    if isinstance(first, tuple):
        return _rebuilt(first, [stack(list(column)) for column in zip(*states, strict=True)])
    return np.array(states, dtype=np.float64)


def unstack(states: Any) -> list[Any]:
    """Return the rows of a state of ``(n,)`` arrays; undoes `stack`."""
    return [_row(states, index) for index in range(_n_rows(states))]


def _row(states: Any, index: int) -> Any:
    if isinstance(states, tuple):
        return _rebuilt(states, [_row(value, index) for value in states])
    return float(states[index])


def _n_rows(states: Any) -> int:
    """Return n of a state of ``(n,)`` arrays; an empty history has no rows to count."""
    if isinstance(states, tuple):
        return max(map(_n_rows, states), default=0)
    return len(states)


def _rebuilt(like: tuple[Any, ...], values: list[Any]) -> Any:
    make = getattr(like, "_make", tuple)
    return make(values)


def in_range(violations: Any, n: int) -> FloatArray:
    """Return ``violations`` as an ``(n,)`` float64 array clipped to ±`LARGEST`.

    Raises:
        RolloutError: if the shape differs or a value is NaN or infinite.
    """
    values = np.asarray(violations, dtype=np.float64)
    if values.shape != (n,):
        raise RolloutError(f"update_many was given violations of shape {values.shape} for {n} constraints.")
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))[:5].tolist()
        raise RolloutError(f"Violations of rows {bad} are not finite. Sanitise costs with Constraint.measure first.")
    clipped: FloatArray = np.minimum(np.maximum(values, -LARGEST), LARGEST)
    return clipped
