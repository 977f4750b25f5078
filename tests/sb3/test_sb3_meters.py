"""CostMeters: bars on rendered frames say what the running episode has cost."""

import gymnasium as gym
import numpy as np
import pytest
from sb3_envs import Drift
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from guardrails import AttachError, Constraint, Guard
from guardrails_sb3 import ActionBox, CostMeters, SafeActions, terminated
from guardrails_sb3.meters import BACKGROUND, BEYOND, CHANGED, LIMIT, WITHIN

HEIGHT, WIDTH = 80, 120


class Seen(Drift):
    """Costs 1 a step; its frames are grey."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    render_mode = "rgb_array"

    def step(self, action):
        return *super().step(action)[:4], {"cost": 1.0, "gain": 2.0}

    def render(self):
        return np.full((HEIGHT, WIDTH, 3), 128, np.uint8)


def bars(frame, n):
    """Return the colours along the middle of each bar, from the lowest up."""
    return [frame[HEIGHT - 2 - 4 * index] for index in range(n)]


def width_of(bar, colour):
    return int((bar == colour).all(axis=1).sum())


def test_a_bar_grows_with_the_cost_of_its_episode_and_turns_beyond_the_limit():
    guard = Guard(Constraint("cost", limit=4.0), Constraint("gain", limit=6.0, sense=">=", scale=2.0))
    env = CostMeters(Seen(), guard)
    env.reset()
    for step in range(1, 8):
        env.step(np.zeros(1))
        frame = env.render()
        cost, gain = bars(frame, 2)
        covered = 2 if step >= 4 else 0  # the limit's mark lies on the bar
        assert width_of(cost, WITHIN if step <= 4 else BEYOND) == pytest.approx(step / 8 * WIDTH - covered, abs=1)
        assert (cost[WIDTH // 2] == LIMIT).all()
        assert width_of(gain, BEYOND if step < 3 else WITHIN) == pytest.approx(min(step / 4, 1) * WIDTH, abs=2)
        assert (gain[WIDTH * 3 // 4] == LIMIT).all()
        assert (frame[: HEIGHT - 8] == 128).all()
    env.reset()
    assert width_of(bars(env.render(), 1)[0], BACKGROUND) == WIDTH - 2


def test_a_changed_action_gives_its_frame_a_border():
    guard = Guard(Constraint("cost", limit=4.0), ActionBox(0.5))
    env = CostMeters(SafeActions(Seen(), guard), guard)
    env.reset()
    for action, changed in ((1.0, True), (0.2, False), (-0.9, True)):
        env.step(np.array([action], np.float32))
        frame = env.render()
        assert (frame[0] == CHANGED).all() == changed
        assert (frame[10, 0] == CHANGED).all() == changed
        assert (frame[10, 10] == 128).all()


def test_a_cost_that_cannot_be_measured_fills_its_bar():
    guard = Guard(Constraint("cost", limit=4.0, cost=lambda info: float("nan")))
    env = CostMeters(Seen(), guard)
    env.reset()
    env.step(np.zeros(1))
    assert width_of(bars(env.render(), 1)[0], BEYOND) == WIDTH - 2


def test_the_frames_of_a_vector_have_them_while_a_model_trains():
    guard = Guard(Constraint("cost", limit=50.0))
    env = DummyVecEnv([lambda: CostMeters(Seen(), guard)])
    PPO("MlpPolicy", env, n_steps=10, batch_size=10, n_epochs=1, seed=0).learn(10)
    assert width_of(env.render()[HEIGHT - 2], WITHIN) == 10 / 100 * WIDTH


@pytest.mark.parametrize("truncate", [False, True])
def test_costs_read_the_info_as_in_training(truncate):
    seen = []

    def ended(info):
        seen.append(info)
        return float("terminal_observation" in info)

    guard = Guard(Constraint("falls", limit=1.0, cost=terminated), Constraint("ends", limit=1.0, cost=ended))
    env = CostMeters(SafeActions(Seen(length=3, truncate=truncate), Guard(ActionBox(0.5))), guard)
    env.reset()
    steps = [env.step(np.ones(1, np.float32)) for _ in range(3)]
    assert width_of(bars(env.render(), 2)[0], WITHIN) == (0.0 if truncate else WIDTH // 2 - 1)
    assert width_of(bars(env.render(), 2)[1], WITHIN) == WIDTH // 2 - 1
    assert [info["TimeLimit.truncated"] for info in seen] == [False, False, truncate]
    assert np.array_equal(seen[2]["terminal_observation"], steps[2][0])
    assert not {"TimeLimit.truncated", "terminal_observation"} & {key for step in steps for key in step[4]}


def test_an_environment_without_frames_is_refused():
    with pytest.raises(AttachError, match="render_mode is None"):
        CostMeters(gym.make("Pendulum-v1"), Guard(Constraint("cost", limit=1.0)))
