"""A curved road, for experiments with gates: pace pays and must be earned by steering, until the steering changes.

One vector environment in numpy, fast enough for many short runs. Action: pace v = |a_0| and steering a_1; the
right steering is ``gain`` times the curve that is observed. Reward v (1 - e²) with e the steering error; a step
skids where v e > 0.2; the cost is v, so that a limit on it is a limit on the distance driven per episode. An
episode has failed when it skidded more than three times.
"""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

LENGTH = 25
"""Steps of an episode, and so the largest distance."""

GRIP = 0.2
SKIDS = 3


class Road(VecEnv):
    """``n_envs`` cars; set `gain` to change what is right steering."""

    def __init__(self, n_envs, seed=0, gain=0.8):
        bounds = np.ones(2, np.float32)
        self.render_mode = None
        super().__init__(n_envs, spaces.Box(-1.0, 1.0, (1,), np.float32), spaces.Box(-bounds, bounds))
        self.gain = gain
        self._random = np.random.default_rng(seed)
        self._curve = self._skids = None
        self._step = 0

    def reset(self):
        self._skids, self._step = np.zeros(self.num_envs, int), 0
        return self._observe()

    def _observe(self):
        self._curve = self._random.uniform(-1.0, 1.0, self.num_envs)
        return self._curve[:, None].astype(np.float32)

    def step_async(self, actions):
        self._actions = actions

    def step_wait(self):
        pace, error = np.abs(self._actions[:, 0]), np.abs(self._actions[:, 1] - self.gain * self._curve)
        self._skids += pace * error > GRIP
        self._step += 1
        failed = self._skids > SKIDS
        infos = [{"distance": v, "failed": f} for v, f in zip(pace.tolist(), failed.tolist(), strict=True)]
        over = self._step == LENGTH
        observations = self._observe()
        if over:
            for info, last in zip(infos, observations, strict=True):
                info["terminal_observation"] = last
            observations = self.reset()
        return observations, (pace * (1.0 - error**2)).astype(np.float32), np.full(self.num_envs, over), infos

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        setattr(self, attr_name, value)

    def env_method(self, method_name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs


def success(policy, gain, episodes=256, seed=0):
    """Return the share of fresh episodes in which ``policy``, exploring as in training, does not fail."""
    import torch

    road = Road(episodes, seed, gain)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        observations = road.reset()
        for _ in range(LENGTH):
            actions = policy(torch.as_tensor(observations))[0].numpy()
            observations, _, _, infos = road.step(np.clip(actions, -1.0, 1.0))
    return 1.0 - float(np.mean([info["failed"] for info in infos]))
