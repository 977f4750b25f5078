"""Costs read from info, and episode sums that run across rollouts."""

import numpy as np
import pytest

from guardrails import Constraint, RolloutError
from guardrails_sb3.costs import Episodes, cost_reader


def speed(info):
    return info["x_velocity"]


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(None, 3.0), ("other", 5.0), (speed, 7.0), ([speed, lambda info: info["other"]], 12.0), ([speed], 7.0)],
)
def test_cost_is_the_named_key_the_function_or_the_sum_of_functions(cost, expected):
    read = cost_reader(Constraint("harm", limit=1.0, cost=cost))
    assert read({"harm": 3, "other": np.float32(5.0), "x_velocity": np.array(7.0)}) == expected


def test_a_missing_key_is_an_error_that_names_constraint_key_and_keys_there():
    read = cost_reader(Constraint("harm", limit=1.0, cost="damage"))
    with pytest.raises(RolloutError, match=r"'harm' reads info\['damage'\].*Keys here: cost, x_velocity"):
        read({"x_velocity": 1.0, "cost": 2.0})


def test_none_and_nan_mean_not_measured():
    read = cost_reader(Constraint("harm", limit=1.0))
    assert np.isnan(read({"harm": None}))
    assert np.isnan(read({"harm": float("nan")}))


def test_a_cost_that_is_no_number_is_an_error():
    with pytest.raises(RolloutError, match=r"info\['harm'\] is 'much'; one number per step"):
        cost_reader(Constraint("harm", limit=1.0))({"harm": "much"})
    with pytest.raises(RolloutError, match="one number per step"):
        cost_reader(Constraint("harm", limit=1.0))({"harm": np.zeros(2)})


def test_a_cost_function_that_raises_is_named_with_its_cause():
    with pytest.raises(RolloutError, match="'harm': its cost function speed raised KeyError") as caught:
        cost_reader(Constraint("harm", limit=1.0, cost=speed))({"cost": 1.0})
    assert isinstance(caught.value.__cause__, KeyError)


def test_episode_sums_run_on_until_their_episode_ends():
    episodes = Episodes(2, ["a", "b"])
    step = np.array([[1.0, 10.0], [2.0, 20.0]])
    no, first = np.array([False, False]), np.array([True, False])
    episodes.add(step, np.array([0.5, 0.25]), no, [{}, {}])
    assert episodes.take().n_rows == 0
    episodes.add(step, np.array([0.5, 0.25]), first, [{"end": 1}, {}])
    rollout = episodes.take()
    assert rollout.costs["a"].tolist() == [2.0]
    assert rollout.costs["b"].tolist() == [20.0]
    assert rollout.rewards.tolist() == [1.0]
    assert rollout.lengths.tolist() == [2.0]
    assert rollout.infos == [{"end": 1}]
    episodes.add(step, np.array([0.5, 0.25]), np.array([True, True]), [{}, {}])
    rollout = episodes.take()
    assert rollout.costs["a"].tolist() == [1.0, 6.0]
    assert rollout.lengths.tolist() == [1.0, 3.0]


def test_an_episode_that_is_begun_anew_forgets_its_sums():
    episodes = Episodes(2, ["a"])
    episodes.add(np.array([[5.0], [7.0]]), np.ones(2), np.array([False, False]), [{}, {}])
    episodes.begin(np.array([True, False]))
    episodes.add(np.array([[1.0], [1.0]]), np.ones(2), np.array([True, True]), [{}, {}])
    assert episodes.take().costs["a"].tolist() == [1.0, 8.0]
