"""Small environments that learn in seconds, and helpers that look into a wrapped model."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from guardrails_sb3.wrap import attachment_of

torch.set_num_threads(1)

OBSERVATIONS = {
    "box": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "discrete": spaces.Discrete(7),
    "dict": spaces.Dict({"place": spaces.Box(-1.0, 1.0, (2,), np.float32), "kind": spaces.Discrete(3)}),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
}


class Gamble(gym.Env):
    """Action 1 pays 1 and costs 1, action 0 pays 0.3 and costs nothing.

    Without a limit the best policy gambles at every step. At most ``limit`` per episode is best kept by
    gambling ``limit / length`` of the time, and the multiplier that makes it so is 0.7.
    """

    def __init__(self, length=20, observation="box", truncate=False, seed=0, costs=("cost",), masks=False):
        self.observation_space = copy.deepcopy(OBSERVATIONS[observation])
        self.observation_space.seed(seed)
        self.action_space = spaces.Discrete(2)
        self.length, self.truncate, self.costs = length, truncate, costs
        self._random = np.random.default_rng(seed)
        self._step = 0
        self.cost_of = lambda step, action: float(action)
        if masks:
            self.action_masks = lambda: np.array([True, True])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._step = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self._step += 1
        over = self._step >= self.length
        costs = {key: (index + 1) * self.cost_of(self._step, int(action)) for index, key in enumerate(self.costs)}
        reward = 1.0 if action == 1 else 0.3
        return self.observation_space.sample(), reward, over and not self.truncate, over and self.truncate, costs


class Drift(gym.Env):
    """One coordinate that a continuous action pushes; deterministic after reset, cost is being beyond 0.5."""

    observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, length=25, truncate=True):
        self.length, self.truncate = length, truncate

    def _observation(self):
        return np.array([self._place, self._step / self.length], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._step = 0.0, 0
        return self._observation(), {}

    def step(self, action):
        self._step += 1
        self._place = float(np.clip(0.9 * self._place + 0.3 * action[0], -10.0, 10.0))
        over = self._step >= self.length
        info = {"cost": float(self._place > 0.5), "effort": float(abs(action[0]))}
        return self._observation(), self._place, over and not self.truncate, over and self.truncate, info


class Pictured(Drift):
    """Drift seen as a picture: a bar at the coordinate."""

    observation_space = OBSERVATIONS["image"]

    def _observation(self):
        picture = np.zeros(self.observation_space.shape, np.uint8)
        picture[:, int(np.clip(18 + 8 * self._place, 0, 35))] = 255
        return picture


def vec(n_envs=2, kind=Gamble, **settings):
    """Return ``n_envs`` environments with different episode lengths, so that their ends do not line up."""
    length = settings.pop("length", 20)
    return DummyVecEnv([lambda offset=offset: kind(length=length + 3 * offset, **settings) for offset in range(n_envs)])


def learn(model, steps, seed=0, **settings):
    """Let ``model`` learn from freshly seeded generators and environments."""
    model.set_random_seed(seed)
    return model.learn(steps, **settings)


def callback_of(model):
    """Return the callback of ours in a wrapped model."""
    return attachment_of(model).callback


def parameters(model):
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
