"""evaluate_guarded: what it counts, how sure it is, and that it leaves everything as it was."""

import dataclasses

import numpy as np
import pytest
import torch
from devices import DEVICE
from gymnasium.wrappers import TimeLimit
from sb3_contrib import RecurrentPPO
from sb3_envs import Drift, Gamble, callback_of, learn, parameters, same, vec
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from guardrails import AttachError, ConfigurationError, Constraint, Dial, Gate, Guard, Require, Rollout
from guardrails.competence import RewardLevel
from guardrails.critic import Ensemble
from guardrails.schedulers import Fixed
from guardrails_sb3 import ActionBox, RateLimit, SafeActions, evaluate_guarded, unwrap, wrap
from guardrails_sb3.evaluate import _bootstrap, _rate

SETTINGS = {"n_steps": 40, "batch_size": 40, "seed": 0, "device": DEVICE}


class Lottery(Gamble):
    """Episodes of 2 or of 30 steps by chance; the reward of each step is 1."""

    def reset(self, *, seed=None, options=None):
        self.length = int(self._random.choice([2, 30]))
        return super().reset(seed=seed, options=options)

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1.0, terminated, truncated, info


def test_returns_and_costs_are_those_that_stable_baselines3_finds():
    model = PPO("MlpPolicy", vec(2, kind=Drift, length=8), **SETTINGS).learn(80)
    guard = Guard(Constraint("effort", limit=0.01), Constraint("cost", limit=5.0))
    found = evaluate_guarded(model, vec(2, kind=Drift, length=8), guard, n_episodes=6)
    returns, lengths = evaluate_policy(model, vec(2, kind=Drift, length=8), 6, return_episode_rewards=True, warn=False)
    assert found.reward.mean == pytest.approx(np.mean(returns), rel=1e-5)  # float32 rewards in the vector
    assert found.length.mean == np.mean(lengths)
    assert found.n_episodes == 6
    assert found.deterministic is True
    assert found.violation_rates["effort"].mean == 1.0
    assert found.violation_rates["cost"].mean == 0.0
    assert found.interventions == {"total": dataclasses.replace(found.interventions["total"], mean=0.0)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.n_episodes = 7
    assert "violation rate effort" in str(found)


def test_short_episodes_do_not_count_for_more_in_a_vector():
    env = vec(4, kind=Lottery, length=2)
    model = PPO("MlpPolicy", vec(1), **SETTINGS)
    found = evaluate_guarded(model, env, Guard(Constraint("cost", limit=1e9)), n_episodes=400)
    # By whoever comes first, environments that drew 2 would fill most of the places: a mean near 2 + 28/16. Here the
    # standard error is 14 / √400 = 0.7.
    assert found.length.mean == pytest.approx(16.0, abs=2.5)


def test_a_wrapped_model_is_judged_with_its_sets_and_dials_and_interventions_are_counted():
    gate = Gate(Require(RewardLevel(reference=1e9), at_least=0.5))
    scale = Dial("action_scale", gate.between(0.5, 1.0))
    guard = Guard(Constraint("interventions", limit=2.0, scheduler=Fixed(0.0)), scale, ActionBox(0.25), RateLimit(0.1))
    model = wrap(PPO("MlpPolicy", vec(2, kind=Drift, length=8), **SETTINGS), guard)
    inside = []

    class Watched(Drift):
        def step(self, action):
            inside.append(float(action[0]))
            return super().step(action)

    found = evaluate_guarded(model, Watched(length=8), n_episodes=20, deterministic=False, seed=3)
    assert np.abs(inside).max() <= 0.25
    assert found.costs["interventions"].mean == found.interventions["total"].mean > 0.0
    assert set(found.interventions) == {"action_box", "rate_limit", "total"}
    assert found.interventions["rate_limit"].mean > found.interventions["action_box"].mean > 0.0
    assert found.interventions["total"].mean <= 8.0
    unwrap(model)
    again = evaluate_guarded(model, Drift(length=8), guard, n_episodes=20, deterministic=False, seed=3)
    assert again.costs == found.costs
    assert again.reward == found.reward


def test_a_resumed_model_is_judged_by_the_widths_it_has_earned(tmp_path):
    def guard():
        gate = Gate(Require(RewardLevel(reference=1e-9), at_least=0.1), rungs=1)
        return Guard(Constraint("effort", limit=5.0), ActionBox(gate.between(0.01, 1.0)))

    model = wrap(PPO("MlpPolicy", vec(2, kind=Drift, length=3), **SETTINGS), guard())
    callback_of(model).guard.step(Rollout(rewards=[1.0] * 200, costs={"effort": [0.0] * 200}))
    assert callback_of(model).guard.dials == {"action_box_scale": 1.0}
    judged = {"n_episodes": 4, "deterministic": False, "seed": 1}
    before = evaluate_guarded(model, Drift(length=8), **judged)
    assert before.interventions["total"].mean == 0.0
    model.save(tmp_path / "model.zip")

    def resumed():
        loaded = PPO.load(tmp_path / "model.zip", env=vec(2, kind=Drift, length=3), device=DEVICE)
        return wrap(loaded, guard(), resume=tmp_path / "model.zip")

    assert evaluate_guarded(resumed(), Drift(length=8), **judged) == before
    held = SafeActions(Drift(), guard(), resume=tmp_path / "model.zip")
    held.reset()
    assert held.step(np.ones(1, np.float32))[4]["interventions"] == 0.0
    assert np.abs(resumed().predict(np.zeros((20, 2), np.float32))[0]).max() > 0.01


def test_the_same_seed_finds_the_same_and_everything_is_left_as_it_was():
    env = VecNormalize(vec(2, kind=Drift, length=8))
    model = wrap(PPO("MlpPolicy", env, **SETTINGS), Guard(Constraint("cost", limit=1.0), ActionBox(0.5)))
    model.learn(80)
    apart = VecNormalize(vec(2, kind=Drift, length=8))
    state, statistics, drawn = (
        callback_of(model).guard.state_dict(),
        apart.obs_rms.mean.copy(),
        np.random.get_state()[1],
    )
    torch_state, weights = torch.get_rng_state(), parameters(model)
    one, two = (evaluate_guarded(model, apart, n_episodes=6, deterministic=False, seed=5) for _ in range(2))
    assert one == two
    assert one != evaluate_guarded(model, apart, n_episodes=6, deterministic=False, seed=6)
    assert callback_of(model).guard.state_dict() == state
    assert np.array_equal(apart.obs_rms.mean, statistics)
    assert apart.training
    assert np.array_equal(np.random.get_state()[1], drawn)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert same(parameters(model), weights)


def test_a_model_trains_on_as_if_it_had_not_been_evaluated():
    def trained(evaluated):
        guard = Guard(Constraint("cost", limit=1.0), RateLimit(0.1))
        model = wrap(PPO("MlpPolicy", vec(2, kind=Drift, length=8), **SETTINGS), guard)
        learn(model, 80)
        if evaluated:
            evaluate_guarded(model, Drift(length=8), n_episodes=3, deterministic=False)
        return parameters(model.learn(80, reset_num_timesteps=False))

    assert same(trained(False), trained(True))


def test_observations_are_normalised_as_the_model_learned_them():
    env = VecNormalize(vec(2, kind=Drift, length=8))
    model = PPO("MlpPolicy", env, **SETTINGS).learn(400)
    guard = Guard(Constraint("cost", limit=1.0))
    normalised = VecNormalize(vec(2, kind=Drift, length=8), norm_reward=True)
    normalised.obs_rms = env.obs_rms
    with_own = evaluate_guarded(model, normalised, guard, n_episodes=4)
    assert evaluate_guarded(model, vec(2, kind=Drift, length=8), guard, n_episodes=4) == with_own


@pytest.mark.parametrize("kind", [DQN, RecurrentPPO])
def test_other_hosts_are_evaluated_with_their_own_state_and_exploration(kind):
    settings = {"buffer_size": 100} if kind is DQN else {"n_steps": 20}
    model = kind("MlpPolicy" if kind is DQN else "MlpLstmPolicy", vec(1, length=8), seed=0, **settings)
    guard = Guard(Constraint("cost", limit=1.0))
    one, two = (evaluate_guarded(model, Gamble(length=8), guard, n_episodes=5, seed=1) for _ in range(2))
    assert one == two
    drawn = [evaluate_guarded(model, Gamble(length=8), guard, n_episodes=5, deterministic=False, seed=1) for _ in "ab"]
    assert drawn[0].length.mean == 8.0


def test_a_cost_that_could_not_be_measured_is_a_violation():
    env = Gamble(length=4)
    env.cost_of = lambda step, action: float("nan") if step == 2 else 0.0
    model = PPO("MlpPolicy", vec(1), **SETTINGS)
    found = evaluate_guarded(model, env, Guard(Constraint("cost", limit=3.0)), n_episodes=4)
    assert found.violation_rates["cost"].mean == 1.0
    assert found.costs["cost"].mean > 3.0


def test_lower_limits_are_violated_from_below():
    model = PPO("MlpPolicy", vec(1), **SETTINGS)
    env = Gamble(length=4)
    env.cost_of = lambda step, action: 1.0
    for limit, rate in ((5.0, 1.0), (4.0, 0.0)):
        guard = Guard(Constraint("cost", limit=limit, sense=">="))
        assert evaluate_guarded(model, env, guard, n_episodes=3).violation_rates["cost"].mean == rate


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    inside = []
    for _ in range(300):
        values = random.exponential(2.0, size=40)
        found = _bootstrap(values, 0.9)
        assert found.low <= found.mean <= found.high
        inside.append(found.low <= 2.0 <= found.high)
    # A percentile bootstrap of 40 skewed values covers a little less than it says; by chance ± 0.05 (3 σ of 300).
    assert 0.80 < np.mean(inside) < 0.95
    for rate in (0.0, 0.1, 0.5):
        inside = []
        for _ in range(100):
            found = _rate((random.random(60) >= rate).astype(float), 0.9)
            inside.append(found.low <= rate <= found.high)
        assert np.mean(inside) >= 0.9
    none = _rate(np.ones(100), 0.95)
    assert (none.mean, none.low) == (0.0, 0.0)
    assert 0.01 < none.high < 0.12


def test_what_cannot_be_evaluated_is_refused():
    model = PPO("MlpPolicy", vec(1), **SETTINGS)
    guard = Guard(Constraint("cost", limit=1.0))
    with pytest.raises(AttachError, match="is not wrapped"):
        evaluate_guarded(model, Gamble())
    with pytest.raises(AttachError, match="acts in"):
        evaluate_guarded(model, Drift(), guard)
    with pytest.raises(ConfigurationError, match="n_episodes"):
        evaluate_guarded(model, Gamble(), guard, n_episodes=1)
    with pytest.raises(ConfigurationError, match="confidence"):
        evaluate_guarded(model, Gamble(), guard, confidence=1.0)
    wrap(model, guard)
    with pytest.raises(AttachError, match="wrapped with another guard"):
        evaluate_guarded(model, Gamble(), Guard(Constraint("cost", limit=1.0)))


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("given", ["environment", "vector"])
def test_episodes_do_not_go_on_where_an_evaluation_in_their_environments_left_them(kind, given):
    seen = []

    class Watching(Guard):
        def step(self, rollout):
            seen.extend(rollout.lengths.tolist())
            return super().step(rollout)

    own = {"n_steps": 25, "batch_size": 25} if kind is PPO else {"learning_starts": 1, "buffer_size": 100}
    env, tiny = Drift(length=10), Ensemble(members=1, kappa=0.0, hidden=(8,))
    model = kind("MlpPolicy", DummyVecEnv([lambda: env]), seed=0, device=DEVICE, policy_kwargs={"net_arch": [8]}, **own)
    wrap(model, Watching(Constraint("cost", limit=5.0), RateLimit(0.5)), cost_critic=tiny, horizon=10)
    model.learn(25)
    evaluate_guarded(model, TimeLimit(env, 7) if given == "environment" else model.get_env(), n_episodes=2)
    model.learn(25, reset_num_timesteps=False)
    assert seen == [10.0, 10.0, 10.0, 10.0]


def test_an_evaluation_within_learn_needs_environments_of_its_own():
    class Evaluating(BaseCallback):
        def __init__(self, env):
            super().__init__()
            self.env = env

        def _on_step(self):
            return self.n_calls != 30 or evaluate_guarded(self.model, self.env, n_episodes=2).n_episodes == 2

    env = Drift(length=10)
    model = wrap(PPO("MlpPolicy", env, **SETTINGS), Guard(Constraint("cost", limit=5.0)))
    with pytest.raises(AttachError, match="Give it an environment of its own"):
        model.learn(40, Evaluating(env))
    model.learn(40, Evaluating(Drift(length=10)))
    assert evaluate_guarded(model, env, n_episodes=2).length.mean == 10.0
