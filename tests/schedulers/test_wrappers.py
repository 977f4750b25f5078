"""Wrappers: what they change, and that the scheduler inside does not run away from them."""

import json

import pytest

from guardrails.errors import StateError
from guardrails.schedulers import (
    PID,
    AdaptiveKL,
    AugmentedLagrangian,
    Cap,
    DualAscent,
    Fixed,
    LogDual,
    Margin,
    RateLimit,
    Smooth,
    Warmup,
)


def path(scheduler, violations, state=None):
    state, strengths = scheduler.init() if state is None else state, []
    for violation in violations:
        state, strength = scheduler.update(state, violation)
        strengths.append(strength)
    return strengths


def last(scheduler, violations):
    state = scheduler.init()
    for violation in violations:
        state, _ = scheduler.update(state, violation)
    return state


def test_warmup_hides_the_first_measurements():
    assert path(Warmup(DualAscent(1.0), updates=2), [50.0, 50.0, 1.0, 1.0]) == [0.0, 0.0, 1.0, 2.0]


def test_warmup_ends_at_the_start_of_the_scheduler_inside():
    warm = Warmup(LogDual(0.1, initial=1.0), updates=2)
    assert warm.init().multiplier == 0.0
    assert path(warm, [9.0, 9.0]) == [0.0, 1.0]


def test_warmup_asks_no_loss_before_it_ends():
    warm = Warmup(AugmentedLagrangian(1.0), updates=2)
    state = warm.init()
    state, _ = warm.update(state, 3.0)
    assert warm.penalty(state, 3.0) == 0.0
    state, _ = warm.update(state, 3.0)
    assert warm.penalty(state, 3.0) == 4.5


@pytest.mark.parametrize(
    "inner",
    [
        DualAscent(0.5),
        AugmentedLagrangian(0.5),
        AugmentedLagrangian(1.0, learning_rate=0.5, growth_factor=1.5),
        PID(),
        Smooth(DualAscent(0.5), 0.0),
        RateLimit(DualAscent(0.5), 2.0),
        Warmup(DualAscent(0.5), updates=3),
    ],
    ids=repr,
)
def test_capped_scheduler_leaves_the_cap_as_soon_as_the_limit_is_kept(inner):
    """Without telling the scheduler inside, 1,000 violated updates would have to be undone first."""
    capped = Cap(inner, 3.0)
    state = last(capped, [5.0] * 1000)
    assert state.multiplier == 3.0
    after = path(capped, [-1.0] * 20, state)
    assert after[0] <= 3.0
    assert after[4] < 3.0
    assert after[-1] < 0.5


def test_capped_penalty_coefficient_does_not_grow_unseen():
    """v = 1 gives λ = 1 with ρ = 1, then 3 with ρ = 2; from then on the cap bites and both rest."""
    state = last(Cap(AugmentedLagrangian(1.0, growth_factor=2.0), 3.0), [1.0] * 50)
    assert (state.inner.dual, state.inner.penalty_coefficient) == (3.0, 4.0)


def test_cap_holds_for_the_initial_strength_too():
    assert Cap(Fixed(5.0), 2.0).init().multiplier == 2.0
    assert path(Cap(Fixed(5.0), 2.0), [0.0]) == [2.0]


def test_cap_bounds_the_loss_term():
    capped = Cap(AugmentedLagrangian(10.0), 2.0)
    state = last(capped, [5.0] * 3)
    assert capped.penalty(state, 4.0) == 8.0


def test_below_its_cap_a_scheduler_is_left_alone():
    stream = [0.5, 0.2, -0.3, 0.9, -1.0, 0.1]
    assert path(Cap(PID(), 100.0), stream) == path(PID(), stream)


def test_smoothing_starts_at_the_first_measurement():
    assert path(Smooth(DualAscent(1.0), smoothing=0.5), [4.0, 0.0, 0.0]) == [4.0, 6.0, 7.0]


def test_smoothing_of_zero_changes_nothing():
    stream = [0.5, -0.2, 3.0]
    assert path(Smooth(PID(), 0.0), stream) == path(PID(), stream)


def test_rate_limit_bounds_rise_and_fall():
    limited = RateLimit(PID(1.0, 0.0, 0.0, smoothing_p=0.0), 1.0)
    assert path(limited, [3.0, 3.0, 3.0, 3.0, -1.0, -1.0]) == [1.0, 2.0, 3.0, 3.0, 2.0, 1.0]


def test_rate_limited_dual_does_not_run_ahead():
    """The sum of violations stays where the host is, so it turns at once."""
    limited = RateLimit(DualAscent(1.0), 0.1)
    assert path(limited, [5.0] * 10 + [-1.0])[-2:] == pytest.approx([1.0, 0.9])


def test_rate_limit_keeps_what_the_integral_has_learnt():
    """A short burst must not erase I: it rests while the limit bites and is there when the burst is over."""
    pid = PID(1.0, 0.1, 0.0, smoothing_p=0.0)
    limited = RateLimit(pid, 0.5)
    state = last(limited, [0.5] * 60)
    learnt = state.inner.integral
    for violation in (5.0, 5.0, 5.0):
        state, _ = limited.update(state, violation)
    assert learnt > 2.0
    assert state.inner.integral == pytest.approx(learnt)


def test_wrappers_nest_and_their_state_is_json():
    nested = Warmup(RateLimit(Smooth(Cap(PID(), 3.0), 0.5), 0.3), updates=2)
    state = last(nested, [5.0, 1.0, -1.0, 2.0])
    text = json.dumps(nested.dump(state))
    assert nested.load(json.loads(text)) == state
    assert json.loads(text)["inner"]["inner"]["inner"]["inner"]["scheduler"] == "PID"


def test_a_wrapped_state_of_another_scheduler_is_refused():
    saved = Cap(Fixed(1.0), 3.0).dump(Cap(Fixed(1.0), 3.0).init())
    with pytest.raises(StateError, match="saved by Fixed, not DualAscent"):
        Cap(DualAscent(), 3.0).load(saved)


def test_wrappers_pass_on_what_the_scheduler_inside_can_do():
    from guardrails.schedulers import AdamAscent, AdaptiveKL

    assert Cap(AdaptiveKL(), 1.0).two_sided
    assert Cap(AdaptiveKL(), 1.0).relative
    assert not Cap(PID(), 1.0).two_sided
    assert not Smooth(AdamAscent()).monotone


def test_a_margin_holds_the_cost_inside_the_limit_by_that_share():
    """J = 3 / (1 + λ) settles where the scheduler inside sees no violation: at (1 - m) of the limit."""
    scheduler, limit, cost = Margin(DualAscent(0.2), 0.25), 1.0, 3.0
    state = scheduler.init()
    for _ in range(500):
        state, multiplier = scheduler.update(state, cost / limit - 1.0)
        cost = 3.0 / (1.0 + multiplier)
    assert cost == pytest.approx(0.75 * limit, rel=1e-6)


def test_a_margin_moves_the_loss_term_of_the_scheduler_inside_too():
    augmented = AugmentedLagrangian(0.5)
    wrapped = Margin(augmented, 0.25)
    state, _ = wrapped.update(wrapped.init(), 1.0)
    inner, _ = augmented.update(augmented.init(), 1.25)
    assert wrapped.penalty(state, 0.5) == augmented.penalty(inner, 0.75)


def test_a_margin_of_a_target_means_nothing():
    assert not Margin(AdaptiveKL(), 0.1).two_sided
