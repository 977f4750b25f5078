"""The augmented Lagrangian: a quadratic penalty beside the multiplier (Hestenes, Powell, Rockafellar)."""

from __future__ import annotations

from typing import Any, NamedTuple

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_gain, check_number
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops, held
from guardrails.schedulers.rows import LARGEST


def effective_multiplier(violation: Any, multiplier: float, penalty_coefficient: float) -> Any:
    """[λ + ρ g]₊, the derivative of `augmented_penalty` by g.

    Works on floats and on tensors of any library, with their gradients.

    Args:
        violation: g.
        multiplier: λ ≥ 0.
        penalty_coefficient: ρ > 0.
    """
    shifted = multiplier + penalty_coefficient * violation
    return 0.5 * (shifted + abs(shifted))


def augmented_penalty(violation: Any, multiplier: float, penalty_coefficient: float) -> Any:
    """ψ(g) = ([λ + ρ g]₊² - λ²) / 2ρ, the term a loss host adds for the inequality g ≤ 0.

    Works on floats and on tensors of any library, with their gradients.

    Args:
        violation: g.
        multiplier: λ ≥ 0.
        penalty_coefficient: ρ > 0.

    Example:
        >>> augmented_penalty(2.0, multiplier=1.0, penalty_coefficient=0.5)
        3.0
    """
    effective = effective_multiplier(violation, multiplier, penalty_coefficient)
    return (effective * effective - multiplier * multiplier) / (2.0 * penalty_coefficient)


class AugmentedLagrangianState(NamedTuple):
    """State of `AugmentedLagrangian`: the effective multiplier in force, the dual λ and ρ."""

    multiplier: float
    dual: float
    penalty_coefficient: float


class AugmentedLagrangian(ElementwiseScheduler[AugmentedLagrangianState]):
    """Effective multiplier [λ + ρ v]₊ for the host; dual λ ← [λ + η v]₊.

    With η = ρ, the default, this is the method of multipliers: on a convex problem solved exactly
    between updates, λ converges linearly for any ρ > 0, the faster the larger ρ. With η < ρ it is a
    proportional-integral controller (K_P = ρ, K_I = η), the form for noisy hosts, which take only a
    step between updates; ``AugmentedLagrangian(2.0, learning_rate=0.1)`` is a start there. While
    v > ``tolerance``, ρ may grow to ``growth_factor`` ρ + ``growth_increment``, at most
    ``penalty_max``; once v ≤ 0 it is reset.

    Hosts that scale advantages apply the strength; hosts with a differentiable cost add `penalty`,
    whose derivative it is.

    Args:
        penalty_coefficient: ρ > 0, λ per scale unit of violation.
        learning_rate: η > 0, λ per scale unit of violation and update; None takes ρ in force.
        initial: λ₀ ≥ 0.
        growth_factor: at least 1, per update; 1 keeps ρ fixed. Cooper's default is 1.01.
        growth_increment: ≥ 0, ρ per update. Cooper's default is 1.
        tolerance: scaled violation ≥ 0 up to which ρ does not grow.
        penalty_max: upper end of ρ, at least ``penalty_coefficient``.

    Raises:
        ConfigurationError: if ρ ≤ 0 or another argument is out of range.

    Example:
        >>> augmented = AugmentedLagrangian(penalty_coefficient=0.5)
        >>> state, lam = augmented.update(augmented.init(), 2.0)
        >>> lam, augmented.penalty(state, 2.0)
        (1.0, 3.0)
    """

    state_type = AugmentedLagrangianState

    def __init__(
        self,
        penalty_coefficient: float = 1.0,
        *,
        learning_rate: float | None = None,
        initial: float = 0.0,
        growth_factor: float = 1.0,
        growth_increment: float = 0.0,
        tolerance: float = 1e-4,
        penalty_max: float = 1e4,
    ) -> None:
        owner = "AugmentedLagrangian"
        self.penalty_coefficient = check_gain(owner, "penalty_coefficient", penalty_coefficient, positive=True)
        self.learning_rate = learning_rate
        if learning_rate is not None:
            self.learning_rate = check_gain(owner, "learning_rate", learning_rate, positive=True)
        self.initial = check_gain(owner, "initial", initial)
        self.growth_factor = check_number(owner, "growth_factor", growth_factor, low=1.0, high=LARGEST)
        self.growth_increment = check_gain(owner, "growth_increment", growth_increment)
        self.tolerance = check_gain(owner, "tolerance", tolerance)
        self.penalty_max = check_gain(owner, "penalty_max", penalty_max, positive=True)
        if self.penalty_max < self.penalty_coefficient:
            raise ConfigurationError(
                f"{owner}: penalty_max {self.penalty_max:g} is below penalty_coefficient "
                f"{self.penalty_coefficient:g}. Raise it or lower the coefficient."
            )

    def init(self) -> AugmentedLagrangianState:
        """Return λ₀ and ρ₀."""
        return AugmentedLagrangianState(self.initial, self.initial, self.penalty_coefficient)

    def advance(self, state: AugmentedLagrangianState, violation: Any, ops: Ops) -> AugmentedLagrangianState:
        """Return the effective multiplier at this violation, and the next λ and ρ."""
        rho = state.penalty_coefficient
        effective = ops.clip(state.dual + rho * violation, 0.0, LARGEST)
        rate = rho if self.learning_rate is None else self.learning_rate
        dual = ops.clip(state.dual + rate * violation, 0.0, LARGEST)
        grown = ops.clip(self.growth_factor * rho + self.growth_increment, 0.0, self.penalty_max)
        settled = ops.where(violation > 0.0, rho, self.penalty_coefficient)
        return AugmentedLagrangianState(effective, dual, ops.where(violation > self.tolerance, grown, settled))

    def advance_tracking(
        self, before: AugmentedLagrangianState, after: AugmentedLagrangianState, strength: Any, ops: Ops
    ) -> AugmentedLagrangianState:
        """Hold λ and ρ while a wrapper limits the effective multiplier in the direction in which they move."""
        own = after.multiplier
        dual = held(before.dual, after.dual, strength, own, ops)
        rho = held(before.penalty_coefficient, after.penalty_coefficient, strength, own, ops)
        return AugmentedLagrangianState(strength, dual, rho)

    def penalty(self, state: AugmentedLagrangianState, violation: Any) -> Any:
        """Return ψ(v) with λ and ρ in force, a float or a differentiable tensor."""
        return augmented_penalty(violation, state.dual, state.penalty_coefficient)
