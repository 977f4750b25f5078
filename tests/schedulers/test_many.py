"""Many constraints as one state of arrays: saved, resumed, and taken apart."""

import json

import numpy as np
import pytest

from guardrails.schedulers import PID, Cap, DualAscent, Warmup, stack, unstack


@pytest.mark.parametrize("scheduler", [DualAscent(), PID(delay=3), Warmup(Cap(PID(), 2.0), updates=2)])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_many_constraints_are_saved_and_resumed_row_by_row(scheduler, stop):
    violations = np.random.default_rng(0).normal(0.3, 1.0, (12, 4))
    whole = scheduler.init_many(4)
    for step, row in enumerate(violations):
        if step == stop:
            saved = json.dumps([scheduler.dump(each) for each in unstack(whole)])
        whole, _ = scheduler.update_many(whole, row)
    resumed = stack([scheduler.load(each) for each in json.loads(saved)])
    for row in violations[stop:]:
        resumed, strengths = scheduler.update_many(resumed, row)
    assert repr(unstack(resumed)) == repr(unstack(whole))
    assert strengths.tolist() == whole.multiplier.tolist()


def test_rows_do_not_disturb_each_other():
    scheduler = PID()
    alone, among = scheduler.init_many(1), scheduler.init_many(3)
    for violation in (2.0, -0.5, 1.0):
        alone, _ = scheduler.update_many(alone, np.array([violation]))
        among, _ = scheduler.update_many(among, np.array([1e9, violation, -1e9]))
    assert repr(unstack(among)[1]) == repr(unstack(alone)[0])


def test_states_of_arrays_are_left_as_they_were():
    scheduler = PID()
    states, _ = scheduler.update_many(scheduler.init_many(2), np.array([1.0, 2.0]))
    before = repr(states)
    violations = np.array([3.0, -1.0])
    scheduler.update_many(states, violations)
    assert repr(states) == before
    assert violations.tolist() == [3.0, -1.0]


def test_a_negative_zero_comes_out_as_zero_in_both():
    scheduler = DualAscent(initial=-0.0)
    assert repr(scheduler.update(scheduler.init(), -0.0)[1]) == "0.0"
    assert repr(scheduler.update_many(scheduler.init_many(1), np.array([-0.0]))[1].tolist()) == "[0.0]"
