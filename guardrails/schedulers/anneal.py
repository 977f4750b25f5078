"""Schedules that do not look at the violation: a constant."""

from __future__ import annotations

from typing import NamedTuple

from guardrails.schedulers.base import ConstraintScheduler, check_number


class FixedState(NamedTuple):
    """State of `Fixed`."""

    multiplier: float


class Fixed(ConstraintScheduler[FixedState]):
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

    def __init__(self, multiplier: float) -> None:
        self.multiplier = check_number("Fixed", "multiplier", multiplier, low=0.0)

    def init(self) -> FixedState:
        """Return the constant."""
        return FixedState(self.multiplier)

    def update(self, state: FixedState, violation: float) -> tuple[FixedState, float]:
        """Return the state unchanged."""
        return state, state.multiplier
