"""Early termination: the baseline that cuts an episode when its cost exceeds the limit."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from devices import DEVICE
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env

from guardrails import ConfigurationError, Constraint, RolloutError
from guardrails.competence import FailureAvoidance, Gate, Require
from guardrails_sb3 import terminated
from guardrails_sb3.early_termination import EarlyTermination

torch.set_num_threads(1)


class Corridor(gym.Env):
    """Pays 1 per step taken at speed 1, half of that at speed 0; speed costs 1 per step. 20 steps."""

    observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, key="cost", value=None):
        self.key, self.value, self.time = key, value, 0

    def _observation(self):
        return np.array([self.time / 20], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        cost = float(action) if self.value is None else self.value
        return self._observation(), 0.5 + 0.5 * float(action), False, self.time == 20, {self.key: cost}


def run(env, action=1):
    env.reset()
    steps = []
    while not steps or not (steps[-1][2] or steps[-1][3]):
        steps.append(env.step(action))
    return steps


def test_an_episode_ends_when_its_cost_exceeds_the_limit():
    steps = run(EarlyTermination(Corridor(), Constraint("cost", limit=3.0), terminal_reward=-2.0))
    assert len(steps) == 4
    assert [step[1] for step in steps] == [1.0, 1.0, 1.0, -1.0]
    _, _, terminated, truncated, info = steps[-1]
    assert (terminated, truncated, info["early_termination"]) == (True, False, True)
    assert "early_termination" not in steps[-2][4]


def test_an_episode_within_the_limit_is_left_alone_and_the_sum_starts_anew():
    env = EarlyTermination(Corridor(), Constraint("cost", limit=3.0))
    assert len(run(env, 0)) == 20
    assert [len(run(env, 1)), len(run(env, 1))] == [4, 4]


def test_a_cost_that_cannot_be_measured_ends_the_episode():
    assert len(run(EarlyTermination(Corridor(value=math.nan), Constraint("cost", limit=3.0)))) == 1


def test_a_missing_cost_is_an_error():
    with pytest.raises(RolloutError, match=r"info\['cost'\]"):
        run(EarlyTermination(Corridor(key="price"), Constraint("cost", limit=3.0)))
    reading = Constraint("c", limit=3.0, cost=lambda info: 2.0 * info["price"])
    assert len(run(EarlyTermination(Corridor(key="price"), reading))) == 2


def test_a_cost_of_failures_is_read_as_in_training():
    class Falling(Corridor):
        def step(self, action):
            observation, reward, _, truncated, info = super().step(action)
            return observation, reward, self.time == 5, truncated, info

    steps = run(EarlyTermination(Falling(), Constraint("falls", limit=0.5, cost=terminated), terminal_reward=-1.0))
    assert [info.get("early_termination", False) for *_, info in steps] == [False] * 4 + [True]
    assert "TimeLimit.truncated" not in steps[-1][4]
    cut = run(EarlyTermination(Corridor(), Constraint("falls", limit=0.5, cost=terminated)))
    assert len(cut) == 20
    assert "early_termination" not in cut[-1][4]
    env = EarlyTermination(Falling(), Constraint("falls", limit=0.5, cost=terminated))
    PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device=DEVICE).learn(16)


def test_what_cannot_be_a_running_limit_is_refused():
    with pytest.raises(ConfigurationError, match="give sense='<='"):
        EarlyTermination(Corridor(), Constraint("cost", limit=3.0, sense=">="))
    gate = Gate(Require(FailureAvoidance(), at_least=0.9))
    with pytest.raises(ConfigurationError, match="a limit that a gate moves"):
        EarlyTermination(Corridor(), Constraint("cost", limit=gate.between(1.0, 3.0)))
    for reward in (1.0, math.nan):
        with pytest.raises(ConfigurationError, match="terminal_reward"):
            EarlyTermination(Corridor(), Constraint("cost", limit=3.0), terminal_reward=reward)


def test_ppo_learns_to_stay_within_the_limit():
    """Fast throughout earns 4; 3 fast and 17 slow steps earn 11.5 and cost 3; slow throughout earns 10."""
    env = EarlyTermination(Corridor(), Constraint("cost", limit=3.0))
    check_env(env, warn=False)
    model = PPO(
        "MlpPolicy", env, n_steps=256, batch_size=64, learning_rate=3e-3, seed=0, device=DEVICE, gamma=1.0, ent_coef=0.0
    )

    def evaluate():
        lengths = []
        for _ in range(10):
            observation, _ = env.reset()
            done, steps = False, 0
            while not done:
                action, _ = model.predict(observation)
                observation, _, terminated, truncated, _ = env.step(action)
                done, steps = terminated or truncated, steps + 1
            lengths.append(steps)
        return float(np.mean(lengths))

    before = evaluate()
    model.learn(4_000)
    assert before < 12.0  # a policy at random exceeds 3 in about 8 steps
    assert evaluate() > 18.0
