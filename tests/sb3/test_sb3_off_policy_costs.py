"""Which costs the critic of an off-policy host learns from: those of the very rows the host has sampled."""

import logging

import numpy as np
import pytest
import torch
from sb3_contrib import CrossQ
from sb3_envs import Drift, callback_of, vec
from sb3_hosts import ACTORS, GREEDY, guarded, host, learner_of, spy
from sb3_numbered import books, numbered
from stable_baselines3 import DQN, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize

from guardrails import Constraint, RolloutError
from guardrails.schedulers import PID
from guardrails_sb3 import safety_critic


def expected_cost(serial, costs, ends, steps, gamma):
    total = 0.0
    for step in range(steps):
        total += gamma**step * costs[serial + step]
        if serial + step in ends or serial + step + 1 not in costs:
            break
    return total


@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        (SAC, "box", {}),
        (SAC, "box", {"buffer_size": 60}),
        (DQN, "box", {"buffer_size": 60}),
        (SAC, "dict", {"policy": "MultiInputPolicy", "buffer_size": 60}),
        (SAC, "box", {"buffer_size": 60, "n_steps": 3}),
        (DQN, "box", {"n_steps": 3}),
        (
            TD3,
            "box",
            {
                "buffer_size": 60,
                "optimize_memory_usage": True,
                "replay_buffer_kwargs": {"handle_timeout_termination": False},
            },
        ),
        (SAC, "goal", {"policy": "MultiInputPolicy", "replay_buffer_class": HerReplayBuffer, "buffer_size": 120}),
    ],
    ids=["plain", "wrapped-around", "discrete", "dict", "n-step-wrapped-around", "n-step", "memory", "hindsight"],
)
@pytest.mark.parametrize("n_envs", [1, 3])
def test_each_sampled_row_has_the_cost_of_its_own_transition(kind, shape, settings, n_envs):
    env = numbered(n_envs, shape=shape, discrete=kind in GREEDY)
    model = guarded(host(kind, env, train_freq=1, gamma=0.9, **settings))
    batches, checked = spy(model), 0

    class Check(BaseCallback):
        """Looks as soon as the host has trained, while the books say what had been stored by then."""

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            nonlocal checked
            costs, ends = books(env)
            while batches:
                batch = batches.pop()
                place = batch.observations
                place = place if isinstance(place, torch.Tensor) else place.get("place", place.get("observation"))
                for serial, found in zip(place[:, 0].tolist(), batch.costs[:, 0].tolist(), strict=True):
                    wanted = expected_cost(round(serial), costs, ends, settings.get("n_steps", 1), 0.9)
                    assert found == pytest.approx(wanted, rel=1e-5), serial  # float32
                    checked += 1

    model.learn(120 * n_envs, callback=Check())
    assert checked >= 16 * 50


def test_normalised_observations_and_rewards_leave_costs_as_they_are():
    env = VecNormalize(numbered(2))
    model = guarded(host(SAC, env))
    batches = spy(model)
    rewards = []
    step = model.get_vec_normalize_env
    guard = callback_of(model).guard
    stepped = guard.step
    guard.step = lambda rollout: rewards.extend(rollout.rewards) or stepped(rollout)
    model.learn(100)
    assert step() is env
    costs = set(np.float32(list(books(env)[0].values())).tolist())
    assert {each for batch in batches for each in batch.costs[:, 0].tolist()} <= costs
    assert all(float(batch.observations.abs().max()) <= env.clip_obs for batch in batches)
    assert max(abs(each) for each in rewards) <= 8.0, "sums of at most eight cosines: the environment's own rewards"


@pytest.mark.parametrize("kind", [*ACTORS, *GREEDY])
def test_the_critic_takes_one_step_per_step_of_the_host_on_the_actions_the_host_computed(kind):
    model = guarded(host(kind, train_freq=2, gradient_steps=3))
    batches, asked = spy(model), []
    if kind in ACTORS and kind is not CrossQ:
        model.critic_target.register_forward_hook(lambda module, args, output: asked.append(args))
    model.learn(90)
    assert len(batches) == model._n_updates == safety_critic(model).critic.updates > 40
    for batch, args in zip(batches, asked, strict=False):
        assert torch.equal(batch.next_observations, args[0])
        assert torch.equal(batch.next_actions, args[1])
    assert all(not batch.next_actions.requires_grad for batch in batches)
    if kind is CrossQ:  # it asks its critic about both halves at once
        first, second = (torch.stack([batch.next_actions for batch in batches[i::2]]) for i in range(2))
        assert first.shape[1:] == (16, 1)
        assert not torch.equal(first, second)


