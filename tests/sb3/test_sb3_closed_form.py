"""Guarded algorithms against the exact optimum of a constrained control task, found by linear programming."""

import copy

import numpy as np
import pytest
import torch
from devices import DEVICE
from sb3_machine import HORIZON, LEVELS, LIMIT, N_STATES, evaluate, exact_cost_to_go, machines, optimum
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

from guardrails import Constraint, Guard
from guardrails.critic import Ensemble
from guardrails.schedulers import PID, AugmentedLagrangian, Margin
from guardrails_sb3 import safety_critic, wrap

EVERY_STATE = np.eye(N_STATES, dtype=np.float32)
PAIR = Ensemble(members=2, kappa=0.0, hidden=(32,))
NET = {"policy_kwargs": {"net_arch": [32]}, "gamma": 0.9, "learning_rate": 3e-3, "device": DEVICE}
REPLAY = NET | {"learning_starts": 400, "batch_size": 128, "tau": 0.02}


def augmented(penalty_coefficient=1.0):
    return AugmentedLagrangian(penalty_coefficient, learning_rate=0.1)


CASES = {
    "PPO": (PPO, augmented, 40_000, 8, NET | {"n_steps": 40, "batch_size": 160, "n_epochs": 4, "ent_coef": 0.01}),
    "A2C": (A2C, augmented, 40_000, 8, NET | {"n_steps": 20, "ent_coef": 0.01}),
    "SAC": (SAC, lambda: augmented(0.3), 8_000, 4, REPLAY | {"target_entropy": -2.0}),
    "TD3": (TD3, lambda: PID(kp=0.2, ki=0.05, kd=0.0), 8_000, 4, REPLAY),
    "DQN": (
        DQN,
        lambda: PID(kp=0.1, ki=0.02, kd=0.0),
        24_000,
        4,
        NET
        | {"learning_rate": 2e-3, "learning_starts": 500, "batch_size": 64, "train_freq": 4, "gradient_steps": 2}
        | {"target_update_interval": 100, "exploration_fraction": 0.2, "exploration_final_eps": 0.02},
    ),
}


def policy_of(model):
    """Return the policy as probabilities over loads, ``(n_states, n_loads)`` each."""
    if isinstance(model, (PPO, A2C)):
        odds = model.policy.get_distribution(torch.as_tensor(EVERY_STATE, device=DEVICE)).distribution.probs
        return odds.detach().cpu().numpy(), np.tile(LEVELS, (N_STATES, 1))
    if isinstance(model, DQN):
        return np.eye(len(LEVELS))[model.predict(EVERY_STATE, deterministic=True)[0]], np.tile(LEVELS, (N_STATES, 1))
    draws = 200 if isinstance(model, SAC) else 1
    actions = model.predict(EVERY_STATE.repeat(draws, axis=0))[0].reshape(N_STATES, draws)
    return np.full((N_STATES, draws), 1.0 / draws), (actions + 1.0) / 2.0


class Evaluate(BaseCallback):
    """The exact return and cost of the policy as it is, every few steps."""

    def __init__(self, every):
        super().__init__()
        self.every, self.found = every, []

    def _on_step(self):
        if self.n_calls % self.every == 0:
            self.found.append(evaluate(*policy_of(self.model)))
        return True


@pytest.mark.parametrize("name", CASES)
def test_it_reaches_the_optimal_return_within_five_per_cent_and_holds_the_limit(name):
    """The mean over the second half of the training, through which the multiplier goes up and down.

    A greedy policy of one multiplier is deterministic, while the optimum is a mixture; what trades off is the course
    of the policies. The scheduler aims 5 % below the limit, within which a sampled cost moves the multiplier about.
    """
    kind, scheduler, steps, n_envs, settings = CASES[name]
    continuous = kind in (SAC, TD3)
    if kind is TD3:
        settings = settings | {"action_noise": NormalActionNoise(np.zeros(1), np.full(1, 0.05))}
    model = kind("MlpPolicy", machines(n_envs, not continuous), seed=0, **copy.deepcopy(settings))
    guard = Guard(Constraint("cost", limit=LIMIT, scheduler=Margin(scheduler(), 0.05)))
    wrap(model, guard, **({} if kind in (PPO, A2C) else {"cost_critic": PAIR, "horizon": HORIZON}))
    evaluation = Evaluate(every=20 if kind in (PPO, A2C) else 10)
    model.learn(steps, callback=evaluation)
    best, multiplier = optimum(np.linspace(0.0, 1.0, 101) if continuous else LEVELS)
    found = np.array(evaluation.found)[len(evaluation.found) // 2 :].mean(axis=0)
    assert found[0] >= 0.95 * best
    assert found[1] <= LIMIT
    assert guard.multipliers["cost"] == pytest.approx(multiplier, rel=0.5)  # a single sample of what moves about


def test_without_a_guard_the_best_policy_costs_five_times_the_limit():
    best, multiplier = optimum(LEVELS, limit=1e9)
    full = np.eye(len(LEVELS))[np.full(N_STATES, len(LEVELS) - 1)]
    assert evaluate(full, np.tile(LEVELS, (N_STATES, 1))) == pytest.approx((best, 58.4), rel=1e-3)
    assert multiplier == 0.0


@pytest.mark.parametrize("name", ["PPO", "DQN"])
def test_the_critic_of_a_host_that_stands_still_learns_the_exact_cost_to_go(name):
    """No learning rate: the policy is that of its first weights, and its critic has an exact solution."""
    kind, _, _, _, settings = CASES[name]
    settings = settings | {"learning_rate": 0.0}
    if kind is PPO:
        settings |= {"n_epochs": 30}
    if kind is DQN:  # all actions are tried, the greedy one is followed up
        settings |= {"exploration_fraction": 1.0, "exploration_final_eps": 1.0, "gradient_steps": 2}
    model = kind("MlpPolicy", machines(4, True), seed=1, **copy.deepcopy(settings))
    ensemble = Ensemble(members=2, kappa=0.0, hidden=(32,), learning_rate=3e-3, tau=0.02)
    wrap(model, Guard(Constraint("cost", limit=LIMIT)), cost_critic=ensemble, horizon=HORIZON)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(8_000)
    assert all(torch.equal(before[key], value) for key, value in model.policy.state_dict().items())
    odds, loads = policy_of(model)
    exact = exact_cost_to_go(odds, loads, 0.9)
    states = np.repeat(EVERY_STATE, len(LEVELS), axis=0)
    found = safety_critic(model).risk(states, np.tile(np.arange(len(LEVELS)), N_STATES))
    found = found.detach().cpu().numpy().reshape(exact.shape)
    # of a few thousand sampled steps; wear of 0 to 4 per step sums to about 5 to 15
    np.testing.assert_allclose(found, exact, rtol=0.1, atol=0.3)
