"""An environment whose steps are numbered, so that each replayed row tells which cost it must have."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv


class Numbered(gym.Env):
    """Each step has a serial number, which is its observation, and a cost that the number and the action decide.

    ``shape``: "box", "dict", or "goal" (a dictionary with goals, as hindsight replay needs it).
    """

    SPAN = 10_000

    def __init__(self, index=0, length=7, shape="box", discrete=False, truncate=True):
        place = spaces.Box(-1e6, 1e6, (2,), np.float64)
        self.shape, self.length, self.truncate = shape, length + index, truncate
        self.observation_space = place
        if shape == "dict":
            self.observation_space = spaces.Dict({"place": place, "kind": spaces.Discrete(3)})
        if shape == "goal":
            goals = spaces.Box(-1e6, 1e6, (1,), np.float64)
            self.observation_space = spaces.Dict({"observation": place, "achieved_goal": goals, "desired_goal": goals})
        self.action_space = spaces.Discrete(4) if discrete else spaces.Box(-2.0, 6.0, (1,), np.float32)
        self.serial = index * self.SPAN
        self.costs, self.ends = {}, set()

    def _observation(self):
        place = np.array([self.serial, self._step], np.float64)
        if self.shape == "dict":
            return {"place": place, "kind": self._step % 3}
        if self.shape == "goal":
            return {"observation": place, "achieved_goal": place[1:], "desired_goal": np.array([3.0])}
        return place

    def compute_reward(self, achieved, desired, info):
        return -np.abs(achieved - desired)[..., 0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._step = 0
        self.serial += 1
        return self._observation(), {}

    def step(self, action):
        cost = float(np.sin(self.serial) + 2.0 + 0.1 * float(np.ravel(action)[0]))
        self.costs[self.serial] = cost
        self._step += 1
        over = self._step >= self.length
        if over:
            self.ends.add(self.serial)
        self.serial += 1
        reward = float(np.cos(self.serial))
        return self._observation(), reward, over and not self.truncate, over and self.truncate, {"cost": cost}


def numbered(n_envs=1, **settings):
    """Return ``n_envs`` of them as one vector, with serial numbers of their own."""
    return DummyVecEnv([lambda index=index: Numbered(index, **settings) for index in range(n_envs)])


def books(vec):
    """Return the cost of each serial number, and the numbers that ended an episode."""
    costs, ends = {}, set()
    for env in vec.unwrapped.envs:
        costs |= env.unwrapped.costs
        ends |= env.unwrapped.ends
    return costs, ends
