"""Off-policy hosts: what is refused, what is left alone, and the settings that are guarded."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from devices import DEVICE
from gymnasium import spaces
from sb3_contrib import ARS, QRDQN, TQC, CrossQ
from sb3_envs import Drift, Gamble, Pictured, callback_of, learn, parameters, same, vec
from sb3_hosts import ACTORS, GREEDY, SMALL, guarded, host, learner_of, spy
from sb3_numbered import Numbered, books, numbered
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import nn

from guardrails import AttachError, Constraint, Guard, StateError
from guardrails.schedulers import DualAscent, Fixed
from guardrails_sb3 import endless, safety_critic, unwrap, wrap


def trace(model):
    networks = [(name, tuple(module._forward_hooks)) for name, module in model.policy.named_modules()]
    own = [(name, sorted(vars(module))) for name, module in model.policy.named_modules()]
    return sorted(vars(model)), sorted(vars(model.replay_buffer)), networks, own


@pytest.mark.parametrize("kind", [*ACTORS, *GREEDY])
def test_unwrap_leaves_nothing_behind_and_the_host_trains_as_if_it_had_never_been_wrapped(kind):
    plain, model = host(kind), host(kind)
    before = trace(model)
    guarded(model)
    assert trace(model) != before
    unwrap(model)
    assert trace(model) == before
    assert same(parameters(learn(plain, 80)), parameters(learn(model, 80)))


@pytest.mark.parametrize("kind", [SAC, TD3, DQN])
def test_unwrap_inside_learn_ends_the_critics_learning(kind):
    model = host(kind)
    guarded(model)
    critic = safety_critic(model).critic
    updates = []

    def leave(locals_, globals_):
        if model.num_timesteps == 60:
            unwrap(model)
            updates.append(critic.updates)
        return True

    model.learn(100, callback=leave)
    assert critic.updates == updates[0] > 0


def test_unwrap_refuses_while_something_stands_in_the_place_of_a_buffers_method():
    model = guarded(host(SAC))
    ours = model.replay_buffer.add
    model.replay_buffer.add = lambda *args: ours(*args)
    with pytest.raises(AttachError, match=r"ReplayBuffer\.add was replaced"):
        unwrap(model)
    model.replay_buffer.add = ours
    model.learn(60)
    assert safety_critic(model).critic.updates > 0, "it was still guarded"
    unwrap(model)


class Ranked(ReplayBuffer):
    def _get_samples(self, batch_inds, env=None):
        return super()._get_samples(np.sort(batch_inds), env)


class Weighted(ReplayBuffer):
    """Has no use for ``_get_samples``."""

    def sample(self, batch_size, env=None):
        rows, envs = np.random.randint(self.size(), size=batch_size), np.random.randint(self.n_envs, size=batch_size)
        ends = (self.dones[rows, envs], self.rewards[rows, envs])
        kept = [part[rows, envs] for part in (self.observations, self.actions, self.next_observations)]
        return ReplayBufferSamples(*map(self.to_torch, [*kept, *(part.reshape(-1, 1) for part in ends)]))


class Mixed(ReplayBuffer):
    """Adds transitions from elsewhere to each batch."""

    def sample(self, batch_size, env=None):
        own = super().sample(batch_size // 2, env)
        return ReplayBufferSamples(*(None if part is None else torch.cat([part, part]) for part in own))


class Hasty(SAC):
    def train(self, gradient_steps, batch_size=64):
        self._n_updates += gradient_steps


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            lambda: host(SAC, replay_buffer_class=Ranked),
            {},
            r"Ranked draws its batches in a way of its own.*ReplayBuffer",
        ),
        (
            lambda: host(SAC),
            {"horizon": None},
            r"SAC's environments do not tell it: they state no time limit.*horizon=T",
        ),
        (lambda: host(SAC), {"critic": False}, r"SAC learns from single transitions"),
        (lambda: host(SAC), {"critic": 4}, r"cost_critic is 4; give True, False or an Ensemble"),
    ],
    ids=["buffer", "horizon", "no critic", "foreign"],
)
def test_what_cannot_be_guarded_is_refused_by_name_and_left_as_it_was(model, settings, message):
    model = model()
    before = sorted(vars(model))
    guard = Guard(Constraint("cost", limit=1.0))
    with pytest.raises(AttachError, match=message):
        wrap(model, guard, cost_critic=settings.get("critic", SMALL), horizon=settings.get("horizon", 9))
    assert sorted(vars(model)) == before
    assert guard.host is None


@pytest.mark.parametrize("kind", [Weighted, Mixed])
def test_a_buffer_whose_batches_hold_rows_that_it_was_not_seen_to_draw_is_refused_by_name(kind):
    model = guarded(host(SAC, replay_buffer_class=kind))
    with pytest.raises(AttachError, match=rf"{kind.__name__} draws its batches in a way of its own.*takes every batch"):
        model.learn(60)


def test_the_horizon_is_the_time_limit_of_the_environments():
    for env in (gym.wrappers.TimeLimit(Drift(), 40), gym.make("Pendulum-v1")):
        model = SAC("MlpPolicy", env, buffer_size=50)
        wrap(model, Guard(Constraint("cost", limit=1.0)))
        assert safety_critic(model).horizon == (200 if env.spec else 40)
        unwrap(model)


def test_a_train_that_passes_the_hooks_by_is_an_error_at_the_next_step():
    model = guarded(host(Hasty))
    with pytest.raises(AttachError, match="Hasty trained in a way that its guard did not see"):
        model.learn(60)


LEAN = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
SETTINGS = {
    "several environments": (ACTORS + GREEDY, lambda: {"train_freq": 2, "gradient_steps": -1}),
    "per episode": (ACTORS + GREEDY, lambda: {"train_freq": (1, "episode"), "gradient_steps": -1}),
    "n-step": (ACTORS + GREEDY, lambda: {"n_steps": 3}),
    "memory": (ACTORS + GREEDY, lambda: LEAN),
    "dict": ([SAC, TQC, TD3, DDPG, *GREEDY], lambda: {"policy": "MultiInputPolicy"}),
    "sde": ([SAC, TQC, CrossQ], lambda: {"use_sde": True, "sde_sample_freq": 4}),
    "noise": ([SAC, TD3, DDPG], lambda: {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}),
    "fixed entropy": ([SAC, TQC, CrossQ], lambda: {"ent_coef": 0.1}),
    "image": ([DQN, QRDQN], lambda: {"policy": "CnnPolicy", "env": vec(1, observation="image"), "policy_kwargs": {}}),
    "image for an actor": ([SAC, TQC, TD3, DDPG], lambda: {"policy": "CnnPolicy", "env": vec(1, kind=Pictured)}),
    "discrete": (GREEDY, lambda: {"env": vec(2, observation="discrete")}),
    "float64": (GREEDY, lambda: {"env": vec(2, observation="box")}),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for name, (kinds, _) in SETTINGS.items() for kind in kinds],
)
def test_every_setting_of_every_host_is_guarded(kind, name):
    settings = SETTINGS[name][1]()
    n_envs = 1 if name == "per episode" else 3
    settings = {"env": numbered(n_envs, shape="dict" if name == "dict" else "box", discrete=kind in GREEDY)} | settings
    model = guarded(host(kind, **settings))
    batches = spy(model)
    model.learn(78)
    critic = safety_critic(model).critic
    assert critic.updates == model._n_updates == len(batches) >= 4
    assert not torch.cat([batch.costs for batch in batches]).isnan().any()
    assert callback_of(model).guard.decision.step > 0


def test_a_features_extractor_that_learns_is_the_critics_own_and_draws_nothing_from_the_hosts_generators():
    def build():
        return host(DQN, vec(1, observation="image"), policy="CnnPolicy", policy_kwargs={}, batch_size=8)

    plain, watched = build(), build()
    guarded(watched, Constraint("cost", limit=2.0, scheduler=Fixed(0.0)))
    network = safety_critic(watched).critic.network
    first = [parameter.clone() for parameter in network.encoder.parameters()]
    assert not set(network.parameters()) & set(watched.policy.parameters())
    assert same(parameters(learn(plain, 40)), parameters(learn(watched, 40)))
    assert not all(torch.equal(was, now) for was, now in zip(first, network.encoder.parameters(), strict=True))


class Pretrained(BaseFeaturesExtractor):
    """Features that a network makes which the user brings along."""

    def __init__(self, space, net):
        super().__init__(space, 4)
        self.net = net

    def forward(self, observations):
        return self.net(observations)


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_encoder_that_the_user_has_brought_along_is_trained_by_the_host_alone(tmp_path, kind, frozen):
    def build():
        torch.manual_seed(0)
        extractor = {"net": nn.Linear(2, 4).requires_grad_(not frozen)}
        policy = {"features_extractor_class": Pretrained, "features_extractor_kwargs": extractor, "net_arch": [8]}
        if kind is SAC:
            return host(SAC, policy_kwargs=policy)
        return PPO("MlpPolicy", vec(2, kind=Drift, length=9), n_steps=20, seed=0, device=DEVICE, policy_kwargs=policy)

    def watch(model, **settings):
        guard = Guard(Constraint("cost", limit=2.0, scheduler=Fixed(0.0)))
        return wrap(model, guard, cost_critic=SMALL if kind is SAC else True, horizon=9, **settings)

    plain, watched = learn(build(), 80), learn(watch(build()), 80)
    assert same(parameters(plain), parameters(watched))
    watched.save(tmp_path / "run.zip")
    assert watch(kind.load(tmp_path / "run.zip", env=watched.env), resume=tmp_path / "run.zip").learn(40)


def test_actions_of_the_environment_are_judged_as_the_buffer_holds_them():
    model = guarded(host(SAC, numbered(1)))
    own = safety_critic(model)
    raw = torch.tensor([[-2.0], [2.0], [6.0], [99.0]], requires_grad=True)
    torch.testing.assert_close(own.scale(raw).cpu(), torch.tensor([[-1.0], [0.0], [1.0], [1.0]]))
    observations = np.zeros((4, 2))
    risks = own.risk(observations, raw)
    assert risks.shape == (4,)
    torch.testing.assert_close(risks, own.critic.risk(torch.zeros(4, 2), own.scale(raw)))
    risks.sum().backward()
    assert raw.grad[1].abs() > 0


def test_actions_that_are_neither_continuous_nor_one_choice_have_no_safety_critic():
    class Two(Gamble):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.MultiDiscrete([2, 2])

    with pytest.raises(AttachError, match=r"continuous actions or one choice.*MultiDiscrete"):
        wrap(PPO("MlpPolicy", Two()), Guard(Constraint("cost", limit=1.0)), cost_critic=SMALL, horizon=5)


def test_a_model_without_safety_critic_says_so():
    for model in (host(SAC), wrap(PPO("MlpPolicy", vec()), Guard(Constraint("cost", limit=1.0)))):
        with pytest.raises(AttachError, match="has no safety critic"):
            safety_critic(model)


def test_the_multiplier_follows_what_the_episodes_cost():
    model = host(SAC, numbered(1), learning_starts=0)
    guarded(model, Constraint("cost", limit=10.0, scheduler=DualAscent(0.5)))
    assert isinstance(model.env.envs[0].unwrapped, Numbered)
    model.learn(14)
    costs, _ = books(model.env)
    sums = [sum(list(costs.values())[start : start + 7]) for start in (0, 7)]
    expected = 0.0
    for total in sums:
        expected = max(0.0, expected + 0.5 * (total - 10.0) / 10.0)
    assert callback_of(model).guard.multipliers["cost"] == pytest.approx(expected)


def test_a_time_limit_is_asked_of_environments_in_processes_of_their_own_without_ending_them():
    env = SubprocVecEnv([lambda: gym.wrappers.TimeLimit(Drift(), 40)] * 2)
    model = SAC("MlpPolicy", env, buffer_size=50)
    assert safety_critic(wrap(model, Guard(Constraint("cost", limit=1.0)))).horizon == 40
    env.close()
    env = SubprocVecEnv([Drift] * 2)
    model = SAC("MlpPolicy", env, buffer_size=50)
    with pytest.raises(AttachError, match="they state no time limit"):
        wrap(model, Guard(Constraint("cost", limit=1.0)))
    assert env.reset().shape == (2, *Drift.observation_space.shape)
    env.close()


def test_a_tighter_time_limit_about_a_registered_one_is_the_horizon():
    model = SAC("MlpPolicy", gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 50), buffer_size=50)
    assert safety_critic(wrap(model, Guard(Constraint("cost", limit=1.0)))).horizon == 50


@pytest.mark.parametrize("horizon", [0, -1, 2.5, True])
def test_a_horizon_that_is_no_number_of_steps_is_refused(horizon):
    with pytest.raises(AttachError, match="horizon is"):
        wrap(host(SAC), Guard(Constraint("cost", limit=1.0)), cost_critic=SMALL, horizon=horizon)


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("kind", [SAC, DQN, TD3])
def test_a_train_that_is_interrupted_is_no_reason_to_refuse_the_next(kind):
    model = guarded(host(kind, gradient_steps=4))
    steps = []

    def interrupt(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == 30:
            raise InterruptionError

    optimizer = (model.policy if kind is DQN else model.critic).optimizer
    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(InterruptionError):
        model.learn(200)
    handle.remove()
    learned = learner_of(model)._seams.learned
    model.learn(40, reset_num_timesteps=False)
    assert learner_of(model)._seams.learned > learned


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_episodes_that_never_end_are_pointed_out_once(kind, caplog, monkeypatch):
    monkeypatch.setattr(endless, "PATIENCE", 50)
    env = vec(2, kind=Drift, length=10_000)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=32) if kind is PPO else host(kind, env=env)
    learn(guarded(model, critic=SMALL if kind is SAC else True), 200)
    said = [record for record in caplog.records if "No environment has ended an episode" in record.message]
    assert len(said) == 1
    assert "TimeLimit" in said[0].message


def test_the_state_of_a_host_of_another_family_is_refused_by_name(tmp_path):
    model = wrap(ARS("LinearPolicy", vec(1, kind=Drift), n_delta=2), Guard(Constraint("cost", limit=1.0)))
    model.save(tmp_path / "ars.zip")
    with pytest.raises(StateError, match="not saved by an off-policy algorithm"):
        wrap(host(SAC), Guard(Constraint("cost", limit=1.0)), cost_critic=SMALL, horizon=9, resume=tmp_path / "ars.zip")


def expected_values(model):
    """Ask the target networks at a batch of the user's own, as a callback that logs the TD error does."""
    batch = model.replay_buffer.sample(16)
    with torch.no_grad():
        if isinstance(model, DQN):
            model.q_net_target(batch.next_observations)
        else:
            model.critic_target(batch.next_observations, model.actor(batch.next_observations))
    return batch


