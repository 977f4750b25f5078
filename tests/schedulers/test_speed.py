"""The speed promises. The best of several rounds is compared, so that a busy machine does not decide."""

import timeit

import numpy as np
import pytest

from guardrails.schedulers import BUILTIN


def best(call, number):
    return min(timeit.repeat(call, number=number, repeat=15)) / number


@pytest.mark.parametrize("name", BUILTIN)
def test_one_update_takes_at_most_5_microseconds(name):
    scheduler = BUILTIN[name]()
    state = scheduler.init()
    for _ in range(20):
        state, _ = scheduler.update(state, 0.3)
    assert best(lambda: scheduler.update(state, 0.3), 300) <= 5e-6


@pytest.mark.parametrize("name", BUILTIN)
def test_a_thousand_constraints_take_at_most_200_microseconds(name):
    scheduler = BUILTIN[name]()
    violations = np.random.default_rng(0).normal(0.0, 2.0, 1000)
    states = scheduler.init_many(1000)
    for _ in range(20):
        states, _ = scheduler.update_many(states, violations)
    assert best(lambda: scheduler.update_many(states, violations), 20) <= 200e-6
