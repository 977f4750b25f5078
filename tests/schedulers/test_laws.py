"""Laws that hold for any gains and any finite violations."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guardrails import Constraint, Guard, Rollout
from guardrails.schedulers import (
    CRPO,
    PID,
    AdamAscent,
    AdaptiveKL,
    Anneal,
    AugmentedLagrangian,
    Cap,
    DualAscent,
    Fixed,
    LogDual,
    Margin,
    NuPI,
    RateLimit,
    Smooth,
    Warmup,
    unstack,
)

LAW = settings(max_examples=150, deadline=None, derandomize=True)

anything = st.floats(allow_nan=False, allow_infinity=False)
usual = st.floats(-1.0, 30.0)
violations = st.lists(st.one_of(usual, anything), min_size=1, max_size=25)

gain = st.floats(0.0, 1e9)
positive = st.floats(1e-9, 1e9)
share = st.floats(0.0, 0.999999)
count = st.integers(1, 8)


def ordered(low, high):
    return (low, high) if low <= high else (high, low)


def log_dual(rate, a, b, c):
    low, middle, high = sorted((a, b, c))
    return LogDual(rate, initial=middle, minimum=low, maximum=high)


def adaptive_kl(a, b, c, clip):
    low, middle, high = sorted((a, b, c))
    return AdaptiveKL(middle, batch_size=0.9, horizon=1e9, clip=clip, minimum=low, maximum=high)


def augmented(a, b, rate, initial, factor, increment, tolerance):
    low, high = ordered(a, b)
    return AugmentedLagrangian(
        low,
        learning_rate=rate,
        initial=initial,
        growth_factor=factor,
        growth_increment=increment,
        tolerance=tolerance,
        penalty_max=high,
    )


def strict_pid(kp, ki, kd, alpha, beta, delay, ceiling, start):
    return PID(
        kp, ki, kd, smoothing_p=alpha, smoothing_d=beta, delay=delay, integral_max=ceiling, initial=min(start, ceiling)
    )


plain = st.one_of(
    st.builds(DualAscent, positive, initial=gain),
    st.builds(AdamAscent, positive, initial=gain, mean_smoothing=share, square_smoothing=share, epsilon=positive),
    st.builds(log_dual, positive, positive, positive, positive),
    st.builds(strict_pid, gain, gain, gain, share, share, count, positive, gain),
    st.builds(NuPI, gain, gain, nu=share, initial=gain),
    st.builds(augmented, positive, positive, st.none() | positive, gain, st.floats(1.0, 1e9), gain, gain),
    st.builds(adaptive_kl, positive, positive, positive, positive),
    st.builds(Fixed, gain),
    st.builds(Anneal, gain, gain, updates=count, shape=st.sampled_from(["linear", "cosine"])),
    st.builds(CRPO, gain, weight=positive),
)
schedulers = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.builds(Warmup, inner, count),
        st.builds(Cap, inner, positive),
        st.builds(Smooth, inner, share),
        st.builds(RateLimit, inner, positive),
        st.builds(Margin, inner, share),
    ),
    max_leaves=3,
)


def run(scheduler, stream, state=None):
    states, state = [], scheduler.init() if state is None else state
    for violation in stream:
        state, strength = scheduler.update(state, violation)
        assert scheduler.strength(state) == strength
        states.append(state)
    return states


@LAW
@given(schedulers, violations)
@example(PID(1e9, 1e9, 1e9, integral_max=1e9), [1e300, -1e300, 1e300])
def test_strength_is_finite_and_never_negative(scheduler, stream):
    for state in run(scheduler, stream):
        assert 0.0 <= state.multiplier < math.inf
        json.dumps(scheduler.dump(state), allow_nan=False)


@LAW
@given(schedulers, violations, st.data())
def test_state_round_trips_and_resume_equals_uninterrupted(scheduler, stream, data):
    states = run(scheduler, stream)
    stop = data.draw(st.integers(0, len(stream) - 1))
    loaded = scheduler.load(json.loads(json.dumps(scheduler.dump(states[stop]))))
    assert repr(loaded) == repr(states[stop])
    assert repr(run(scheduler, stream[stop + 1 :], loaded)) == repr(states[stop + 1 :])


@LAW
@given(schedulers, violations)
def test_same_input_gives_same_output(scheduler, stream):
    assert repr(run(scheduler, stream)) == repr(run(scheduler, stream))


@LAW
@given(
    schedulers.filter(lambda each: each.monotone), violations, st.one_of(usual, anything), st.one_of(usual, anything)
)
def test_a_larger_violation_never_gives_a_smaller_strength(scheduler, stream, a, b):
    state, (low, high) = run(scheduler, stream)[-1], ordered(a, b)
    _, weak = scheduler.update(state, low)
    _, strong = scheduler.update(state, high)
    # a sum of terms that cancel may lose its last digits: one part in 1e12 of the largest term, at most 1e18
    assert weak <= strong or weak - strong <= 1e-12 * max(1.0, *(abs(v) for v in numbers(state)))


def numbers(state):
    return [number for value in state for number in (numbers(value) if isinstance(value, tuple) else [value])]


@LAW
@given(schedulers, st.lists(st.lists(st.one_of(usual, anything), min_size=3, max_size=3), min_size=1, max_size=10))
def test_many_constraints_in_one_call_equal_one_by_one(scheduler, rows):
    many, singles = scheduler.init_many(3), [scheduler.init()] * 3
    for row in rows:
        many, strengths = scheduler.update_many(many, np.array(row))
        singles = [scheduler.update(state, v)[0] for state, v in zip(singles, row, strict=True)]
        assert repr(unstack(many)) == repr(singles)
        assert strengths.tolist() == [state.multiplier for state in singles]


@LAW
@given(schedulers, violations, positive)
def test_a_cap_is_never_exceeded(scheduler, stream, maximum):
    assert all(state.multiplier <= maximum for state in run(Cap(scheduler, maximum), stream))


@LAW
@given(schedulers, violations, st.floats(1e-6, 1e6))
def test_a_rate_limit_is_never_exceeded(scheduler, stream, change):
    limited = RateLimit(scheduler, change)
    path = [limited.init().multiplier, *(state.multiplier for state in run(limited, stream))]
    # near 1e9 a step of 1e-6 is rounded to a few ulp of λ
    assert all(abs(b - a) <= change + 4 * math.ulp(max(a, b)) for a, b in itertools.pairwise(path))


@LAW
@given(
    schedulers,
    st.lists(st.floats(0.0, 1e6), min_size=1, max_size=25),
    st.floats(0.01, 100.0),
    st.integers(-30, 30),
    st.sampled_from(["<=", ">="]),
    st.none() | st.floats(0.01, 100.0),
)
def test_scaling_costs_limit_and_scale_together_changes_nothing(scheduler, costs, limit, power, sense, scale):
    factor = 2.0**power  # scales floats without rounding
    paths = []
    for by in (1.0, factor):
        constraint = Constraint(
            "c", limit=limit * by, sense=sense, scale=None if scale is None else scale * by, scheduler=scheduler
        )
        guard = Guard(constraint)
        paths.append([guard.step(Rollout(costs={"c": [cost * by]})).multipliers["c"] for cost in costs])
    assert paths[0] == paths[1]


@LAW
@given(violations)
def test_upper_and_lower_limits_mirror_each_other(costs):
    paths = []
    for sense, sign in (("<=", 1.0), (">=", -1.0)):
        guard = Guard(Constraint("c", limit=0.0, scale=1.0, sense=sense, scheduler=DualAscent(0.5)))
        paths.append([guard.step(Rollout(costs={"c": [sign * cost]})).multipliers["c"] for cost in costs])
    assert paths[0] == paths[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_violation_that_is_not_finite_is_refused(bad):
    scheduler = PID()
    with pytest.raises(ValueError, match=r"Constraint\.measure"):
        scheduler.update(scheduler.init(), bad)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        scheduler.update_many(scheduler.init_many(2), np.array([0.0, bad]))
