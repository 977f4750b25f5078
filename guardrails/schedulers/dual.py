"""Dual ascent: gradient steps on the Lagrange multiplier, plain or by Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

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
