"""Switching: improve the reward while the limit holds, the cost alone while it does not (Xu et al. 2021, CRPO)."""

from __future__ import annotations

from typing import Any, NamedTuple

from guardrails.schedulers.base import check_gain
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops


class CRPOState(NamedTuple):
    """State of `CRPO`."""

    multiplier: float


class CRPO(ElementwiseScheduler[CRPOState]):
    """λ = Λ if v > η, else 0: a primal method, with no dual variable to tune.

    Hosts form (A_r - Σ λ A_c) / (1 + Σ λ), so Λ = 10⁶ makes the reward's share of the advantage 10⁻⁶,
    which is the cost alone within the noise of any rollout. Infinity would do it exactly, but is no
    JSON and turns the formula into NaN. With several violated constraints the paper picks one; here
    they share. On hosts that add λ to a loss instead, give a ``weight`` that the optimizer can bear.

    Args:
        tolerance: η ≥ 0, the scaled violation up to which the reward is still optimised.
        weight: Λ > 0.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> crpo = CRPO(tolerance=0.1)
        >>> crpo.update(crpo.init(), 0.05)[1], crpo.update(crpo.init(), 0.2)[1]
        (0.0, 1000000.0)
    """

    state_type = CRPOState

    def __init__(self, tolerance: float = 0.0, *, weight: float = 1e6) -> None:
        self.tolerance = check_gain("CRPO", "tolerance", tolerance)
        self.weight = check_gain("CRPO", "weight", weight, positive=True)

    def init(self) -> CRPOState:
        """Return 0: nothing was violated yet."""
        return CRPOState(0.0)

    def advance(self, state: CRPOState, violation: Any, ops: Ops) -> CRPOState:
        """Switch on the sign of v - η."""
        return CRPOState(ops.where(violation > self.tolerance, self.weight, 0.0))
