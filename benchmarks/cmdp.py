"""A constrained control task that runs in seconds, with its exact optimum: a queue with a power budget.

Jobs arrive at a server; each step it picks one of five speeds. Waiting jobs cost reward, speed costs
power, and the mean power of an episode is bounded. A softmax policy over the queue's length learns by
policy gradients on sampled episodes, with generalised advantage estimates from separate value tables
for reward and cost, mixed as (A_r - λ A_c) / (1 + λ): a small copy of what PPO does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import lil_matrix

HORIZON, LIMIT, LONGEST, START = 60, 120.0, 20, 5
ARRIVAL = 0.5
COMPLETION = np.array([0.0, 0.3, 0.5, 0.65, 0.75])
POWER = np.array([0.0, 1.0, 3.0, 7.0, 15.0])
N_STATES, N_ACTIONS = LONGEST + 1, len(POWER)

REWARD = np.repeat(float(LONGEST) - np.arange(LONGEST + 1)[:, None], len(POWER), axis=1)
COST = np.repeat(POWER[None, :], N_STATES, axis=0)


def _transitions() -> np.ndarray:
    """Return P[length, speed, next length]: at most one job leaves, at most one arrives."""
    kernel = np.zeros((N_STATES, N_ACTIONS, N_STATES))
    for length in range(N_STATES):
        for action, completion in enumerate(COMPLETION):
            for done, p_done in ((1, completion), (0, 1.0 - completion)):
                left = max(length - done, 0)
                kernel[length, action, min(left + 1, LONGEST)] += p_done * ARRIVAL
                kernel[length, action, left] += p_done * (1.0 - ARRIVAL)
    return kernel


P = _transitions()


def optimum(limit: float = LIMIT) -> tuple[float, float]:
    """Return the highest return that any policy reaches within the limit, and the multiplier there.

    The linear program over occupancies x[t, s, a] of the finite horizon, by HiGHS.
    """
    n = N_STATES * N_ACTIONS
    flow = lil_matrix((HORIZON * N_STATES, HORIZON * n))
    for t in range(HORIZON):
        for s in range(N_STATES):
            flow[t * N_STATES + s, t * n + N_ACTIONS * s : t * n + N_ACTIONS * (s + 1)] = 1.0
            if t > 0:
                flow[t * N_STATES + s, (t - 1) * n : t * n] = -P[:, :, s].ravel()
    begin = np.zeros(HORIZON * N_STATES)
    begin[START] = 1.0
    reward, cost = np.tile(REWARD.ravel(), HORIZON), np.tile(COST.ravel(), HORIZON)
    result = linprog(
        -reward, A_eq=flow.tocsr(), b_eq=begin, A_ub=cost[None], b_ub=[limit], bounds=(0, None), method="highs"
    )
    return -result.fun, -float(result.ineqlin.marginals[0])


@dataclass
class Learner:
    """Policy and value tables of several independent seeds, trained side by side."""

    seeds: int
    episodes: int = 20
    rate: float = 0.15
    cutoff: float = np.inf
    logits: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.logits = np.zeros((self.seeds, N_STATES, N_ACTIONS))
        self.values = np.zeros((2, self.seeds, N_STATES))
        self.moments = np.zeros((2, *self.logits.shape))
        self.updates = 0

    def policy(self) -> np.ndarray:
        """Return the probabilities of the actions, (seeds, states, actions)."""
        weights = np.exp(self.logits - self.logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact expected return and cost of an episode of each seed's policy."""
        policy = self.policy()
        kernel = np.einsum("ksa,sat->kst", policy, P)
        state = np.tile(np.eye(N_STATES)[START], (self.seeds, 1))
        occupancy = np.zeros_like(state)
        for _ in range(HORIZON):
            occupancy += state
            state = np.einsum("ks,kst->kt", state, kernel)
        taken = occupancy[..., None] * policy
        return (taken * REWARD).sum(axis=(1, 2)), (taken * COST).sum(axis=(1, 2))

    def rollout(self) -> np.ndarray:
        """Sample episodes and return each seed's mean cost; an episode ends where its cost exceeds the cutoff."""
        shape = (self.seeds, self.episodes)
        seed = np.arange(self.seeds)[:, None]
        cumulative, aimed = self.policy().cumsum(axis=-1), P.cumsum(axis=-1)
        state, spent, alive = np.full(shape, START), np.zeros(shape), np.ones(shape, dtype=bool)
        self.states, self.actions, self.alive = [], [], []
        for _ in range(HORIZON):
            action = (self.rng.random(shape)[..., None] > cumulative[seed, state]).sum(axis=-1).clip(max=N_ACTIONS - 1)
            self.states.append(state)
            self.actions.append(action)
            self.alive.append(alive)
            spent = spent + POWER[action] * alive
            alive = alive & (spent <= self.cutoff)
            state = (self.rng.random(shape)[..., None] > aimed[state, action]).sum(axis=-1).clip(max=N_STATES - 1)
        return spent.mean(axis=1)

    def advantages(self, per_step: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Return generalised advantage estimates (γ = 0.99, λ = 0.95) and move the value table to the returns."""
        seed = np.arange(self.seeds)[:, None]
        trace, after = np.zeros((self.seeds, self.episodes)), np.zeros((self.seeds, self.episodes))
        result = np.zeros((HORIZON, self.seeds, self.episodes))
        total, count = np.zeros_like(table), np.zeros_like(table)
        for t in reversed(range(HORIZON)):
            state, alive = self.states[t], self.alive[t]
            value = table[seed, state]
            trace = (per_step[state, self.actions[t]] + 0.99 * after - value + 0.99 * 0.95 * trace) * alive
            after = value * alive
            result[t] = trace
            np.add.at(total, (seed, state), (trace + value) * alive)
            np.add.at(count, (seed, state), alive)
        seen = count > 0
        table[seen] += 0.5 * (total[seen] / count[seen] - table[seen])
        return result

    def learn(self, multipliers: np.ndarray) -> None:
        """Take one Adam step on the policy gradient of the mixed, standardised advantages."""
        lam = multipliers[None, :, None]
        mixed = (self.advantages(REWARD, self.values[0]) - lam * self.advantages(COST, self.values[1])) / (1.0 + lam)
        alive = np.array(self.alive)
        scale = np.sqrt((mixed**2 * alive).sum(axis=(0, 2), keepdims=True) / alive.sum(axis=(0, 2), keepdims=True))
        weights = mixed / (scale + 1e-8) * alive
        states, actions = np.array(self.states), np.array(self.actions)
        seed = np.broadcast_to(np.arange(self.seeds)[None, :, None], states.shape)
        gradient, visits = np.zeros_like(self.logits), np.zeros((self.seeds, N_STATES))
        np.add.at(gradient, (seed, states, actions), weights)
        np.add.at(visits, (seed, states), weights)
        gradient = (gradient - self.policy() * visits[..., None]) / alive.sum(axis=(0, 2))[:, None, None]
        self.updates += 1
        self.moments[0] = 0.9 * self.moments[0] + 0.1 * gradient
        self.moments[1] = 0.999 * self.moments[1] + 0.001 * gradient**2
        mean = self.moments[0] / (1.0 - 0.9**self.updates)
        square = self.moments[1] / (1.0 - 0.999**self.updates)
        self.logits += self.rate * mean / (np.sqrt(square) + 1e-5)
