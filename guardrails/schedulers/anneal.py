"""Schedules that do not look at the violation: a constant, a line, half a cosine."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_gain, whole_number
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops


class FixedState(NamedTuple):
    """State of `Fixed`."""

    multiplier: float


class Fixed(ElementwiseScheduler[FixedState]):
    """λ = constant: the fixed penalty that adaptive schedulers are compared with.

    Args:
        multiplier: λ ≥ 0, dimensionless.

    Raises:
        ConfigurationError: if ``multiplier`` is negative or not finite.

    Example:
        >>> fixed = Fixed(0.5)
        >>> fixed.update(fixed.init(), 10.0)[1]
        0.5
    """

    state_type = FixedState

    def __init__(self, multiplier: float = 1.0) -> None:
        self.multiplier = check_gain("Fixed", "multiplier", multiplier)

    def init(self) -> FixedState:
        """Return the constant."""
        return FixedState(self.multiplier)

    def advance(self, state: FixedState, violation: Any, ops: Ops) -> FixedState:
        """Return the constant."""
        return FixedState(0.0 * violation + self.multiplier)


class AnnealState(NamedTuple):
    """State of `Anneal`: the multiplier in force and the updates made."""

    multiplier: float
    updates: float


class Anneal(ElementwiseScheduler[AnnealState]):
    """λ from ``start`` to ``end`` over a number of updates, then constant.

    Linear: λ = start + (end - start) t;  cosine: λ = start + (end - start)(1 - cos πt) / 2;
    t = min(updates made / ``updates``, 1).

    Args:
        start: λ ≥ 0 before the first update.
        end: λ ≥ 0 from update number ``updates`` on.
        updates: at least 1.
        shape: ``"linear"`` or ``"cosine"``.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> anneal = Anneal(0.0, 1.0, updates=4)
        >>> state, lam = anneal.update(anneal.init(), 0.0)
        >>> lam
        0.25
    """

    state_type = AnnealState

    def __init__(
        self,
        start: float = 0.0,
        end: float = 1.0,
        *,
        updates: int = 100,
        shape: Literal["linear", "cosine"] = "linear",
    ) -> None:
        self.start = check_gain("Anneal", "start", start)
        self.end = check_gain("Anneal", "end", end)
        self.updates = whole_number("Anneal", "updates", updates)
        if shape not in ("linear", "cosine"):
            raise ConfigurationError(f"Anneal: shape is {shape!r}; give 'linear' or 'cosine'.")
        self.shape: Literal["linear", "cosine"] = shape

    def init(self) -> AnnealState:
        """Return ``start``."""
        return AnnealState(self.start, 0.0)

    def advance(self, state: AnnealState, violation: Any, ops: Ops) -> AnnealState:
        """Go one update further."""
        made = ops.clip(state.updates + 1.0, 0.0, float(self.updates))
        t = made / self.updates
        share = t if self.shape == "linear" else 0.5 * (1.0 - ops.cos(math.pi * t))
        # this form ends at ``end`` exactly
        return AnnealState(self.start * (1.0 - share) + self.end * share, made)