def test_hindsight_batches_are_real_rows_then_relabelled_ones_with_their_own_next_observations():
    env = numbered(2, shape="goal")
    model = guarded(host(SAC, env, policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, buffer_size=200))
    batches = spy(model)
    model.learn(120)
    goals = torch.cat([batch.observations["desired_goal"] for batch in batches])
    assert (goals == 3.0).any()
    assert (goals != 3.0).any()


def test_transitions_from_before_the_guard_are_left_out_and_pointed_out(caplog):
    model = host(SAC).learn(60)
    with caplog.at_level(logging.WARNING):
        guarded(model)
    assert "costs of 60 transitions in the replay buffer are not known" in caplog.text
    batches = spy(model)
    model.learn(60, reset_num_timesteps=False)
    unknown = torch.cat([batch.costs for batch in batches]).isnan()
    assert 0.2 < unknown.float().mean() < 0.95
    assert all(bool(parameter.isfinite().all()) for parameter in safety_critic(model).critic.network.parameters())


def test_a_transition_that_the_user_adds_brings_its_own_cost():
    model = guarded(host(SAC, vec(1, kind=Drift)))
    row = np.zeros((1, 2), np.float32)
    infos = [{"cost": 5.0}]
    model.replay_buffer.add(row, row, np.zeros((1, 1)), np.zeros(1), np.zeros(1), infos)
    assert learner_of(model)._column.values[0, 0, 0] == 5.0
    with pytest.raises(RolloutError, match=r"info\['cost'\]"):
        model.replay_buffer.add(row, row, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    assert model.replay_buffer.pos == 1


class Mirrored(ReplayBuffer):
    """Stores each transition mirrored as well."""

    def add(self, obs, next_obs, action, reward, done, infos):
        super().add(obs, next_obs, action, reward, done, infos)
        super().add(obs, next_obs, -action, reward, done, infos)


class Sparse(ReplayBuffer):
    """Stores every other transition."""

    skips = False

    def add(self, *transition):
        self.skips = not self.skips
        if not self.skips:
            super().add(*transition)


@pytest.mark.parametrize("kind", [Mirrored, Sparse])
def test_a_buffer_that_stores_several_rows_of_a_step_or_none_has_the_cost_of_each_row(kind):
    model = host(SAC, vec(1, kind=Drift, length=9), replay_buffer_class=kind, buffer_size=31)
    guarded(model, Constraint("effort", limit=1.0)).learn(101)
    buffer, costs = model.replay_buffer, learner_of(model)._column.values[..., 0]
    assert buffer.full
    np.testing.assert_allclose(costs, np.abs(buffer.actions[..., 0]), atol=1e-6)  # scaled and back in float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_cost_that_cannot_be_measured_counts_as_the_worst_and_tightens(value):
    env = numbered(1)
    inner = env.envs[0]
    step = inner.step

    def unmeasured(action):
        return *step(action)[:4], {"cost": value if inner._step == 3 else 1.0}

    inner.step = unmeasured
    model = guarded(host(SAC, env), Constraint("cost", limit=20.0, scheduler=PID(kp=1.0), scale=4.0))
    model.learn(80)
    assert callback_of(model).guard.multipliers["cost"] > 0.0
    column = learner_of(model)._column.values[: model.replay_buffer.pos]
    assert sorted(set(column.ravel().tolist())) == [1.0, 4.0], "one violation scale, worse than what has been seen"


def test_a_key_that_no_info_carries_stops_the_first_step():
    model = guarded(host(SAC), Constraint("harm", limit=1.0, cost="damage"))
    with pytest.raises(RolloutError, match=r"'harm' reads info\['damage'\]"):
        model.learn(60)
    assert model.num_timesteps == 2
