"""How a critic's predictions are held against the costs that then came, worked out by hand."""

import numpy as np
import pytest

from guardrails_sb3.predictions import Predictions


def run(costs, means, *, risks=None, truncated=False, signs=(1.0,), units=(2.0,), gamma=0.5, horizon=10):
    watched = Predictions(1, np.array(units), list(signs), horizon, gamma)
    for step, cost in enumerate(costs):
        assert watched.due
        mean = np.full((1, len(units)), means[step], dtype=float)
        watched.predict(mean, mean if risks is None else np.full((1, len(units)), risks[step], dtype=float))
        last = step == len(costs) - 1
        watched.step(np.full((1, len(units)), cost, dtype=float), np.array([last]), np.array([last and truncated]))
    return watched.take()


def test_what_was_missed_is_the_mean_distance_to_the_discounted_costs_in_violation_scales():
    # cost-to-go of 1, 2, 4 at γ = 1/2: 3, 4, 4
    missed, sizes, covered = run([1.0, 2.0, 4.0], [3.0, 6.0, 0.0], risks=[3.0, 6.0, 0.0])
    assert missed[0].tolist() == [pytest.approx(-(0 + 2 + 4) / 3 / 2)], "too little on the whole"
    assert sizes.tolist() == [pytest.approx(1.0)]
    assert covered.tolist() == [pytest.approx(2 / 3)]


def test_beyond_a_time_limit_the_last_prediction_stands_for_what_would_have_followed():
    # Q(s_2) = 10 stands for step 2 and after: cost-to-go 2 + 5 = 7 at step 1, 1 + 3.5 = 4.5 at step 0
    missed, _, _ = run([1.0, 2.0, 4.0], [4.5, 7.0, 10.0], truncated=True)
    assert missed[0].tolist() == [pytest.approx(0.0)]


def test_a_lower_limit_is_covered_where_the_risk_is_below_what_came():
    _, _, covered = run([1.0, 2.0], [0.0, 0.0], risks=[1.0, 3.0], signs=(-1.0,))
    assert covered.tolist() == [0.5]


def test_an_episode_too_short_to_judge_is_not_taken_for_foreseen():
    missed, sizes, _ = run([1.0], [1.0], truncated=True)
    assert missed[0].tolist() == [1e9]
    assert sizes is None


def test_each_constraint_is_judged_in_its_own_scale():
    missed, sizes, _ = run([4.0], [6.0], signs=(1.0, 1.0), units=(1.0, 4.0))
    assert sizes.tolist() == [2.0, 0.5]
    assert missed[0].tolist() == [2.0, 0.5]


def test_long_episodes_are_sampled_and_every_episode_begins_with_a_prediction():
    watched = Predictions(2, np.array([1.0]), [1.0], 640, 0.9)
    asked = []
    for step in range(40):
        if watched.due:
            asked.append(step)
            watched.predict(np.zeros((2, 1)), np.zeros((2, 1)))
        watched.step(np.zeros((2, 1)), np.array([step == 12, False]), np.array([False, False]))
    assert asked == [0, 10, 13, 20, 30]
    assert [each.tolist() for each in watched.take()[0]] == [[0.0]]


def test_an_episode_that_outlives_its_horizon_is_judged_by_its_last_steps():
    costs = np.random.default_rng(0).random(50)
    togo = [sum(0.5**k * cost for k, cost in enumerate(costs[step:])) for step in range(50)]
    means = [1e6] * 40 + [value + 0.5 for value in togo[40:]]
    missed, sizes, covered = run(costs, means, units=(1.0,), horizon=5)
    assert missed[0].tolist() == [pytest.approx(0.5)]
    assert sizes.tolist() == [pytest.approx(0.5)]
    assert covered.tolist() == [1.0]


def test_an_episode_that_never_ends_takes_no_more_memory():
    watched = Predictions(1, np.array([1.0]), [1.0], 5, 0.5)
    sizes = set()
    for _ in range(100):
        watched.predict(np.zeros((1, 1)), np.zeros((1, 1)))
        watched.step(np.zeros((1, 1)), np.array([False]), np.array([False]))
        kept = watched.tensors()
        sizes.add((len(kept["costs.0"]), len(kept["places.0"]), int(kept["places.0"][0])))
    assert sizes == {(n, n, 0) for n in range(1, 11)}
