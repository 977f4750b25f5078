"""PID control of a Lagrange multiplier (Stooke et al. 2020, "Responsive Safety in RL by PID Lagrangian")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from guardrails.errors import ConfigurationError, StateError
from guardrails.schedulers.base import check_gain, check_share, whole_number
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops, held
from guardrails.schedulers.rows import LARGEST


class PIDState(NamedTuple):
    """State of `PID`: the multiplier in force, the integral, both smoothed signals and D's history."""

    multiplier: float
    integral: float
    proportional: float
    smoothed: float
    history: tuple[float, ...]


class PID(ElementwiseScheduler[PIDState]):
    """Multiplier by a PID controller on the violation v.

    P ← αP + (1-α)v;  J̄ ← βJ̄ + (1-β)v;  D ← [J̄ - J̄₋ₖ]₊;
    I ← [min(I + K_I v, max(I, I_max - K_P P - K_D D))]₊, at most I_max;
    λ ← [K_P P + I + K_D D]₊.

    While λ is below I_max this is the paper's controller. Above it, I no longer rises (conditional
    integration): what P and D already supply needs no integral, and would have to be unwound later at
    a rate that v ≥ -1 bounds. J̄ starts at the first v, so that the first measurement is no rise.
    Smoothing v instead of J leaves D as in the paper while the limit stands still; a limit that is
    tightened counts as a rise.

    The defaults suit runs of 50 to 150 updates that start at v between 3 and 30, with the default scale;
    ``benchmarks/schedulers.py`` shows them on such plants.

    Args:
        kp: K_P ≥ 0, λ per scale unit of smoothed violation.
        ki: K_I ≥ 0, λ per scale unit of violation and update.
        kd: K_D ≥ 0, λ per scale unit that the smoothed violation rose over ``delay`` updates.
        smoothing_p: α in [0, 1), 0 = no smoothing; averages over about 1 / (1-α) updates.
        smoothing_d: β in [0, 1).
        delay: k ≥ 1 updates over which D looks back.
        integral_max: I_max > 0, the λ up to which the integral may carry it.
        initial: I₀ in [0, I_max], λ before the first update; above 0 for a run that starts strict.

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
        kp: float = 1.0,
        ki: float = 0.1,
        kd: float = 0.1,
        *,
        smoothing_p: float = 0.7,
        smoothing_d: float = 0.7,
        delay: int = 5,
        integral_max: float = 10.0,
        initial: float = 0.0,
    ) -> None:
        self.kp = check_gain("PID", "kp", kp)
        self.ki = check_gain("PID", "ki", ki)
        self.kd = check_gain("PID", "kd", kd)
        self.smoothing_p = check_share("PID", "smoothing_p", smoothing_p)
        self.smoothing_d = check_share("PID", "smoothing_d", smoothing_d)
        self.delay = whole_number("PID", "delay", delay)
        self.integral_max = check_gain("PID", "integral_max", integral_max, positive=True)
        self.initial = check_gain("PID", "initial", initial)
        if self.initial > self.integral_max:
            raise ConfigurationError(
                f"PID: initial {self.initial:g} is above integral_max {self.integral_max:g}, up to which the integral "
                "may carry the multiplier. Lower the one or raise the other."
            )

    def init(self) -> PIDState:
        """Return a controller at rest, its integral at I₀."""
        return PIDState(self.initial, self.initial, 0.0, 0.0, ())

    def advance(self, state: PIDState, violation: Any, ops: Ops) -> PIDState:
        """Advance the controller by one measurement."""
        alpha, beta = self.smoothing_p, self.smoothing_d
        proportional = alpha * state.proportional + (1.0 - alpha) * violation
        smoothed = beta * state.smoothed + (1.0 - beta) * violation if state.history else violation
        past = state.history[0] if state.history else smoothed
        derivative = ops.clip(smoothed - past, 0.0, 2.0 * LARGEST)
        direct = self.kp * proportional + self.kd * derivative
        room = ops.clip(self.integral_max - direct, state.integral, self.integral_max)
        integral = ops.clip(state.integral + self.ki * violation, 0.0, room)
        lam = ops.clip(direct + integral, 0.0, LARGEST)
        history = (*state.history, smoothed)[-self.delay :]
        return PIDState(lam, integral, proportional, smoothed, history)

    def load(self, data: Mapping[str, Any]) -> PIDState:
        """Return the state that `dump` wrote; see `ConstraintScheduler.load`.

        Raises:
            StateError: also if it was saved with a longer ``delay``.
        """
        state = super().load(data)
        if not isinstance(state.history, tuple) or len(state.history) > self.delay:
            raise StateError(
                f"The saved history of PID is {state.history!r:.60}; delay={self.delay} keeps at most {self.delay} "
                "numbers. Configure the delay that the run was saved with."
            )
        return state

    def advance_tracking(self, before: PIDState, after: PIDState, strength: Any, ops: Ops) -> PIDState:
        """Hold the integral while a wrapper limits λ in the direction in which it moves."""
        integral = held(before.integral, after.integral, strength, after.multiplier, ops)
        return after._replace(multiplier=strength, integral=integral)