@pytest.mark.parametrize("kind", [SAC, TD3, DQN])
def test_who_samples_the_buffer_outside_of_train_is_not_the_host(kind):
    plain, model = host(kind), guarded(host(kind), Constraint("cost", limit=2.0, scheduler=Fixed(0.0)))

    def look(locals_, globals_):
        owner = locals_["self"]
        if owner.num_timesteps > 40:
            expected_values(owner)
        return True

    assert same(parameters(learn(plain, 80, callback=look)), parameters(learn(model, 80, callback=look)))
    assert learner_of(model)._seams.learned == safety_critic(model).critic.updates == model._n_updates > 5


@pytest.mark.parametrize("kind", [SAC, TD3])
def test_a_batch_of_the_users_own_after_learn_leaves_the_hosts_networks_and_the_critic_alone(kind):
    model = guarded(host(kind), Constraint("cost", limit=0.1, scheduler=Fixed(5.0))).learn(60)
    updates, actions = safety_critic(model).critic.updates, torch.zeros(16, 1, device=DEVICE, requires_grad=True)
    observations = expected_values(model).observations
    plain = model.critic.q1_forward if kind is TD3 else lambda *pair: model.critic(*pair)[0]
    assert torch.equal(plain(observations, actions), plain(observations, actions.detach()))
    assert safety_critic(model).critic.updates == updates
    acted = learner_of(model)._seams.acted
    model.train(2, 16)
    assert safety_critic(model).critic.updates == updates + 2
    assert learner_of(model)._seams.acted > acted, "a train that the user calls is guarded"
