"""Pictures: a function gets what the environment gave, wherever the model acts, and a risk what the policy gets."""

import gymnasium as gym
import numpy as np
import pytest
from devices import DEVICE
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from guardrails import AttachError, Guard
from guardrails_sb3 import ActionBox, CriticShield, SafeActions, evaluate_guarded, wrap

SHAPE = (36, 40, 3)
FIRST = (3, 36, 40)


class Gallery(gym.Env):
    """Shows a picture that no other step shows, alone or beside two numbers, and keeps what it has shown last."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, beside=False):
        picture = spaces.Box(0, 255, SHAPE, np.uint8)
        numbers = spaces.Box(-10.0, 10.0, (2,), np.float32)
        self.observation_space = spaces.Dict({"picture": picture, "numbers": numbers}) if beside else picture
        self.beside, self.shown, self.random = beside, None, np.random.default_rng(0)

    def _show(self):
        picture = self.random.integers(0, 256, SHAPE, dtype=np.uint8)
        numbers = self.random.uniform(-10.0, 10.0, 2).astype(np.float32)
        self.shown = {"picture": picture, "numbers": numbers} if self.beside else picture
        return self.shown

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._show(), {}

    def step(self, action):
        self.time += 1
        return self._show(), 0.0, False, self.time == 6, {"cost": 0.0}


def build(kind, beside, vector, function, risk):
    policy = "MultiInputPolicy" if beside else "CnnPolicy"
    small = {"cnn_output_dim": 8} if beside else {"features_dim": 8}
    own = {"n_steps": 8, "batch_size": 8, "n_epochs": 1} if kind is PPO else {"learning_starts": 4, "buffer_size": 20}
    settings = {"features_extractor_kwargs": small, "net_arch": [8]}
    model = kind(policy, vector, seed=0, device=DEVICE, policy_kwargs=settings, **own)
    return wrap(model, Guard(ActionBox(0.5, centre=function), CriticShield(1.0, risk=risk)))


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


def picture_of(observation):
    return observation["picture"] if isinstance(observation, dict) else observation


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("beside", [False, True])
def test_a_function_sees_pictures_as_the_environment_gave_them_and_a_risk_as_the_policy_does(kind, beside):
    seen, judged, acting = [], set(), None

    def centre(observation):
        seen.append(equal(observation, acting.shown))
        return np.zeros(1)

    def risk(observations, actions):
        judged.add(picture_of(observations).shape[1:])
        return np.zeros(len(actions))

    acting = Gallery(beside)
    vector = DummyVecEnv([lambda: acting])
    if beside:  # PPO puts its transposition around; SAC's replay buffer takes it only below
        below = vector if kind is PPO else VecTransposeImage(vector)
        vector = VecNormalize(below, norm_obs_keys=["numbers"])
    model = build(kind, beside, vector, centre, risk)
    model.learn(16)
    tried = len(seen)
    assert tried >= 16
    if not beside:  # where numbers are normalised, predict undoes it: equal up to rounding
        model.predict(acting.shown)
        model.predict(np.moveaxis(acting.shown, -1, 0))
        assert len(seen) == tried + 2
    acting = Gallery(beside)
    evaluate_guarded(model, acting, n_episodes=2)
    acting = Gallery(beside)
    evaluate_guarded(model, VecTransposeImage(DummyVecEnv([lambda: acting])), n_episodes=2)
    acting = Gallery(beside)
    held = SafeActions(acting, Guard(ActionBox(0.5, centre=centre), CriticShield(1.0, risk=risk)), model=model)
    held.reset()
    held.step(np.ones(1, np.float32))
    assert all(seen)
    assert judged == {FIRST}


@pytest.mark.parametrize("outside", [False, True])
def test_stacked_frames_stay_stacked_with_their_channels_last(outside):
    seen = set()

    def centre(observation):
        seen.add(observation.shape)
        return np.zeros(1)

    def stacked():
        vector = DummyVecEnv([Gallery])
        return VecFrameStack(VecTransposeImage(vector), 2) if outside else VecFrameStack(vector, 2)

    model = build(PPO, False, stacked(), centre, lambda observations, actions: np.zeros(len(actions)))
    model.learn(8)
    model.predict(model.get_env().reset())
    evaluate_guarded(model, stacked(), n_episodes=2)
    assert seen == {(36, 40, 6)}


def test_a_stack_around_normalised_observations_is_refused():
    vector = VecFrameStack(VecNormalize(DummyVecEnv([Gallery]), norm_obs=False), 2)
    with pytest.raises(AttachError, match="Put that wrapper below VecNormalize"):
        build(PPO, False, vector, lambda observation: np.zeros(1), lambda observations, actions: np.zeros(len(actions)))
