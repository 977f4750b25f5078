"""Adaptive KL control: a coefficient that holds a divergence at its target (Ziegler et al. 2019)."""

from __future__ import annotations

from typing import Any, NamedTuple

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_gain
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops
from guardrails.schedulers.log_dual import check_range, check_within


class AdaptiveKLState(NamedTuple):
    """State of `AdaptiveKL`."""

    multiplier: float


class AdaptiveKL(ElementwiseScheduler[AdaptiveKLState]):
    """β ← β (1 + clip(KL / KL* - 1, ±c) n / H), kept within [``minimum``, ``maximum``].

    The constraint's limit is the target KL* > 0, so that the scaled violation v is KL / KL* - 1. It
    works towards the target from both sides: ``Constraint("kl", limit=0.1, sense="==",
    scheduler=AdaptiveKL())``.

    Args:
        initial: β₀ in [``minimum``, ``maximum``]; reward per nat where the cost is a KL divergence.
        batch_size: n > 0, rows per update, in the unit of ``horizon``.
        horizon: H > 0, rows over which β may change by a factor of about e^c.
        clip: c > 0, the relative error beyond which β changes no faster. c n / H must be below 1.
        minimum: β_min > 0.
        maximum: β_max ≥ ``minimum``.

    Raises:
        ConfigurationError: if an argument is out of range, or β could turn negative.

    Example:
        >>> kl = AdaptiveKL(initial=0.1, batch_size=1000, horizon=10_000)
        >>> state, beta = kl.update(kl.init(), 5.0)
        >>> beta
        0.10200000000000001
    """

    state_type = AdaptiveKLState
    two_sided = True
    relative = True

    def __init__(
        self,
        initial: float = 0.1,
        *,
        batch_size: float = 256,
        horizon: float = 10_000,
        clip: float = 0.2,
        minimum: float = 1e-4,
        maximum: float = 100.0,
    ) -> None:
        self.batch_size = check_gain("AdaptiveKL", "batch_size", batch_size, positive=True)
        self.horizon = check_gain("AdaptiveKL", "horizon", horizon, positive=True)
        self.clip = check_gain("AdaptiveKL", "clip", clip, positive=True)
        self.minimum, self.maximum = check_range("AdaptiveKL", minimum, maximum)
        self.initial = check_within("AdaptiveKL", initial, self.minimum, self.maximum)
        if self.clip * self.batch_size / self.horizon >= 1.0:
            raise ConfigurationError(
                f"AdaptiveKL: clip * batch_size / horizon is {self.clip * self.batch_size / self.horizon:g}, so one "
                "update could turn β negative. Raise horizon above clip * batch_size."
            )

    def init(self) -> AdaptiveKLState:
        """Return β₀."""
        return AdaptiveKLState(self.initial)

    def advance(self, state: AdaptiveKLState, violation: Any, ops: Ops) -> AdaptiveKLState:
        """Scale β by the clipped relative error."""
        factor = 1.0 + ops.clip(violation, -self.clip, self.clip) * (self.batch_size / self.horizon)
        return AdaptiveKLState(ops.clip(state.multiplier * factor, self.minimum, self.maximum))
