"""The contract suite fails schedulers that break one promise each."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from guardrails.schedulers import DualAscent
from guardrails.schedulers.dual import DualAscentState
from guardrails.testing import SchedulerContract


class Negative(DualAscent):
    def update(self, state, violation):
        lam = state.multiplier + self.learning_rate * max(-1e9, min(violation, 1e9))
        return DualAscentState(lam), lam


class Infinite(DualAscent):
    def update(self, state, violation):
        lam = max(0.0, state.multiplier + 1e300 * violation)
        return DualAscentState(lam), lam


class OtherStrength(DualAscent):
    def update(self, state, violation):
        after, lam = super().update(state, violation)
        return after, lam + 1.0


class Counting(DualAscent):
    """Keeps state in the scheduler object."""

    calls = 0

    def update(self, state, violation):
        self.calls += 1
        lam = super().update(state, violation)[1]
        return DualAscentState(lam / self.calls), lam / self.calls


class ListState(NamedTuple):
    multiplier: float
    seen: Any


class Mutating(DualAscent):
    state_type = ListState

    def init(self):
        return ListState(0.0, [])

    def update(self, state, violation):
        state.seen.append(violation)
        return ListState(1.0, state.seen), 1.0


class Rounding(DualAscent):
    def dump(self, state):
        return {**super().dump(state), "multiplier": round(state.multiplier, 3)}


class Trusting(DualAscent):
    def load(self, data):
        return DualAscentState(data["multiplier"])


class Backwards(DualAscent):
    def update(self, state, violation):
        lam = 1.0 / (1.0 + min(max(violation, 0.0), 1e9))
        return DualAscentState(lam), lam


class ManyDiffers(DualAscent):
    def update_many(self, states, violations):
        states, strengths = super().update_many(states, violations)
        return DualAscentState(np.nextafter(strengths, math.inf)), np.nextafter(strengths, math.inf)


class Retracking(DualAscent):
    def track(self, before, after, strength):
        return DualAscentState(0.5 * strength)


class Absolute(DualAscent):
    """Reacts to something that is not the scaled violation."""

    offset = 0.0

    def update(self, state, violation):
        self.offset += 1.0
        return DualAscentState(self.offset), self.offset


CASES = [
    (Negative, SchedulerContract.test_strength_is_finite_and_never_negative),
    (Infinite, SchedulerContract.test_strength_is_finite_and_never_negative),
    (OtherStrength, SchedulerContract.test_strength_in_force_is_the_one_returned),
    (Counting, SchedulerContract.test_init_and_update_are_pure),
    (Mutating, SchedulerContract.test_init_and_update_are_pure),
    (Rounding, SchedulerContract.test_state_survives_json_bit_for_bit),
    (Rounding, SchedulerContract.test_resuming_anywhere_equals_not_stopping),
    (Trusting, SchedulerContract.test_foreign_newer_and_damaged_states_are_refused),
    (Backwards, SchedulerContract.test_a_larger_violation_never_gives_a_smaller_strength),
    (ManyDiffers, SchedulerContract.test_many_constraints_in_one_call_equal_one_by_one),
    (Retracking, SchedulerContract.test_a_cap_holds_and_scheduling_goes_on_below_it),
    (Absolute, SchedulerContract.test_scaling_costs_and_limit_together_changes_nothing),
]


@pytest.mark.parametrize(("kind", "promise"), CASES, ids=lambda each: each.__name__)
def test_a_broken_promise_is_caught(kind, promise):
    with pytest.raises(AssertionError):
        promise(SchedulerContract(), kind())
    promise(SchedulerContract(), DualAscent())


def test_every_promise_has_a_scheduler_that_breaks_it():
    promises = {getattr(SchedulerContract, name) for name in dir(SchedulerContract) if name.startswith("test_")}
    assert {promise for _, promise in CASES} == promises


def test_an_empty_list_is_an_error_not_a_pass():
    class Nothing(SchedulerContract):
        pass

    with pytest.raises(AssertionError, match="Nothing must set 'schedulers'"):
        Nothing().pytest_generate_tests(None)
