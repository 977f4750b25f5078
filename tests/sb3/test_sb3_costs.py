"""Costs read from info, and episode sums that run across rollouts."""

import gymnasium as gym
import numpy as np
import pytest
from safetensors.torch import load, save
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from guardrails import Constraint, RolloutError
from guardrails_sb3 import terminated
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
    costs = np.array([[[1.0, 10.0], [2.0, 20.0]]] * 3)
    rewards = np.array([[0.5, 0.25]] * 3)
    none, dones = np.zeros((3, 2), bool), np.array([[False, False], [True, False], [False, True]])
    episodes.add(costs, rewards, none, {})
    assert episodes.take().n_rows == 0
    episodes.add(costs, rewards, dones, {(1, 0): {"end": 1}, (2, 1): {"end": 2}})
    rollout = episodes.take()
    assert rollout.costs["a"].tolist() == [5.0, 12.0]
    assert rollout.costs["b"].tolist() == [50.0, 120.0]
    assert rollout.rewards.tolist() == [2.5, 1.5]
    assert rollout.lengths.tolist() == [5.0, 6.0]
    assert rollout.infos == [{"end": 1}, {"end": 2}]
    assert episodes.take().n_rows == 0
    episodes.add(costs[:1], rewards[:1], np.array([[True, True]]), {(0, 0): {}, (0, 1): {}})
    rollout = episodes.take()
    assert rollout.costs["a"].tolist() == [2.0, 2.0]
    assert rollout.lengths.tolist() == [2.0, 1.0]


def test_an_episode_that_is_begun_anew_forgets_its_sums():
    episodes = Episodes(2, ["a"])
    episodes.add(np.array([[[5.0], [7.0]]]), np.ones((1, 2)), np.array([[False, False]]), {})
    episodes.begin(np.array([True, False]))
    episodes.add(np.array([[[1.0], [1.0]]]), np.ones((1, 2)), np.array([[True, True]]), {(0, 0): {}, (0, 1): {}})
    assert episodes.take().costs["a"].tolist() == [1.0, 8.0]


def test_costs_of_both_infinities_in_one_episode_are_not_a_number_and_raise_no_warning(recwarn):
    episodes = Episodes(1, ["a"])
    episodes.add(np.array([[[np.inf]], [[-np.inf]]]), np.ones((2, 1)), np.array([[False], [True]]), {(1, 0): {}})
    assert np.isnan(episodes.take().costs["a"]).all()
    assert not recwarn.list


@pytest.mark.parametrize("vectorised", [DummyVecEnv, SubprocVecEnv])
def test_terminated_costs_1_where_the_environment_ended_the_episode_and_0_where_the_time_limit_did(vectorised):
    def balance():
        return gym.make("CartPole-v1", max_episode_steps=12)

    envs = vectorised([balance, balance])
    envs.seed(0)
    envs.reset()
    costs = np.zeros((24, 2))
    ended = np.zeros((24, 2), dtype=bool)
    for step in range(24):
        # The first cart is pushed to one side alone and falls over; the second stands for 12 steps.
        _, _, ended[step], infos = envs.step(np.array([1, step % 2]))
        costs[step] = [terminated(info) for info in infos]
    envs.close()
    assert costs[:, 0].sum() >= 2
    np.testing.assert_array_equal(costs[:, 0] == 1.0, ended[:, 0])
    assert np.flatnonzero(ended[:, 1]).tolist() == [11, 23]
    assert not costs[:, 1].any()


def test_terminated_does_not_take_environments_that_say_nothing_of_time_limits_for_safe():
    read = cost_reader(Constraint("falls", limit=0.2, cost=terminated))
    with pytest.raises(RolloutError, match=r"'falls'.*no info\['TimeLimit.truncated'\].*function of your own"):
        read({"terminal_observation": np.zeros(3)})


def test_episodes_that_have_ended_are_saved_with_what_their_infos_say_in_plain_values():
    said = {
        "speed": np.float32(0.1),
        "count": np.int64(3),
        "mask": np.array([[True, False]]),
        "place": np.array([0.1, np.nan], np.float32),
        "none": np.empty((0, 2)),
        "episode": {"r": 1.5, "l": 9, 3: "no name"},
        "goals": ("a", True, None, [1, float("inf")]),
        "engine": object(),
        "engines": [1.0, object()],
        "name": np.str_("run"),
    }
    episodes, again = Episodes(1, ["a"]), Episodes(2, ["a"])
    assert episodes.pending(infos=True) == {}
    episodes.add(np.ones((3, 1, 1)), np.full((3, 1), 0.1), np.array([[False], [True], [False]]), {(1, 0): said})
    saved = load(save(episodes.tensors() | episodes.pending(infos=True)))
    assert not again.load_tensors(saved), "of another number of environments"
    assert again.ended == 1
    rollout = again.take()
    assert (rollout.rewards[0], rollout.lengths[0], rollout.cost("a")[0]) == (0.2, 2.0, 2.0)
    (info,) = rollout.infos
    for key in ("speed", "count", "mask", "place", "none"):
        assert (type(info[key]), info[key].dtype, info[key].shape) == (
            type(said[key]),
            said[key].dtype,
            said[key].shape,
        )
        assert np.array_equal(info[key], said[key], equal_nan=True)
    assert info["episode"] == {"r": 1.5, "l": 9}
    assert info["goals"] == ["a", True, None, [1, float("inf")]]
    assert info["name"] == "run"
    assert not {"engine", "engines"} & set(info)
    again.load_tensors({name: each for name, each in saved.items() if not name.startswith("ended")})
    assert again.ended == 0, "as a file of an earlier version has it"
    assert episodes.pending(infos=False)["ended.infos"].numpy().tobytes() == b"[{}]"
