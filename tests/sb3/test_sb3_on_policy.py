"""What a guarded run trains on, against the documented formula worked out from the raw steps of a real run."""

import copy
import math

import numpy as np
import pytest
import torch
from devices import DEVICE
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from sb3_envs import Drift, Gamble, callback_of, learn, parameters, same, vec
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Fixed
from guardrails_sb3 import wrap
from guardrails_sb3.cost_value import CostValue

SMALL = {"n_steps": 48, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": DEVICE}


def fixed(multiplier, name="cost", **settings):
    return Constraint(name, limit=5.0, scheduler=Fixed(multiplier), **settings)


class Witness(BaseCallback):
    """Writes down, per rollout, all that the mixing is a function of, and what the host then trains on."""

    def __init__(self):
        super().__init__()
        self.rollouts = []

    def _init_callback(self):
        buffer, train = self.model.rollout_buffer, self.model.train
        compute = buffer.compute_returns_and_advantage

        def computing(last_values, dones):
            compute(last_values, dones)
            self.rollouts[-1]["reward_advantages"] = buffer.advantages.copy()
            self.rollouts[-1]["returns"] = buffer.returns.copy()
            self.rollouts[-1]["last"] = copy.deepcopy(self.model._last_obs)

        def training():
            self.rollouts[-1]["trained_on"] = buffer.advantages.copy()
            self.rollouts[-1]["trained_returns"] = buffer.returns.copy()
            train()

        buffer.compute_returns_and_advantage, self.model.train = computing, training

    def _on_rollout_start(self):
        critic = callback_of(self.model)._critic
        network = None if critic is None else copy.deepcopy(critic.network)
        observations = copy.deepcopy(self.model._last_obs)
        self.rollouts.append({"network": network, "observations": [observations], "infos": [], "dones": []})

    def _on_step(self):
        self.rollouts[-1]["infos"].append(copy.deepcopy(self.locals["infos"]))
        self.rollouts[-1]["dones"].append(self.locals["dones"].copy())
        self.rollouts[-1]["observations"].append(copy.deepcopy(self.locals["new_obs"]))
        return True


def expected_advantages(model, seen, keys, scales, gamma, lam):
    """A_c from the raw steps, an explicit recursion per environment and constraint in float64."""
    n_steps, n_envs = len(seen["dones"]), len(seen["dones"][0])
    advantages = np.zeros((n_steps, n_envs, len(keys)))

    def value(observation):
        with torch.no_grad():
            row = model.policy.obs_to_tensor(observation)[0]
            return seen["network"](row).cpu().double().numpy()[0] * scales

    def of_env(observations, env):
        if isinstance(observations, dict):
            return {key: rows[env] for key, rows in observations.items()}
        return observations[env]

    seen["network"].eval()
    for env in range(n_envs):
        following = np.zeros(len(keys))
        for t in reversed(range(n_steps)):
            info = seen["infos"][t][env]
            cost = np.array([info[key] for key in keys])
            if seen["dones"][t][env]:
                truncated = info.get("TimeLimit.truncated", False)
                next_value = value(info["terminal_observation"]) if truncated else 0.0
                following = np.zeros(len(keys))
            else:
                next_value = value(of_env(seen["observations"][t + 1], env))
            delta = cost + gamma * next_value - value(of_env(seen["observations"][t], env))
            following = delta + gamma * lam * following
            advantages[t, env] = following
    return advantages


@pytest.mark.parametrize("truncate", [False, True], ids=["terminated", "truncated"])
@pytest.mark.parametrize("observation", ["box", "discrete", "dict"])
def test_ppo_trains_on_exactly_the_documented_mixture(truncate, observation):
    env = vec(3, observation=observation, truncate=truncate, costs=("a", "b"))
    policy = "MultiInputPolicy" if observation == "dict" else "MlpPolicy"
    model = PPO(policy, env, gamma=0.97, gae_lambda=0.9, **SMALL)
    limits = {"a": (0.5, 1.0), "b": (2.0, -1.0)}
    guard = Guard(fixed(0.5, "a"), fixed(2.0, "b", sense=">=", scale=3.0))
    witness = Witness()
    wrap(model, guard).learn(48 * 3 * 2, callback=witness)
    assert len(witness.rollouts) == 2
    for seen in witness.rollouts:
        costs = expected_advantages(model, seen, list(limits), np.array([5.0, 3.0]), 0.97, 0.9)
        weighed = sum(lam * sign * costs[..., index] for index, (lam, sign) in enumerate(limits.values()))
        expected = (seen["reward_advantages"] - weighed) / (1 + 0.5 + 2.0)
        # float32 networks evaluated row by row here and in one batch there
        np.testing.assert_allclose(seen["trained_on"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(seen["trained_returns"], seen["returns"])
        assert np.abs(seen["trained_on"] - seen["reward_advantages"]).max() > 0.1
    assert any(np.any(dones) for dones in witness.rollouts[0]["dones"])


@pytest.mark.parametrize(
    ("algorithm", "policy", "settings"),
    [
        (A2C, "MlpPolicy", {"n_steps": 24}),
        (TRPO, "MlpPolicy", {"n_steps": 48, "batch_size": 48}),
        (RecurrentPPO, "MlpLstmPolicy", {"n_steps": 48, "batch_size": 48, "n_epochs": 1}),
        (MaskablePPO, "MlpPolicy", {"n_steps": 48, "batch_size": 48, "n_epochs": 1}),
    ],
)
def test_the_other_on_policy_algorithms_train_on_the_same_mixture(algorithm, policy, settings):
    model = algorithm(policy, vec(2, truncate=True, masks=algorithm is MaskablePPO), seed=0, device=DEVICE, **settings)
    witness = Witness()
    wrap(model, Guard(fixed(2.0))).learn(2 * 48 * 2, callback=witness)
    for seen in witness.rollouts:
        costs = expected_advantages(model, seen, ["cost"], np.array([5.0]), model.gamma, model.gae_lambda)
        expected = (seen["reward_advantages"] - 2.0 * costs[..., 0]) / 3.0
        np.testing.assert_allclose(seen["trained_on"], expected, rtol=1e-4, atol=1e-4)  # float32 networks


def test_a_recurrent_policy_is_guarded_over_dict_observations():
    model = RecurrentPPO(
        "MultiInputLstmPolicy", vec(2, observation="dict"), n_steps=32, batch_size=32, n_epochs=1, seed=0
    )
    witness = Witness()
    wrap(model, Guard(fixed(2.0))).learn(64, callback=witness)
    seen = witness.rollouts[0]
    costs = expected_advantages(model, seen, ["cost"], np.array([5.0]), model.gamma, model.gae_lambda)
    expected = (seen["reward_advantages"] - 2.0 * costs[..., 0]) / 3.0
    np.testing.assert_allclose(seen["trained_on"], expected, rtol=1e-4, atol=1e-4)  # float32 networks


def test_images_pass_through_a_features_extractor_of_their_own():
    model = PPO("CnnPolicy", vec(1, observation="image"), **SMALL)
    witness = Witness()
    wrap(model, Guard(fixed(2.0))).learn(48, callback=witness)
    seen = witness.rollouts[0]
    assert not set(callback_of(model)._critic.network.parameters()) & set(model.policy.parameters())
    costs = expected_advantages(model, seen, ["cost"], np.array([5.0]), model.gamma, model.gae_lambda)
    expected = (seen["reward_advantages"] - 2.0 * costs[..., 0]) / 3.0
    np.testing.assert_allclose(seen["trained_on"], expected, rtol=1e-3, atol=1e-3)  # float32 convolutions


def test_the_cost_value_function_is_trained_on_cost_returns():
    model = PPO("MlpPolicy", vec(2), gamma=0.9, gae_lambda=1.0, **SMALL)
    witness, targets = Witness(), []
    wrap(model, Guard(fixed(2.0)))
    critic = callback_of(model)._critic
    fit = critic.fit
    critic.fit = lambda observations, wanted, step: targets.append(wanted) or fit(observations, wanted, step)
    model.learn(96, callback=witness)
    seen, compared = witness.rollouts[0], 0
    for env in range(2):
        following = None  # unknown until an episode ends: the rest bootstraps from the network
        for t in reversed(range(48)):
            if seen["dones"][t][env]:
                following = 0.0
            if following is not None:
                following = seen["infos"][t][env]["cost"] + 0.9 * following
                assert targets[0].reshape(48, 2)[t, env] == pytest.approx(following, rel=1e-9)  # sums in another order
                compared += 1
    assert compared > 60


def test_without_the_cost_critic_the_cost_to_go_within_the_rollout_is_used():
    model = PPO("MlpPolicy", vec(2), gamma=0.9, **SMALL)
    witness = Witness()
    wrap(model, Guard(fixed(2.0)), cost_critic=False).learn(96, callback=witness)
    seen = witness.rollouts[0]
    togo = np.zeros((48, 2))
    for env in range(2):
        following = 0.0
        for t in reversed(range(48)):
            following = seen["infos"][t][env]["cost"] + 0.9 * (0.0 if seen["dones"][t][env] else following)
            togo[t, env] = following
    expected = (seen["reward_advantages"] - 2.0 * (togo - togo.mean())) / 3.0
    np.testing.assert_allclose(seen["trained_on"], expected, rtol=1e-5, atol=1e-6)  # stored as float32


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
@pytest.mark.parametrize("cost_critic", [True, False])
def test_a_multiplier_of_zero_leaves_training_bit_for_bit_as_unguarded(algorithm, cost_critic):
    plain = algorithm("MlpPolicy", vec(2, kind=Drift), seed=3, device=DEVICE, n_steps=32)
    guarded = algorithm("MlpPolicy", vec(2, kind=Drift), seed=3, device=DEVICE, n_steps=32)
    wrap(guarded, Guard(fixed(0.0)), cost_critic=cost_critic)
    expected = parameters(learn(plain, 192))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert same(expected, parameters(learn(guarded, 192)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_building_and_training_the_cost_value_function_leaves_the_global_generators_alone():
    model = PPO("MlpPolicy", vec(2), **SMALL)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    critic = CostValue(model, [1.0])
    critic.fit(np.zeros((64, 3)), np.ones((64, 1)), step=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_the_cost_value_function_learns_a_value_in_the_costs_own_unit():
    model = PPO("MlpPolicy", vec(2), **{**SMALL, "n_epochs": 10})
    critic = CostValue(model, [25.0, 0.05])
    rows = np.random.default_rng(0).uniform(-1, 1, size=(512, 3))
    targets = np.stack([40.0 + 20.0 * rows[:, 0], 0.02 + 0.05 * rows[:, 1]], axis=1)
    losses = [critic.fit(rows, targets, step) for step in range(30)]
    assert (losses[-1] < 0.01 * losses[0]).all()
    error = np.abs(critic.predict(rows) - targets).mean(axis=0)
    assert (error < [1.0, 0.005]).all()  # a tenth of each target's spread


def rows_of(guard):
    """Return the list that every Rollout given to ``guard`` is put into."""
    rollouts, step = [], guard.step
    guard.step = lambda rollout: rollouts.append(rollout) or step(rollout)
    return rollouts


@pytest.mark.parametrize("maker", [DummyVecEnv, SubprocVecEnv])
def test_episode_sums_over_vector_environments_equal_a_tally_of_every_step(maker):
    env = maker(
        [lambda: Gamble(length=17, costs=("cost", "b")), lambda: Gamble(length=29, costs=("cost", "b"), seed=1)]
    )
    guard = Guard(fixed(0.0), fixed(0.0, "second", cost=lambda info: info["b"] + 1.0))
    rollouts, tally, ended = rows_of(guard), np.zeros((2, 4)), []

    def count(locals_, globals_):
        for index, info in enumerate(locals_["infos"]):
            tally[index] += [locals_["rewards"][index], info["cost"], info["b"] + 1.0, 1.0]
            if locals_["dones"][index]:
                ended.append(tally[index].copy())
                tally[index] = 0.0
        return True

    wrap(PPO("MlpPolicy", env, **SMALL), guard).learn(2 * 48 * 2, callback=count)
    env.close()
    found = [
        [r.rewards[i], r.costs["cost"][i], r.costs["second"][i], r.lengths[i]]
        for r in rollouts
        for i in range(r.n_rows)
    ]
    np.testing.assert_allclose(found, ended, rtol=1e-6)  # the host hands out float32 rewards
    assert [r.n_rows for r in rollouts] == [3, 5]


@pytest.mark.parametrize("saved", [False, True])
def test_an_episode_that_had_just_begun_as_a_callback_stopped_learn_keeps_the_cost_of_its_first_step(tmp_path, saved):
    """The second step of an episode is the last one: the host has not taken up then where the episode began."""

    def watched(model, **settings):
        guard = Guard(fixed(0.0, cost=lambda info: 1.0))
        return wrap(model, guard, **settings), rows_of(guard)

    env = vec(2, kind=Drift, length=5)
    model, rollouts = watched(PPO("MlpPolicy", env, **SMALL))
    model.learn(96, callback=lambda locals_, globals_: model.num_timesteps < 2 * 6)
    if saved:
        model.save(tmp_path / "run.zip")
        loaded = PPO.load(tmp_path / "run.zip", env=env, device=DEVICE, force_reset=False)
        model, rollouts = watched(loaded, resume=tmp_path / "run.zip")
    model.learn(96, reset_num_timesteps=False)
    model.learn(96)
    costs = [cost for rollout in rollouts for cost in rollout.cost("cost")]
    assert len(costs) == 30
    assert set(costs) == {5.0, 8.0}


def test_vec_normalize_scales_neither_costs_nor_the_rewards_of_the_rows():
    env = VecNormalize(vec(2, truncate=True))
    guard = Guard(fixed(2.0))
    rollouts, witness = rows_of(guard), Witness()
    model = wrap(PPO("MlpPolicy", env, **SMALL), guard)
    model.learn(2 * 48, callback=witness)
    risky = rollouts[0].costs["cost"]
    assert set(risky) <= set(map(float, range(24)))
    np.testing.assert_allclose(rollouts[0].rewards, risky + 0.3 * (rollouts[0].lengths - risky), rtol=1e-5)
    seen = witness.rollouts[0]
    costs = expected_advantages(model, seen, ["cost"], np.array([5.0]), 0.99, 0.95)
    expected = (seen["reward_advantages"] - 2.0 * costs[..., 0]) / 3.0
    np.testing.assert_allclose(seen["trained_on"], expected, rtol=1e-4, atol=1e-4)  # float32 networks


def test_a_rollout_in_which_no_episode_ends_holds_the_multiplier():
    guard = Guard(Constraint("cost", limit=1.0, scheduler=PID(ki=0.5)))
    model = wrap(PPO("MlpPolicy", vec(1, length=100), **SMALL), guard)
    held = []
    model.learn(48 * 4, callback=lambda locals_, globals_: held.append(guard.multipliers["cost"]) or True)
    per_rollout = [*held[48::48], guard.multipliers["cost"]]
    assert per_rollout[0] == per_rollout[1] == 0.0 < per_rollout[2] == per_rollout[3]
    assert guard.decision.step == 4


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("cost_critic", [True, False])
def test_a_cost_that_is_not_a_number_tightens_and_training_goes_on(broken, cost_critic):
    env = vec(1)
    env.envs[0].cost_of = lambda step, action: broken if step == 7 else 0.0
    guard = Guard(Constraint("cost", limit=5.0))
    model = wrap(PPO("MlpPolicy", env, **SMALL), guard, cost_critic=cost_critic)
    model.learn(96)
    facts = guard.decision.constraints["cost"]
    assert facts.violation > 0
    assert facts.invalid_rows > 0
    assert facts.multiplier > 0
    assert all(torch.isfinite(tensor).all() for tensor in model.policy.parameters())
    assert np.isfinite(model.rollout_buffer.advantages).all()


class Capture(KVWriter):
    def __init__(self):
        self.dumps = []

    def write(self, key_values, key_excluded, step=0):
        self.dumps.append(dict(key_values))

    def close(self):
        pass


def test_the_hosts_logger_receives_cost_limit_violation_multiplier_and_critic_loss():
    guard, capture = Guard(fixed(1.5)), Capture()
    model = wrap(PPO("MlpPolicy", vec(2), **SMALL), guard)
    model.set_logger(Logger(None, [capture]))
    model.learn(96)
    logged = {key: value for key, value in capture.dumps[0].items() if key.startswith("guardrails/")}
    facts = guard.decision.constraints["cost"]
    assert logged.pop("guardrails/cost/value_loss") > 0
    assert logged == {
        "guardrails/cost/cost": facts.cost,
        "guardrails/cost/limit": 5.0,
        "guardrails/cost/violation": facts.violation,
        "guardrails/cost/multiplier": 1.5,
    }
    assert "rollout/ep_rew_mean" not in logged


def test_a_cost_that_was_not_measured_is_not_logged():
    capture = Capture()
    model = wrap(PPO("MlpPolicy", vec(1, length=100), **SMALL), Guard(fixed(1.5)), cost_critic=False)
    model.set_logger(Logger(None, [capture]))
    model.learn(48)
    keys = {key for key in capture.dumps[0] if key.startswith("guardrails/")}
    assert keys == {"guardrails/cost/limit", "guardrails/cost/multiplier"}


def test_long_constraint_names_do_not_break_the_hosts_console(tmp_path):
    long = "average_contact_force_on_both_feet"
    capture = Capture()
    model = wrap(PPO("MlpPolicy", vec(2), **SMALL), Guard(fixed(1.0, long, cost="cost"), fixed(1.0, "cost" * 5)))
    env_key = "cost" * 5
    for env in model.env.envs:
        env.unwrapped.costs = ("cost", env_key)
    model.set_logger(Logger(None, [HumanOutputFormat(str(tmp_path / "log.txt")), capture]))
    model.learn(96)
    assert capture.dumps[0][f"guardrails/{long}/multiplier"] == 1.0
    assert f"{env_key}/multiplier" in (tmp_path / "log.txt").read_text()


def test_the_shuffle_of_the_cost_value_function_is_a_function_of_seed_and_step():
    model = PPO("MlpPolicy", vec(2), **SMALL)
    rows = np.random.default_rng(0).normal(size=(512, 3))
    targets = rows[:, :1] ** 2

    def fitted(step):
        critic = CostValue(model, [1.0])
        critic.fit(rows, targets, step)
        return critic.predict(rows)

    np.testing.assert_array_equal(fitted(1), fitted(1))
    assert not np.array_equal(fitted(1), fitted(2))


def test_continuous_actions_with_bounds_are_guarded():
    model = PPO("MlpPolicy", vec(2, kind=Drift), **SMALL)
    assert isinstance(model.action_space, spaces.Box)
    guard = Guard(fixed(1.0), fixed(1.0, "effort"))
    wrap(model, guard).learn(96)
    assert guard.decision.constraints["effort"].cost > 0
