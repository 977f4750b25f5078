"""NuPI: proportional-integral control in incremental form (Sohrabi et al. 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

from guardrails.schedulers.base import check_gain, check_share
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops
from guardrails.schedulers.rows import LARGEST


class NuPIState(NamedTuple):
    """State of `NuPI`: the multiplier, ξ, and whether ξ holds a measurement (0 or 1)."""

    multiplier: float
    smoothed: float
    started: float


class NuPI(ElementwiseScheduler[NuPIState]):
    """ξ ← νξ + (1-ν)v;  λ ← [λ + K_I v + K_P (ξ - ξ₋₁)]₊, with ξ₋₁ the first v (arXiv 2406.04558).

    The first update is therefore one of dual ascent, K_I v. With K_P = 0 all are; with K_P = K_I and
    ν = 0 it is the optimistic gradient method. Since the projection is part of the recursion, there is
    no integral to wind up below λ = 0. P counts from the first v: while a large first violation shrinks,
    it lowers λ, so K_P well above K_I leaves such a run without a multiplier.

    Args:
        kp: K_P ≥ 0, λ per scale unit by which the smoothed violation changes.
        ki: K_I ≥ 0, λ per scale unit of violation and update.
        nu: ν in [0, 1), smoothing of the proportional term over about 1 / (1-ν) updates.
        initial: λ₀ ≥ 0.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> nupi = NuPI(kp=1.0, ki=0.5, nu=0.0)
        >>> state, lam = nupi.update(nupi.init(), 1.0)
        >>> nupi.update(state, 2.0)[1]
        2.5
    """

    state_type = NuPIState

    def __init__(self, kp: float = 0.5, ki: float = 0.1, *, nu: float = 0.5, initial: float = 0.0) -> None:
        self.kp = check_gain("NuPI", "kp", kp)
        self.ki = check_gain("NuPI", "ki", ki)
        self.nu = check_share("NuPI", "nu", nu)
        self.initial = check_gain("NuPI", "initial", initial)

    def init(self) -> NuPIState:
        """Return λ₀, before the first measurement."""
        return NuPIState(self.initial, 0.0, 0.0)

    def advance(self, state: NuPIState, violation: Any, ops: Ops) -> NuPIState:
        """Take one projected step."""
        previous = ops.where(state.started > 0.0, state.smoothed, violation)
        smoothed = self.nu * previous + (1.0 - self.nu) * violation
        step = self.ki * violation + self.kp * (smoothed - previous)
        lam = ops.clip(state.multiplier + step, 0.0, LARGEST)
        return NuPIState(lam, smoothed, ops.where(state.started > 0.0, state.started, 1.0))
