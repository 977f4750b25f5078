"""Masks and shields of discrete actions on real hosts, and the shield on a host with a safety critic."""

import logging

import gymnasium as gym
import numpy as np
import pytest
import torch
from devices import DEVICE
from gymnasium import spaces
from sb3_contrib import QRDQN, MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_maskable
from sb3_envs import Drift, Gamble, callback_of, learn, parameters, same, vec
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from guardrails import AttachError, Constraint, Gate, Guard, Require, RolloutError
from guardrails.competence import RewardLevel
from guardrails.critic import Ensemble
from guardrails.schedulers import Fixed
from guardrails_sb3 import (
    ActionMask,
    CriticShield,
    Projection,
    SafeActions,
    evaluate_guarded,
    safety_critic,
    unwrap,
    wrap,
)
from guardrails_sb3.wrap import attachment_of

SETTINGS = {"n_steps": 40, "seed": 0, "device": DEVICE}
REPLAY = {"learning_starts": 20, "buffer_size": 400, "batch_size": 16, "seed": 0, "device": DEVICE}


class Doors(gym.Env):
    """Four doors; which may be taken changes with the place, is in the observation, in info, and in a method.

    An action that is not allowed is remembered as a breach.
    """

    observation_space = spaces.Box(0.0, 1.0, (5,), np.float32)
    action_space = spaces.Discrete(4)

    def __init__(self, length=8, own_masks=False):
        self.length, self.breaches, self.taken = length, 0, []
        if own_masks:
            self.action_masks = lambda: self.allowed() & np.array([True, True, True, False])

    def allowed(self):
        return np.array([True, self._step % 2 == 0, self._step % 3 == 0, self._step % 2 == 1])

    def _observation(self):
        return np.concatenate([self.allowed(), [self._step / self.length]]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._step = 0
        return self._observation(), {"action_mask": self.allowed()}

    def step(self, action):
        self.breaches += not self.allowed()[action]
        self.taken.append(int(action))
        self._step += 1
        over = self._step >= self.length
        info = {"cost": float(action), "action_mask": self.allowed()}
        return self._observation(), float(action), over, False, info


def doors(n_envs=2, vector=DummyVecEnv, **settings):
    return vector([lambda offset=offset: Doors(length=8 + 3 * offset, **settings) for offset in range(n_envs)])


def seen(observation):
    return observation[:4] > 0.5


def breaches(model):
    return sum(model.env.unwrapped.get_attr("breaches"))


def forked(makes):
    return SubprocVecEnv(makes, start_method="fork")


def build(kind, env=None):
    settings = REPLAY if kind in (DQN, QRDQN) else SETTINGS
    policy = "MlpLstmPolicy" if kind is RecurrentPPO else "MlpPolicy"
    return kind(policy, env or doors(), **settings)


@pytest.mark.parametrize("kind", [PPO, A2C, MaskablePPO, DQN, QRDQN])
@pytest.mark.parametrize("source", ["observation", "info", "method"])
def test_no_refused_action_reaches_an_environment(kind, source):
    make = {
        "observation": lambda: ActionMask(seen),
        "info": lambda: ActionMask(info="action_mask"),
        "method": lambda: ActionMask(method="allowed"),
    }
    unguarded = build(kind)
    if kind is not MaskablePPO:
        unguarded.learn(160)
        assert breaches(unguarded) > 20
    model = wrap(build(kind), Guard(make[source]()))
    model.learn(160)
    assert breaches(model) == 0
    assert len({action for env in model.env.envs for action in env.unwrapped.taken}) == 4


@pytest.mark.parametrize("kind", [PPO, MaskablePPO, DQN])
@pytest.mark.parametrize("source", [{"function": seen}, {"info": "action_mask"}], ids=["observation", "info"])
def test_a_mask_is_the_one_of_the_step_before_an_error(kind, source):
    def fail(locals_, globals_):
        if model.num_timesteps in (2 * 27, 2 * 34):
            raise KeyboardInterrupt
        return True

    model = wrap(build(kind), Guard(ActionMask(**source)))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.learn(160, callback=fail, reset_num_timesteps=False)
    model.learn(160, reset_num_timesteps=False)
    assert breaches(model) == 0


@pytest.mark.parametrize("kind", [PPO, DQN])
@pytest.mark.parametrize("anew", [True, False])
def test_a_mask_in_info_is_not_taken_from_the_reset_of_an_episode_that_was_under_way(kind, anew):
    model = build(kind).learn(2 * 40)
    before = breaches(model)
    wrap(model, Guard(ActionMask(info="action_mask")))
    if not anew:
        with pytest.raises(RolloutError, match="under way when the model was wrapped"):
            model.learn(2 * 40, reset_num_timesteps=False)
        assert breaches(model) == before
        model.set_env(model.get_env())
    model.learn(2 * 40, reset_num_timesteps=anew)
    assert breaches(model) == before


def test_a_mask_in_info_holds_where_the_environments_go_on_after_resuming(tmp_path):
    env = doors()
    wrap(build(PPO, env), Guard(ActionMask(info="action_mask"))).learn(2 * 40).save(tmp_path / "run.zip")
    loaded = PPO.load(tmp_path / "run.zip", env=env, device=DEVICE, force_reset=False)
    resumed = wrap(loaded, Guard(ActionMask(info="action_mask")), resume=tmp_path / "run.zip")
    resumed.learn(2 * 40, reset_num_timesteps=False)
    assert breaches(resumed) == 0


@pytest.mark.parametrize("vector", [DummyVecEnv, forked])
def test_maskable_ppo_gets_the_masks_as_its_own_and_joined_with_those_of_its_environment(vector):
    env, rows = doors(vector=vector), []
    model = wrap(build(MaskablePPO, env), Guard(ActionMask(seen), Constraint("interventions", limit=1.0)))
    model.learn(
        80, callback=lambda locals_, globals_: rows.append((locals_["obs_tensor"], locals_["action_masks"])) or True
    )
    for observations, masks in rows:
        assert np.array_equal(masks, observations[:, :4].cpu().numpy() > 0.5)
    assert callback_of(model).guard.decision.constraints["interventions"].cost == 0.0
    assert not {"env_method", "get_attr", "has_attr", "step_async"} & set(vars(env))
    env.close()

    env = doors(own_masks=True, vector=vector)
    model = wrap(build(MaskablePPO, env), Guard(ActionMask(seen)))
    model.learn(80)
    assert breaches(model) == 0
    assert {action for actions in env.get_attr("taken") for action in actions} == {0, 1, 2}
    env.close()
    _, lengths = evaluate_maskable(model, doors(own_masks=True), 4, return_episode_rewards=True, warn=False)
    assert len(lengths) == 4
    action, _ = model.predict(np.array([0, 1, 0, 0, 0.5], np.float32), action_masks=np.array([1, 1, 1, 1]))
    assert action == 1
    with pytest.raises(RolloutError, match="allow no action together"):
        model.predict(np.array([0, 1, 0, 0, 0.5], np.float32), action_masks=np.array([1, 0, 1, 1]))


@pytest.mark.parametrize("kind", [PPO, DQN, QRDQN])
def test_predict_takes_the_allowed_action_that_the_policy_prefers_most(kind):
    model = build(kind).learn(160)
    guard = Guard(ActionMask(seen))
    observations = np.concatenate([np.eye(4), np.full((4, 1), 0.3)], axis=1).astype(np.float32)
    wrap(model, guard)
    assert model.predict(observations, deterministic=True)[0].tolist() == [0, 1, 2, 3]
    two = np.array([[1, 1, 0, 0, 0.3], [0, 1, 1, 0, 0.3], [0, 0, 1, 1, 0.3], [1, 0, 0, 1, 0.3]], np.float32)
    tensor = torch.as_tensor(two, device=DEVICE)
    scores = {
        PPO: lambda: model.policy.get_distribution(tensor).distribution.logits,
        DQN: lambda: model.q_net(tensor),
        QRDQN: lambda: model.quantile_net(tensor).mean(dim=1),
    }[kind]()
    best = np.where(two[:, :4] > 0.5, scores.detach().cpu().numpy(), -np.inf).argmax(axis=1)
    assert model.predict(two, deterministic=True)[0].tolist() == best.tolist()
    unwrap(model)
    own = model.predict(observations, deterministic=True)[0]
    assert len(set(own.tolist())) < 4


def test_a_mask_that_allows_everything_changes_nothing():
    plain = wrap(build(PPO), Guard(Constraint("cost", limit=5.0)))
    model = wrap(build(PPO), Guard(Constraint("cost", limit=5.0), ActionMask(lambda observation: np.ones(4))))
    assert same(parameters(learn(plain, 160)), parameters(learn(model, 160)))


def test_a_mask_moves_with_its_gate():
    gate = Gate(Require(RewardLevel(reference=1e-9), at_least=0.1), rungs=1, dwell=0, confidence=0.5)

    def low_doors(observation, highest):
        return np.arange(4) <= highest

    model = wrap(build(A2C), Guard(ActionMask(low_doors, width=gate.between(1.0, 3.0), fallback=0)))
    model.learn(80)
    early = {action for env in model.env.envs for action in env.unwrapped.taken[:10]}
    assert early == {0, 1}
    model.learn(800)
    assert callback_of(model).guard.dials["action_mask_width"] == 3.0
    assert 3 in {action for env in model.env.envs for action in env.unwrapped.taken[-20:]}


def test_a_recurrent_policy_needs_a_fallback_and_takes_it():
    with pytest.raises(AttachError, match="which RecurrentPPO does not tell"):
        wrap(build(RecurrentPPO), Guard(ActionMask(seen)))
    model = wrap(build(RecurrentPPO), Guard(ActionMask(seen, fallback=0)))
    model.learn(80)
    assert breaches(model) == 0


def test_a_key_of_a_dict_observation_holds_the_mask():
    class Keyed(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = spaces.Dict({"mask": spaces.MultiBinary(4), "rest": env.observation_space})

        def observation(self, observation):
            return {"mask": self.unwrapped.allowed().astype(np.int8), "rest": observation}

    env = DummyVecEnv([lambda: Keyed(Doors())] * 1)
    model = wrap(PPO("MultiInputPolicy", env, **SETTINGS), Guard(ActionMask("mask")))
    model.learn(80)
    assert breaches(model) == 0
    with pytest.raises(RolloutError, match="key 'masks' of the observation"):
        wrap(PPO("MultiInputPolicy", env, **SETTINGS), Guard(ActionMask("masks"))).learn(80)


def test_predict_says_once_that_it_cannot_ask_the_environment_which_safe_actions_can(caplog):
    model = wrap(build(PPO), Guard(ActionMask(method="allowed")))
    only_first = np.array([1, 0, 0, 0, 0.5], np.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model.predict(only_first)
    assert len(caplog.records) == 1
    assert "'action_mask' is not enforced in what it returns" in caplog.text
    for mask in (ActionMask(method="allowed"), ActionMask(info="action_mask"), ActionMask(seen)):
        env = SafeActions(Doors(), Guard(mask), model=build(PPO))
        env.reset(seed=0)
        done = False
        while not done:
            _, _, done, _, info = env.step(3)
        assert env.unwrapped.breaches == 0
        assert info["episode_interventions"]["total"] == 4
    with pytest.raises(AttachError, match="there is no policy here"):
        SafeActions(Doors(), Guard(ActionMask(seen)))


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """A model trained under VecNormalize, and the files that it and the statistics were saved to."""
    run, statistics = (tmp_path_factory.mktemp("normalised") / name for name in ("run.zip", "statistics.pkl"))
    model = wrap(build(PPO, VecNormalize(doors())), Guard(ActionMask(seen))).learn(160)
    model.env.obs_rms.mean += [3.0, -3.0, 3.0, -3.0, 3.0]
    model.save(run)
    model.env.save(statistics)
    return model, run, statistics


def test_safe_actions_prefer_what_the_model_does_under_the_normalisation_that_it_learned_with(normalised):
    model, run, statistics = normalised
    normalizer = VecNormalize.load(statistics, doors())
    env = SafeActions(Doors(), Guard(ActionMask(seen)), resume=run, model=PPO.load(run), normalizer=normalizer)
    observation, _ = env.reset()
    for _ in range(8):
        preferred = model.predict(normalizer.normalize_obs(observation), deterministic=True)[0]
        observation, *_ = env.step(int(np.flatnonzero(~seen(observation))[0]))
        assert env.unwrapped.taken[-1] == preferred


@pytest.mark.parametrize("alone", [False, True])
def test_a_risk_perceives_the_normalisation_that_the_model_learned_with(normalised, alone):
    _, run, statistics = normalised
    normalizer, perceived = VecNormalize.load(statistics, doors()), []
    shield = CriticShield(1.0, risk=lambda observations, actions: perceived.append(observations) or [0.0], safe=0)
    model = None if alone else PPO.load(run)
    env = SafeActions(Doors(), Guard(shield), resume=run, model=model, normalizer=normalizer)
    observation, _ = env.reset()
    env.step(1)
    assert np.array_equal(perceived[-1], normalizer.normalize_obs(observation[None]))


def test_safe_actions_refuse_to_judge_what_was_normalised_without_the_statistics(normalised, tmp_path):
    _, run, statistics = normalised
    shield = CriticShield(1.0, risk=lambda observations, actions: [0.0], safe=0)
    for part, model in ((ActionMask(seen), PPO.load(run)), (shield, PPO.load(run)), (shield, None)):
        with pytest.raises(AttachError, match=r"under VecNormalize.*Give normalizer=VecNormalize\.load"):
            SafeActions(Doors(), Guard(part), resume=run, model=model)
    assert SafeActions(Doors(), Guard(ActionMask(seen, fallback=0)), resume=run)
    beside = PPO.load(run, env=VecNormalize.load(statistics, doors()))
    assert SafeActions(Doors(), Guard(ActionMask(seen)), resume=run, model=beside)
    rewards = VecNormalize(doors(), norm_obs=False)
    wrap(build(PPO, rewards), Guard(ActionMask(seen))).save(tmp_path / "run.zip")
    plain = PPO.load(tmp_path / "run.zip")
    assert SafeActions(Doors(), Guard(ActionMask(seen)), resume=tmp_path / "run.zip", model=plain)


def test_a_shield_of_discrete_actions_takes_the_safe_one():
    def risk(observations, actions):
        return actions.astype(float)

    model = wrap(build(PPO), Guard(CriticShield(1.5, risk=risk, safe=0)))
    model.learn(80)
    assert {action for env in model.env.envs for action in env.unwrapped.taken} == {0, 1}
    with pytest.raises(AttachError, match="which action of Discrete"):
        wrap(build(PPO), Guard(CriticShield(1.5, risk=risk)))


def test_a_projection_may_replace_discrete_actions():
    model = wrap(
        build(DQN), Guard(Projection(lambda action, observation: 0 if not seen(observation)[action] else action))
    )
    model.learn(80)
    assert breaches(model) == 0


@pytest.mark.parametrize("kind", [SAC, PPO])
def test_a_shield_asks_the_safety_critic_that_guards_the_model(kind):
    env = vec(2, kind=Drift, length=8)
    shield = CriticShield(0.0, budget_ms=None)
    guard = Guard(Constraint("effort", limit=3.0, scheduler=Fixed(0.0)), shield)
    settings = {**REPLAY, "train_freq": 4} if kind is SAC else {**SETTINGS, "batch_size": 40}
    model = kind("MlpPolicy", env, **settings)
    wrap(model, guard, cost_critic=Ensemble(members=2), horizon=8)
    asked = []
    critic = safety_critic(model)
    risk = critic.risk

    def heard(observations, actions, constraint=None):
        asked.append((np.asarray(observations).shape, np.asarray(actions).shape, constraint))
        return risk(observations, actions, constraint)

    acting = callback_acting(model)
    acting._critic = heard
    model.learn(80)
    assert ((2, 2), (2, 1), None) in asked
    bound = 0.5 * (risk(*pair(model)).min() + risk(*pair(model)).max()).item()
    unwrap(model)

    judged = Guard(CriticShield(bound, risk=risk))
    env = SafeActions(Drift(length=8), judged, model=model)
    observation, _ = env.reset()
    low, high = (risk(observation[None], np.array([[end]], np.float32)).item() for end in (-1.0, 1.0))
    worse = -1.0 if low > high else 1.0
    _, _, _, _, info = env.step(np.array([worse], np.float32))
    expected = max(low, high) > bound
    assert info["interventions"] == float(expected)


class Editing(Drift):
    """Edits the array that it is given as its action, once it has taken a step."""

    def step(self, action):
        outcome = super().step(action)
        action *= 5.0
        return outcome


@pytest.mark.parametrize("kind", [SAC, PPO])
@pytest.mark.parametrize("own_risk", [False, True])
def test_the_critic_that_a_shield_relies_on_learns_from_what_was_executed(kind, own_risk):
    env = vec(2, kind=Editing, length=8)
    settings = {**REPLAY, "train_freq": 4} if kind is SAC else {**SETTINGS, "batch_size": 40}
    model = kind("MlpPolicy", env, **settings)
    # A risk above any bound lets nothing but the safe action 0.5 pass.
    risk = (lambda observations, actions: np.full(len(actions), 9.0)) if own_risk else None
    guard = Guard(Constraint("effort", limit=3.0, scheduler=Fixed(0.0)), CriticShield(-1e9, risk=risk, safe=[0.5]))
    wrap(model, guard, cost_critic=Ensemble(members=2), horizon=8)
    learned_from = []
    critic = safety_critic(model).critic
    update = critic.update
    critic.update = lambda batch: (learned_from.append(batch.actions), update(batch))
    model.learn(160)
    actions = torch.cat(learned_from)
    assert (actions == 0.5).all() if not own_risk else (actions != 0.5).float().mean() > 0.9


def test_the_critic_that_a_shield_relies_on_learns_from_what_was_executed_also_after_resuming(tmp_path):
    def shielded(model, **settings):
        guard = Guard(Constraint("effort", limit=3.0), CriticShield(-1e9, safe=[0.5]))
        return wrap(model, guard, cost_critic=Ensemble(members=2), horizon=8, **settings)

    run, replay = tmp_path / "run.zip", tmp_path / "replay.pkl"
    model = shielded(SAC("MlpPolicy", vec(2, kind=Drift, length=8), **REPLAY)).learn(80)
    model.save(run)
    model.save_replay_buffer(replay)
    resumed = shielded(SAC.load(run, env=vec(2, kind=Drift, length=8), device=DEVICE), resume=run)
    resumed.load_replay_buffer(replay)
    learned_from = []
    critic = safety_critic(resumed).critic
    update = critic.update
    critic.update = lambda batch: (learned_from.append(batch.actions), update(batch))
    resumed.learn(20, reset_num_timesteps=False)
    assert (torch.cat(learned_from) == 0.5).all()


def pair(model):
    actions = np.linspace(-1.0, 1.0, 9, dtype=np.float32)[:, None]
    return np.zeros((9, 2), np.float32), actions


def callback_acting(model):
    return attachment_of(model).acting.acting


def test_a_shield_without_a_critic_is_refused():
    with pytest.raises(AttachError, match="PPO has no safety critic here"):
        wrap(PPO("MlpPolicy", vec(2, kind=Drift), **SETTINGS), Guard(Constraint("cost", limit=1.0), CriticShield(1.0)))


def test_gamble_with_a_mask_on_the_gamble_never_pays_for_one():
    model = wrap(
        PPO("MlpPolicy", vec(2), **SETTINGS), Guard(Constraint("cost", limit=5.0), ActionMask(lambda o: [1, 0]))
    )
    model.learn(80)
    assert callback_of(model).guard.decision.constraints["cost"].cost == 0.0
    assert evaluate_guarded(model, Gamble(), n_episodes=4).costs["cost"].mean == 0.0
