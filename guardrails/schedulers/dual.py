"""Dual ascent: gradient steps on the Lagrange multiplier, plain, by Adam, or on its logarithm."""

from __future__ import annotations

from typing import Any, NamedTuple

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_gain, check_share
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops
from guardrails.schedulers.rows import LARGEST


class DualAscentState(NamedTuple):
    """State of `DualAscent`."""

    multiplier: float


class DualAscent(ElementwiseScheduler[DualAscentState]):
    """λ ← [λ + η v]₊, projected gradient ascent on the dual (Ray et al. 2019).

    λ is the running sum of violations: after a long violation it takes as long to come down. Wrap it
    in `Cap` where that matters.

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

    def __init__(self, learning_rate: float = 0.1, *, initial: float = 0.0) -> None:
        self.learning_rate = check_gain("DualAscent", "learning_rate", learning_rate, positive=True)
        self.initial = check_gain("DualAscent", "initial", initial)

    def init(self) -> DualAscentState:
        """Return λ₀."""
        return DualAscentState(self.initial)

    def advance(self, state: DualAscentState, violation: Any, ops: Ops) -> DualAscentState:
        """Take one projected step."""
        return DualAscentState(ops.clip(state.multiplier + self.learning_rate * violation, 0.0, LARGEST))


class AdamAscentState(NamedTuple):
    """State of `AdamAscent`: both moments of v, and β₁ᵗ and β₂ᵗ for the bias correction."""

    multiplier: float
    mean: float
    square: float
    mean_decay: float
    square_decay: float


class AdamAscent(ElementwiseScheduler[AdamAscentState]):
    """Dual ascent with Adam's step, as OmniSafe's Lagrangian agents take it.

    m ← β₁m + (1-β₁)v;  s ← β₂s + (1-β₂)v²;  λ ← [λ + η (m / (1-β₁ᵗ)) / (√(s / (1-β₂ᵗ)) + ε)]₊.

    The step is about η whatever the size of the violation, so it needs no violation scale; in
    return λ does not hurry when the violation is large, and after a long violation its first steps
    down are smaller than η. Not monotone: a larger violation also enlarges the divisor.

    Args:
        learning_rate: η > 0, λ per update. OmniSafe's 0.035 is meant for runs of 500 updates.
        initial: λ₀ ≥ 0.
        mean_smoothing: β₁ in [0, 1).
        square_smoothing: β₂ in [0, 1).
        epsilon: ε > 0, the scaled violation below which steps get smaller.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> adam = AdamAscent(learning_rate=0.035)
        >>> state, lam = adam.update(adam.init(), 7.0)
        >>> round(lam, 6)
        0.035
    """

    state_type = AdamAscentState
    monotone = False

    def __init__(
        self,
        learning_rate: float = 0.1,
        *,
        initial: float = 0.0,
        mean_smoothing: float = 0.9,
        square_smoothing: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        self.learning_rate = check_gain("AdamAscent", "learning_rate", learning_rate, positive=True)
        self.initial = check_gain("AdamAscent", "initial", initial)
        self.mean_smoothing = check_share("AdamAscent", "mean_smoothing", mean_smoothing)
        self.square_smoothing = check_share("AdamAscent", "square_smoothing", square_smoothing)
        self.epsilon = check_gain("AdamAscent", "epsilon", epsilon, positive=True)

    def init(self) -> AdamAscentState:
        """Return λ₀ with empty moments."""
        return AdamAscentState(self.initial, 0.0, 0.0, 1.0, 1.0)

    def advance(self, state: AdamAscentState, violation: Any, ops: Ops) -> AdamAscentState:
        """Take one projected Adam step."""
        beta1, beta2 = self.mean_smoothing, self.square_smoothing
        mean = beta1 * state.mean + (1.0 - beta1) * violation
        square = beta2 * state.square + (1.0 - beta2) * violation * violation
        decay1, decay2 = state.mean_decay * beta1, state.square_decay * beta2
        step = (mean / (1.0 - decay1)) / (ops.sqrt(square / (1.0 - decay2)) + self.epsilon)
        lam = ops.clip(state.multiplier + self.learning_rate * step, 0.0, LARGEST)
        return AdamAscentState(lam, mean, square, decay1, decay2)


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
