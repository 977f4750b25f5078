"""ARS: costs enter the returns of its candidates."""

import numpy as np
import pytest
import torch
from devices import DEVICE
from sb3_contrib import ARS
from sb3_envs import Drift, callback_of, vec
from sb3_machine import HORIZON, LIMIT, N_STATES, evaluate, machines, optimum
from sb3_numbered import books, numbered
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from guardrails import AttachError, Constraint, Guard
from guardrails.critic import Ensemble
from guardrails.schedulers import PID, AugmentedLagrangian, Fixed, Margin
from guardrails_sb3 import ActionBox, unwrap, wrap


def host(env=None, **settings):
    settings = {"n_delta": 3, "n_eval_episodes": 2, "seed": 0, "device": DEVICE} | settings
    return ARS("LinearPolicy", env if env is not None else vec(1, kind=Drift, length=6), **settings)


def ready(model):
    """Return the callback that ``learn`` would call, with all set up for it."""
    return model._setup_learn(1000)[1]


def psi(kind, means, limit, scale):
    beyond = means - limit
    if kind == "fixed":
        return 0.7 * beyond
    return scale * (np.maximum(0.0, 0.3 + 2.0 * beyond / scale) ** 2 - 0.3**2) / 4.0


SCHEDULERS = {"fixed": Fixed(0.7), "augmented": AugmentedLagrangian(2.0, initial=0.3, learning_rate=1e-9)}


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_candidate_is_worth_its_return_less_the_documented_penalty(scheduler, n_envs):
    env = numbered(n_envs)
    model, returned = host(env), []
    inner = type(model).evaluate_candidates

    def told(self, *args):
        returned.append((inner(self, *args), dict(books(env)[0])))
        return returned[-1][0]

    model.evaluate_candidates = told.__get__(model)
    wrap(model, Guard(Constraint("cost", limit=10.0, scale=4.0, scheduler=SCHEDULERS[scheduler])))
    rows, own = [], callback_of(model).guard
    step = own.step
    own.step = lambda rollout: rows.append(rollout) or step(rollout)
    lowered = model.evaluate_candidates(torch.zeros(6, model.n_params), ready(model), None)
    raw, costs = returned[0]
    assert rows[0].n_rows == 12
    assert rows[0].rewards.reshape(6, 2).sum(axis=1) == pytest.approx(raw.cpu().numpy(), rel=1e-4)
    if n_envs == 1:  # episodes of seven steps, one after the other
        sums = np.array(list(costs.values())).reshape(12, 7).sum(axis=1)
        assert rows[0].cost("cost") == pytest.approx(sums)
    means = rows[0].cost("cost").reshape(6, 2).mean(axis=1)
    expected = raw.cpu().numpy() - 2 * psi(scheduler, means, 10.0, 4.0)
    np.testing.assert_allclose(lowered.cpu().numpy(), expected, rtol=1e-4)  # float32
    assert np.ptp(means) > 0.1


def test_the_guard_sees_rewards_as_the_environment_gave_them_and_not_as_they_are_normalised():
    model = host(VecNormalize(DummyVecEnv([lambda: Monitor(Drift(length=6))] * 2)))
    wrap(model, Guard(Constraint("cost", limit=1.0)))
    rows, own = [], callback_of(model).guard
    step = own.step
    own.step = lambda rollout: rows.append(rollout) or step(rollout)
    model.evaluate_candidates(0.1 * torch.ones(6, model.n_params), ready(model), None)
    seen = [info["episode"]["r"] for info in rows[0].infos]
    assert rows[0].rewards == pytest.approx(np.array(seen), abs=1e-4)  # the monitor rounds, VecNormalize has float32
    assert np.abs(seen).max() > 0.1


def test_a_multiplier_of_zero_leaves_the_search_as_unguarded():
    plain, watched = host().learn(200), host()
    wrap(watched, Guard(Constraint("cost", limit=1.0, scheduler=Fixed(0.0)))).learn(200)
    assert torch.equal(plain.weights, watched.weights)
    own = unwrap(watched)
    assert own.decision.step == watched._n_updates > 1
    assert not {"evaluate_candidates", "_trigger_callback"} & set(vars(watched))


@pytest.mark.slow
def test_it_reaches_the_optimal_return_near_the_limit():
    """Means of the last third: a search along eight random directions wanders about by a tenth."""
    model = host(machines(1), n_delta=8, n_eval_episodes=4, delta_std=0.1, learning_rate=0.2, n_top=8)
    guard = Guard(Constraint("cost", limit=LIMIT, scheduler=Margin(PID(kp=0.2, ki=0.05, kd=0.0), 0.05)))
    found = []

    def look(locals_, globals_):
        if guard.decision is not None and len(found) < guard.decision.step:
            actions = model.predict(np.eye(N_STATES, dtype=np.float32))[0]
            found.append(evaluate(np.ones((N_STATES, 1)), (actions + 1.0) / 2.0))
        return True

    wrap(model, guard).learn(60 * 16 * 4 * HORIZON, callback=look, log_interval=1000)
    best, _ = optimum(np.linspace(0.0, 1.0, 101))
    earned, worn = np.mean(found[2 * len(found) // 3 :], axis=0)
    assert earned >= 0.95 * best
    assert worn <= 1.1 * LIMIT


def test_an_unmeasurable_cost_makes_a_candidate_worth_less_and_not_more():
    env = vec(1, kind=Drift, length=6)
    inner = env.envs[0].unwrapped
    step, taken = inner.step, []

    def unmeasured(action):
        taken.append(1)
        return *step(action)[:4], {"cost": float("nan") if len(taken) == 3 else 0.0}

    inner.step = unmeasured
    model = host(env, n_eval_episodes=1)
    wrap(model, Guard(Constraint("cost", limit=1.0, scheduler=Fixed(5.0))))
    worth = model.evaluate_candidates(torch.zeros(6, model.n_params), ready(model), None)
    assert bool(torch.isfinite(worth).all())
    assert float(worth[0]) == pytest.approx(float(worth[1]) - 5.0 * 2.0)  # one scale beyond the limit


def test_what_it_cannot_do_is_refused_by_name():
    constraint = Constraint("cost", limit=1.0)
    with pytest.raises(AttachError, match="ARS judges whole episodes and has no use for a safety critic"):
        wrap(host(), Guard(constraint), cost_critic=Ensemble())
    with pytest.raises(AttachError, match="ARS evaluates candidates that are not the model itself"):
        wrap(host(), Guard(constraint, ActionBox(scale=0.5)))
    model = wrap(host(), Guard(constraint))
    with pytest.raises(AttachError, match="without async_eval"):
        model.evaluate_candidates(torch.zeros(6, model.n_params), ready(model), object())
