"""Dual ascent: gradient steps on the Lagrange multiplier (Ray et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

from guardrails.schedulers.base import ConstraintScheduler, check_number


class DualAscentState(NamedTuple):
    """State of `DualAscent`."""

    multiplier: float


class DualAscent(ConstraintScheduler[DualAscentState]):
    """λ ← [λ + η v]₊, projected gradient ascent on the dual.

    Args:
        learning_rate: η > 0, change of λ per update at a violation of one scale unit.
        initial: λ₀ ≥ 0.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> dual = DualAscent(learning_rate=0.1)
        >>> state, lam = dual.update(dual.init(), 2.0)
        >>> lam
        0.2
    """

    state_type = DualAscentState

    def __init__(self, learning_rate: float = 0.05, *, initial: float = 0.0) -> None:
        self.learning_rate = check_number("DualAscent", "learning_rate", learning_rate, low=0.0, open_low=True)
        self.initial = check_number("DualAscent", "initial", initial, low=0.0)

    def init(self) -> DualAscentState:
        """Return λ₀."""
        return DualAscentState(self.initial)

    def update(self, state: DualAscentState, violation: float) -> tuple[DualAscentState, float]:
        """Take one projected step."""
        lam = max(0.0, state.multiplier + self.learning_rate * violation)
        return DualAscentState(lam), lam
