"""Every scheduler joins here with one line; third-party schedulers subclass `SchedulerContract` alike."""

import math
from typing import NamedTuple

from guardrails.schedulers import (
    BUILTIN,
    CRPO,
    PID,
    AdamAscent,
    AdamLogDual,
    AdaptiveKL,
    Anneal,
    Augmented,
    AugmentedLagrangian,
    Cap,
    ConstraintScheduler,
    DualAscent,
    Fixed,
    LogDual,
    Margin,
    NuPI,
    RateLimit,
    Smooth,
    Warmup,
)
from guardrails.testing import SchedulerContract


class BangBangState(NamedTuple):
    multiplier: float
    switches: float


class BangBang(ConstraintScheduler[BangBangState]):
    """What a third party writes: `init` and `update` on plain floats, nothing else."""

    state_type = BangBangState

    def init(self):
        return BangBangState(0.0, 0.0)

    def update(self, state, violation):
        multiplier = 2.0 if violation > 0.0 else 0.0
        return BangBangState(multiplier, state.switches + (multiplier != state.multiplier)), multiplier


class LogarithmState(NamedTuple):
    log_multiplier: float


class Logarithm(ConstraintScheduler[LogarithmState]):
    """A third party's that keeps ln λ, and therefore writes `strength` and `track` too."""

    state_type = LogarithmState

    def init(self):
        return LogarithmState(0.0)

    def update(self, state, violation):
        state = LogarithmState(min(max(state.log_multiplier + 0.1 * violation, -5.0), 2.0))
        return state, self.strength(state)

    def strength(self, state):
        return math.exp(state.log_multiplier)

    def track(self, before, after, strength):
        return after if strength == self.strength(after) else LogarithmState(math.log(strength))


EVERY = [
    DualAscent(),
    DualAscent(0.7, initial=2.0),
    AdamAscent(),
    AdamAscent(0.035, initial=0.001, mean_smoothing=0.0, square_smoothing=0.0),
    AdamLogDual(),
    AdamLogDual(3e-2, initial=0.6931, mean_smoothing=0.0, square_smoothing=0.9, maximum=2.0),
    LogDual(),
    LogDual(10.0, initial=0.5, minimum=0.1, maximum=0.5),
    PID(),
    PID(0.1, 0.01, 0.01, smoothing_p=0.95, smoothing_d=0.95, delay=10, integral_max=1.0),
    PID(0.0, 0.3, 0.0, smoothing_p=0.0, smoothing_d=0.0, delay=1, integral_max=1e9),
    PID(0.1, 0.01, 0.0, initial=0.3),
    NuPI(),
    NuPI(1.0, 0.1, nu=0.0, initial=0.3),
    AugmentedLagrangian(),
    AugmentedLagrangian(2.0, learning_rate=0.1, initial=0.3),
    AugmentedLagrangian(0.5, growth_factor=1.01),
    AugmentedLagrangian(0.5, growth_increment=1.0, penalty_max=5.0),
    AdaptiveKL(),
    Fixed(),
    Anneal(),
    Anneal(3.0, 0.1, updates=7, shape="cosine"),
    CRPO(),
    CRPO(0.1, weight=10.0),
    Augmented(AdamLogDual()),
    Augmented(PID(), 0.3),
    Cap(Augmented(DualAscent(), 2.0), 1.5),
    Warmup(PID(), updates=3),
    Warmup(LogDual(), updates=1),
    Cap(PID(), 2.0),
    Cap(AugmentedLagrangian(0.5, growth_factor=2.0), 3.0),
    Smooth(NuPI(), 0.8),
    RateLimit(PID(), 0.2),
    Margin(PID(), 0.1),
    Cap(Margin(AugmentedLagrangian(), 0.5), 2.0),
    RateLimit(CRPO(), 0.5),
    Warmup(RateLimit(Smooth(Cap(DualAscent(), 3.0)), 0.3), updates=5),
    BangBang(),
    Cap(BangBang(), 1.0),
    Warmup(Smooth(BangBang()), updates=2),
    Logarithm(),
    Warmup(Logarithm(), updates=2),
    Augmented(Logarithm(), 0.5),
    Cap(Augmented(Logarithm(), 0.5), 2.0),
]


class TestSchedulers(SchedulerContract):
    schedulers = EVERY


def test_every_built_in_scheduler_is_under_contract():
    assert set(BUILTIN.values()) <= {type(scheduler) for scheduler in EVERY}
    assert {Augmented, Warmup, Cap, Smooth, RateLimit, Margin} <= {type(scheduler) for scheduler in EVERY}
