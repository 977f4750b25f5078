"""Margin: aims inside the limit, so that a mean which hovers around its aim ends up within the limit."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from guardrails.schedulers.base import ConstraintScheduler, check_gain
from guardrails.schedulers.elementwise import Ops
from guardrails.schedulers.rows import LARGEST
from guardrails.schedulers.wrappers import Wrapper


class MarginState(NamedTuple):
    """State of `Margin`."""

    multiplier: float
    inner: Any


class Margin(Wrapper):
    """The scheduler inside sees v + m: it holds J at limit - m · scale, or above a lower limit by as much.

    A controller that integrates the violation brings the mean of J *to* its aim; whether a finite run
    ends a little above or below it is noise. Decisions, logs and gates still speak of the limit itself.

    Args:
        scheduler: what sees the shifted violation.
        margin: m ≥ 0 in scale units; with the default scale, the share of the limit (the tight end of one that
            moves) to stay away from it. A cost that is never negative cannot reach an aim of 0: keep m below 1.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> from guardrails.schedulers import DualAscent
        >>> inside = Margin(DualAscent(1.0), 0.25)
        >>> state, lam = inside.update(inside.init(), 0.0)
        >>> lam
        0.25
    """

    state_type: ClassVar[type[Any]] = MarginState

    def __init__(self, scheduler: ConstraintScheduler[Any], margin: float = 0.1) -> None:
        super().__init__(scheduler)
        self.two_sided = False
        self.margin = check_gain("Margin", "margin", margin)

    def init(self) -> MarginState:
        """Return the inner start."""
        inner = self.scheduler.init()
        return MarginState(self.scheduler.strength(inner), inner)

    def advance(self, state: MarginState, violation: Any, ops: Ops) -> MarginState:
        """Update the scheduler inside with the shifted violation."""
        shifted = ops.clip(violation + self.margin, -LARGEST, LARGEST)
        inner, strength = ops.update(self.scheduler, state.inner, shifted)
        return MarginState(strength, inner)

    def penalty(self, state: MarginState, violation: Any) -> Any:
        """Return the loss term of the scheduler inside at the shifted violation."""
        return self.scheduler.penalty(state.inner, violation + self.margin)
