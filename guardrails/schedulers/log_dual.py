"""Dual ascent on the logarithm of the multiplier, which stays positive: plain or by Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_gain, check_share
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops


class LogDualState(NamedTuple):
    """State of `LogDual`."""

    multiplier: float


class LogDual(ElementwiseScheduler[LogDualState]):
    """ln λ ← clip(ln λ + η λ v, ln λ_min, ln λ_max): gradient ascent on ln λ (Dai et al. 2023, Safe RLHF).

    Steps are in proportion to λ², so a large λ moves fast and a small one hardly: λ_min keeps it from
    falling asleep. Safe RLHF averages J over the last 128 costs; `Smooth` does that here.

    Args:
        learning_rate: η > 0, change of ln λ per update at λ = 1 and a violation of one scale unit.
        initial: λ₀ in [``minimum``, ``maximum``].
        minimum: λ_min > 0.
        maximum: λ_max ≥ ``minimum``. Safe RLHF: η = 0.1, λ_max = 5.

    Raises:
        ConfigurationError: if an argument is out of range, or the range is inverted.

    Example:
        >>> dual = LogDual(learning_rate=0.1)
        >>> state, lam = dual.update(dual.init(), 1.0)
        >>> round(lam, 4)
        1.1052
    """

    state_type = LogDualState

    def __init__(
        self, learning_rate: float = 0.05, *, initial: float = 1.0, minimum: float = 1e-3, maximum: float = 10.0
    ) -> None:
        self.learning_rate = check_gain("LogDual", "learning_rate", learning_rate, positive=True)
        self.minimum, self.maximum = check_range("LogDual", minimum, maximum)
        self.initial = check_within("LogDual", initial, self.minimum, self.maximum)

    def init(self) -> LogDualState:
        """Return λ₀."""
        return LogDualState(self.initial)

    def advance(self, state: LogDualState, violation: Any, ops: Ops) -> LogDualState:
        """Take one step on ln λ."""
        step = ops.clip(
            self.learning_rate * state.multiplier * violation, -600.0, 600.0
        )  # e^600 times a strength of 1e9 is finite
        return LogDualState(ops.clip(state.multiplier * ops.exp(step), self.minimum, self.maximum))


class AdamLogDualState(NamedTuple):
    """State of `AdamLogDual`: both moments of λ v, and β₁ᵗ and β₂ᵗ for the bias correction."""

    multiplier: float
    mean: float
    square: float
    mean_decay: float
    square_decay: float


class AdamLogDual(ElementwiseScheduler[AdamLogDualState]):
    """Adam's steps on ln λ along λ v, the gradient of λ v by ln λ, as ALGD takes them (arXiv 2602.02924).

    m ← β₁m + (1-β₁) λ v;  s ← β₂s + (1-β₂)(λ v)²;  ln λ ← ln λ + η (m / (1-β₁ᵗ)) / (√(s / (1-β₂ᵗ)) + ε), clipped.

    λ changes by a factor of about e^η per update whatever its size and that of the violation. Not monotone: a
    larger violation also enlarges the divisor.

    Args:
        learning_rate: η > 0, change of ln λ per update.
        initial: λ₀ in [``minimum``, ``maximum``]. ALGD: ln 2.
        minimum: λ_min > 0: without an end, ln λ takes as long to come back as the constraint was kept.
        maximum: λ_max ≥ ``minimum``.
        mean_smoothing: β₁ in [0, 1).
        square_smoothing: β₂ in [0, 1).
        epsilon: ε > 0, the λ v below which steps get smaller.

    Raises:
        ConfigurationError: if an argument is out of range, or the range is inverted.

    Example:
        >>> adam = AdamLogDual(learning_rate=0.1)
        >>> state, lam = adam.update(adam.init(), 7.0)
        >>> round(lam, 4)
        1.1052
    """

    state_type = AdamLogDualState
    monotone = False

    def __init__(
        self,
        learning_rate: float = 0.05,
        *,
        initial: float = 1.0,
        minimum: float = 1e-3,
        maximum: float = 1e3,
        mean_smoothing: float = 0.9,
        square_smoothing: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        owner = "AdamLogDual"
        self.learning_rate = check_gain(owner, "learning_rate", learning_rate, positive=True)
        self.minimum, self.maximum = check_range(owner, minimum, maximum)
        self.initial = check_within(owner, initial, self.minimum, self.maximum)
        self.mean_smoothing = check_share(owner, "mean_smoothing", mean_smoothing)
        self.square_smoothing = check_share(owner, "square_smoothing", square_smoothing)
        self.epsilon = check_gain(owner, "epsilon", epsilon, positive=True)

    def init(self) -> AdamLogDualState:
        """Return λ₀ with empty moments."""
        return AdamLogDualState(self.initial, 0.0, 0.0, 1.0, 1.0)

    def advance(self, state: AdamLogDualState, violation: Any, ops: Ops) -> AdamLogDualState:
        """Take one Adam step on ln λ."""
        beta1, beta2 = self.mean_smoothing, self.square_smoothing
        gradient = state.multiplier * violation
        mean = beta1 * state.mean + (1.0 - beta1) * gradient
        square = beta2 * state.square + (1.0 - beta2) * gradient * gradient
        decay1, decay2 = state.mean_decay * beta1, state.square_decay * beta2
        step = (mean / (1.0 - decay1)) / (ops.sqrt(square / (1.0 - decay2)) + self.epsilon)
        factor = ops.exp(ops.clip(self.learning_rate * step, -600.0, 600.0))  # as in LogDual
        lam = ops.clip(state.multiplier * factor, self.minimum, self.maximum)
        return AdamLogDualState(lam, mean, square, decay1, decay2)


def check_range(owner: str, minimum: float, maximum: float) -> tuple[float, float]:
    """Return both ends of a range of strengths if 0 < minimum ≤ maximum.

    Raises:
        ConfigurationError: otherwise.
    """
    low = check_gain(owner, "minimum", minimum, positive=True)
    high = check_gain(owner, "maximum", maximum, positive=True)
    if low > high:
        raise ConfigurationError(f"{owner}: minimum {low:g} is above maximum {high:g}. Swap them.")
    return low, high


def check_within(owner: str, initial: float, minimum: float, maximum: float) -> float:
    """Return the initial strength if it lies in the range.

    Raises:
        ConfigurationError: otherwise.
    """
    value = check_gain(owner, "initial", initial)
    if not minimum <= value <= maximum:
        raise ConfigurationError(
            f"{owner}: initial {value:g} is outside [minimum, maximum] = [{minimum:g}, {maximum:g}]. "
            "Move it inside or widen the range."
        )
    return value
