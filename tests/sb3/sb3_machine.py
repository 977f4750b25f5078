"""A constrained control task with an exact solution: a machine whose load pays, wears it down, and heats it up.

The state is its temperature, one of three. A load u in [0, 1] earns α_s (2u - u²), costs β_s u² of wear, and moves
the temperature: P(s' | s, u) = (1 - u) cool[s] + u hot[s]. Episodes have 20 steps and begin at any temperature.
Continuous for algorithms that act so, or in five levels of load.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from scipy.optimize import linprog
from scipy.sparse import lil_matrix
from stable_baselines3.common.vec_env import DummyVecEnv

HORIZON = 20
GAIN = np.array([1.0, 2.0, 3.0])
WEAR = np.array([1.0, 1.5, 4.0])
COOL = np.array([[0.8, 0.2, 0.0], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3]])
HOT = np.array([[0.3, 0.5, 0.2], [0.1, 0.4, 0.5], [0.0, 0.3, 0.7]])
N_STATES = 3
LEVELS = np.linspace(0.0, 1.0, 5)
LIMIT = 12.0


def reward(load):
    """Return r(s, u) of loads ``(n_states, ...)``."""
    return (GAIN * (2.0 * load.T - load.T**2)).T


def wear(load):
    """Return c(s, u)."""
    return (WEAR * load.T**2).T


class Machine(gym.Env):
    """The task; ``discrete`` loads are indices of `LEVELS`."""

    def __init__(self, discrete=False, seed=0):
        self.discrete = discrete
        self.observation_space = spaces.Box(0.0, 1.0, (N_STATES,), np.float32)
        self.action_space = spaces.Discrete(len(LEVELS)) if discrete else spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._random = np.random.default_rng(seed)
        self._one_hot = np.eye(N_STATES, dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._state, self._step = int(self._random.integers(N_STATES)), 0
        return self._one_hot[self._state], {}

    def step(self, action):
        load = float(LEVELS[int(action)] if self.discrete else (action[0] + 1.0) / 2.0)
        state = self._state
        earned, worn = GAIN[state] * (2.0 * load - load**2), WEAR[state] * load**2
        odds = (1.0 - load) * COOL[state] + load * HOT[state]
        self._state = int((self._random.random() > odds.cumsum()[:-1]).sum())
        self._step += 1
        return self._one_hot[self._state], earned, False, self._step == HORIZON, {"cost": worn}


def machines(n_envs, discrete=False):
    """Return ``n_envs`` of them as one vector."""
    return DummyVecEnv([lambda seed=seed: Machine(discrete, seed) for seed in range(n_envs)])


def optimum(loads, limit=LIMIT):
    """Return the highest expected return within the limit of any policy that picks among ``loads``, and λ there.

    The linear program over occupancies x[t, s, u] of an episode, by HiGHS. Policies may depend on time and be
    random, so this bounds what any algorithm can reach.
    """
    n = N_STATES * len(loads)
    kernel = (1.0 - loads)[None, :, None] * COOL[:, None] + loads[None, :, None] * HOT[:, None]
    flow = lil_matrix((HORIZON * N_STATES, HORIZON * n))
    for t in range(HORIZON):
        for s in range(N_STATES):
            flow[t * N_STATES + s, t * n + s * len(loads) : t * n + (s + 1) * len(loads)] = 1.0
            if t:
                flow[t * N_STATES + s, (t - 1) * n : t * n] = -kernel[:, :, s].ravel()
    begin = np.zeros(HORIZON * N_STATES)
    begin[:N_STATES] = 1.0 / N_STATES
    every = np.tile(loads, (N_STATES, 1))
    earned, worn = np.tile(reward(every).ravel(), HORIZON), np.tile(wear(every).ravel(), HORIZON)
    solved = linprog(
        -earned, A_eq=flow.tocsr(), b_eq=begin, A_ub=worn[None], b_ub=[limit], bounds=(0, None), method="highs"
    )
    return -solved.fun, -float(solved.ineqlin.marginals[0])


def evaluate(odds, loads):
    """Return expected return and cost of an episode, exactly, of a policy ``odds[s, u]`` over ``loads[s, u]``."""
    moves = np.einsum("su,sut->st", odds, (1.0 - loads)[..., None] * COOL[:, None] + loads[..., None] * HOT[:, None])
    state, earned, worn = np.full(N_STATES, 1.0 / N_STATES), 0.0, 0.0
    per_state = (odds * reward(loads)).sum(axis=1), (odds * wear(loads)).sum(axis=1)
    for _ in range(HORIZON):
        earned, worn = earned + state @ per_state[0], worn + state @ per_state[1]
        state = state @ moves
    return earned, worn


def exact_cost_to_go(odds, loads, gamma):
    """Return Q_c(s, u) of a policy over ``loads[s, u]``, by solving its linear equations."""
    kernel = (1.0 - loads)[..., None] * COOL[:, None] + loads[..., None] * HOT[:, None]
    moves, worn = np.einsum("su,sut->st", odds, kernel), (odds * wear(loads)).sum(axis=1)
    values = np.linalg.solve(np.eye(N_STATES) - gamma * moves, worn)
    return wear(loads) + gamma * kernel @ values
