"""A safety critic beside an on-policy host learns from the actions that its environments got, in its own unit."""

import numpy as np
import pytest
from devices import DEVICE
from gymnasium import spaces
from sb3_envs import Drift, callback_of, vec
from sb3_hosts import SMALL, spy
from stable_baselines3 import A2C, PPO

from guardrails import Constraint, Dial, Gate, Guard, Require
from guardrails.competence import RewardLevel
from guardrails.schedulers import Fixed
from guardrails_sb3 import ActionBox, CriticShield, wrap

SETTINGS = {"n_steps": 40, "seed": 0, "device": DEVICE, "learning_rate": 1e-2}


class Wide(Drift):
    """Drift whose actions lie in [-2, 6], and are remembered."""

    action_space = spaces.Box(-2.0, 6.0, (1,), np.float32)

    def __init__(self, **settings):
        super().__init__(**settings)
        self.sent = []

    def step(self, action):
        self.sent.append(float(action[0]))
        return super().step(np.asarray(action) / 4.0 - 0.5)


def constraint():
    return Constraint("cost", limit=1.0, scheduler=Fixed(0.0))


def scale(floor=0.0):
    """A dial of a quarter of the range; it opens with returns about 1 if ``floor`` is far below."""
    metric = RewardLevel(reference=1e9 if floor == 0.0 else 1.0, floor=floor)
    gate = Gate(Require(metric, at_least=0.1), rungs=1, dwell=0, confidence=0.5)
    return Dial("action_scale", gate.between(0.25, 1.0))


SQUASHED = {"use_sde": True, "policy_kwargs": {"squash_output": True}}


@pytest.mark.parametrize("kind", [PPO, A2C])
@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, lambda: ()),
        (SQUASHED, lambda: ()),
        ({}, lambda: (scale(),)),
        (SQUASHED, lambda: (scale(),)),
        ({}, lambda: (scale(), ActionBox(0.5))),
        (SQUASHED, lambda: (scale(), CriticShield(-1e9, safe=[5.0]))),
    ],
    ids=["as drawn", "squashed", "scaled", "squashed and scaled", "scaled in a wider box", "shielded"],
)
def test_it_learns_from_the_actions_that_the_environments_got(kind, settings, parts):
    own = SETTINGS | settings | ({"batch_size": 80, "n_epochs": 1} if kind is PPO else {})
    model = kind("MlpPolicy", vec(2, kind=Wide, length=9, truncate=False), **own)
    wrap(model, Guard(constraint(), *parts()), cost_critic=SMALL, horizon=9)
    seen = spy(model)
    model.learn(80)
    got = {round(action / 4.0 - 0.5, 4) for env in model.env.envs for action in env.sent[:40]}
    for role in ("actions", "next_actions"):
        learned = {round(float(each), 4) for batch in seen for each in getattr(batch, role)}
        assert learned <= got
        assert len(learned) >= len(got) - 4, "all but the last of the rollout"
    assert (len(got) == 1) == any(isinstance(part, CriticShield) for part in parts())


def test_a_rollout_is_judged_and_learned_from_by_the_scale_it_was_collected_under():
    model = PPO("MlpPolicy", vec(1, kind=Wide, length=2, truncate=False), batch_size=40, n_epochs=1, **SETTINGS)
    guard = Guard(constraint(), scale(floor=-1e9))
    wrap(model, guard, cost_critic=SMALL, horizon=2)
    seen = spy(model)
    model.learn(40)
    assert guard.dials == {"action_scale": 1.0}, "decided before the critic learns"
    assert max(float(batch.actions.abs().max()) for batch in seen) <= 0.25
    model.learn(40, reset_num_timesteps=False)
    assert max(float(batch.actions.abs().max()) for batch in seen) > 0.25


def test_predictions_of_before_a_stopped_learn_are_not_held_against_the_costs_of_the_next_episode():
    """A rollout that is cut off is not shown to the critic, and an episode ends in it."""
    model = PPO("MlpPolicy", vec(1, length=9), batch_size=40, n_epochs=1, **SETTINGS)
    wrap(model, Guard(constraint()), cost_critic=SMALL, horizon=9)
    lengths, predictions = [], callback_of(model).critic._predictions
    judge = predictions._judge
    predictions._judge = lambda costs, *given: lengths.append(len(costs)) or judge(costs, *given)
    model.learn(40)  # to the fourth step of an episode
    model.learn(40, reset_num_timesteps=False, callback=lambda *_: model.num_timesteps < 47)  # the second of the next
    model.learn(40, reset_num_timesteps=False)
    assert lengths == [9] * 4 + [7] + [9] * 3
