"""Augmented: the quadratic penalty of the augmented Lagrangian beside a multiplier that any scheduler moves."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from guardrails.schedulers.augmented import augmented_penalty
from guardrails.schedulers.base import ConstraintScheduler, check_gain
from guardrails.schedulers.elementwise import Ops, held
from guardrails.schedulers.rows import LARGEST
from guardrails.schedulers.wrappers import Wrapper


class AugmentedState(NamedTuple):
    """State of `Augmented`: the effective multiplier in force, and the state that holds λ."""

    multiplier: float
    inner: Any


class Augmented(Wrapper):
    """Effective multiplier [λ + ρ v]₊ and loss term ψ(v) = ([λ + ρ v]₊² - λ²) / 2ρ, with λ of the scheduler inside.

    ``Augmented(DualAscent(η), ρ)`` is ``AugmentedLagrangian(ρ, learning_rate=η)``; a dual that moves in another way
    gets the same penalty. The smaller ρ, the closer to the scheduler inside on its own.

    Args:
        scheduler: moves λ.
        penalty_coefficient: ρ > 0, λ per scale unit of violation.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> from guardrails.schedulers import LogDual
        >>> augmented = Augmented(LogDual(initial=1.0), penalty_coefficient=0.5)
        >>> augmented.penalty(augmented.init(), 2.0)
        3.0
    """

    state_type: ClassVar[type[Any]] = AugmentedState

    def __init__(self, scheduler: ConstraintScheduler[Any], penalty_coefficient: float = 1.0) -> None:
        super().__init__(scheduler)
        self.monotone, self.two_sided = True, False
        self.penalty_coefficient = check_gain("Augmented", "penalty_coefficient", penalty_coefficient, positive=True)

    def init(self) -> AugmentedState:
        """Return the inner start."""
        inner = self.scheduler.init()
        return AugmentedState(self.scheduler.strength(inner), inner)

    def advance(self, state: AugmentedState, violation: Any, ops: Ops) -> AugmentedState:
        """Return the effective multiplier at this violation, and let the scheduler inside move λ."""
        lam = ops.strength(self.scheduler, state.inner)
        effective = ops.clip(lam + self.penalty_coefficient * violation, 0.0, LARGEST)
        inner, _ = ops.update(self.scheduler, state.inner, violation)
        return AugmentedState(effective, inner)

    def advance_tracking(
        self, before: AugmentedState, after: AugmentedState, strength: Any, ops: Ops
    ) -> AugmentedState:
        """Hold λ while another wrapper limits the effective multiplier in the direction in which λ moves."""
        was, own = ops.strength(self.scheduler, before.inner), ops.strength(self.scheduler, after.inner)
        lam = held(was, own, strength, after.multiplier, ops)
        return AugmentedState(strength, ops.track(self.scheduler, before.inner, after.inner, lam))

    def penalty(self, state: AugmentedState, violation: Any) -> Any:
        """Return ψ(v), a float or a differentiable tensor."""
        return augmented_penalty(violation, self.scheduler.strength(state.inner), self.penalty_coefficient)
