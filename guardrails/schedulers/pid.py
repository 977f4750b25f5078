"""PID control of a Lagrange multiplier (Stooke et al. 2020, "Responsive Safety in RL by PID Lagrangian")."""

from __future__ import annotations

from typing import NamedTuple

from guardrails.schedulers.base import ConstraintScheduler, check_number


class PIDState(NamedTuple):
    """State of `PID`: the multiplier in force, the integral, both smoothed signals and D's history."""

    multiplier: float
    integral: float
    proportional: float
    smoothed: float
    history: tuple[float, ...]


class PID(ConstraintScheduler[PIDState]):
    """Multiplier by a PID controller on the violation v.

    I ← clip(I + K_I v, 0, I_max);  P ← αP + (1-α)v;  J̄ ← βJ̄ + (1-β)v;  D ← [J̄ - J̄₋ₖ]₊;
    λ ← [K_P P + I + K_D D]₊.

    The limit is constant between two updates, so smoothing v instead of J leaves D the same.

    Args:
        kp: K_P ≥ 0, λ per unit of smoothed violation.
        ki: K_I ≥ 0, λ per unit of violation and update.
        kd: K_D ≥ 0, λ per unit of rise of the smoothed violation over ``delay`` updates.
        smoothing_p: α in [0, 1), 0 = no smoothing.
        smoothing_d: β in [0, 1).
        delay: k ≥ 1 updates over which D looks back.
        integral_max: I_max > 0, the cap that keeps the integral from winding up.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> pid = PID(kp=0.0, ki=0.1, kd=0.0)
        >>> state, lam = pid.update(pid.init(), 2.0)
        >>> lam
        0.2
    """

    state_type = PIDState

    def __init__(
        self,
        kp: float = 0.1,
        ki: float = 0.05,
        kd: float = 0.01,
        *,
        smoothing_p: float = 0.9,
        smoothing_d: float = 0.9,
        delay: int = 10,
        integral_max: float = 10.0,
    ) -> None:
        self.kp = check_number("PID", "kp", kp, low=0.0)
        self.ki = check_number("PID", "ki", ki, low=0.0)
        self.kd = check_number("PID", "kd", kd, low=0.0)
        self.smoothing_p = check_number("PID", "smoothing_p", smoothing_p, low=0.0, high=1.0 - 1e-12)
        self.smoothing_d = check_number("PID", "smoothing_d", smoothing_d, low=0.0, high=1.0 - 1e-12)
        self.delay = int(check_number("PID", "delay", delay, low=1))
        self.integral_max = check_number("PID", "integral_max", integral_max, low=0.0, open_low=True)

    def init(self) -> PIDState:
        """Return a controller at rest."""
        return PIDState(0.0, 0.0, 0.0, 0.0, ())

    def update(self, state: PIDState, violation: float) -> tuple[PIDState, float]:
        """Advance the controller by one measurement."""
        integral = min(max(state.integral + self.ki * violation, 0.0), self.integral_max)
        proportional = self.smoothing_p * state.proportional + (1.0 - self.smoothing_p) * violation
        smoothed = self.smoothing_d * state.smoothed + (1.0 - self.smoothing_d) * violation
        past = state.history[0] if state.history else smoothed
        derivative = max(0.0, smoothed - past)
        lam = max(0.0, self.kp * proportional + integral + self.kd * derivative)
        history = (*state.history, smoothed)[-self.delay :]
        return PIDState(lam, integral, proportional, smoothed, history), lam
