"""A shield on the safety critic: which side of a limit it keeps to, what its critic learns from, what is refused."""

import numpy as np
import pytest
import torch
from devices import DEVICE
from gymnasium import spaces
from sb3_contrib import CrossQ
from sb3_envs import Drift, Gamble, learn, parameters, same, vec
from sb3_hosts import SMALL, host, learner_of
from stable_baselines3 import DQN, SAC, TD3

from guardrails import AttachError, ConfigurationError, Constraint, Gate, Guard, Require
from guardrails.schedulers import Fixed
from guardrails_sb3 import CriticShield, SafeActions, safety_critic, wrap


def of_the_action(observations, actions, constraint=None):
    """A critic to whom the action itself is the risk, and an action of 0.9 unknown."""
    return np.where(np.isclose(actions[:, 0], 0.9), np.nan, np.asarray(actions[:, 0], np.float64))


def effort(sense="<=", name="effort"):
    return Constraint(name, limit=1.0, cost="effort", sense=sense, scheduler=Fixed(0.0))


def executed(guard, *actions):
    """Return what reaches the environment of each action."""
    env, sent = Drift(), []
    step = env.step
    env.step = lambda action: sent.append(float(action[0])) or step(action)
    held = SafeActions(env, guard, critic=of_the_action)
    held.reset()
    for action in actions:
        held.step(np.array([action], np.float32))
    return sent


@pytest.mark.parametrize(
    ("sense", "safe", "kept"),
    [("<=", -1.0, [-0.8, -0.5, -0.1, -0.05]), (">=", 1.0, [0.1, 0.25, 0.8, 0.925])],
)
def test_a_shield_keeps_to_the_side_of_the_limit_that_its_constraint_has(sense, safe, kept):
    shield = CriticShield(0.05, safe=[safe], candidates=4)
    sent = executed(Guard(effort(sense), shield), -0.8, -0.5, 0.8, 0.9)
    assert sent == pytest.approx(kept), "quarters of the way; an unknown risk is none that is allowed"


def test_of_several_constraints_the_one_that_is_asked_about_decides_the_side():
    parts = effort("<=", "most"), effort(">=", "least")
    assert executed(Guard(*parts, CriticShield(0.5, constraint="most", safe=[0.0])), 0.4, 0.75) == [
        pytest.approx(0.4),
        pytest.approx(0.75 * 5 / 8),
    ]
    assert executed(Guard(*parts, CriticShield(0.5, constraint="least", safe=[1.0])), 0.6) == [pytest.approx(0.6)]
    own = CriticShield(0.5, risk=lambda observations, actions: actions[:, 0], constraint="least", safe=[0.0])
    assert executed(Guard(*parts, own), 0.4) == [pytest.approx(0.4)], "a risk of one's own has a greatest value"


def test_a_bound_opens_towards_the_side_that_allows_more():
    gate = Gate(Require("reward_level", at_least=0.5))
    up, down = (lambda: gate.between(0.1, 0.5)), (lambda: gate.between(0.5, 0.1))
    for sense, wider, narrower in (("<=", up, down), (">=", down, up)):
        executed(Guard(effort(sense), CriticShield(wider(), safe=[0.0])), 0.0)
        with pytest.raises(AttachError, match="starts at the wider end, so competence would narrow it"):
            executed(Guard(effort(sense), CriticShield(narrower(), safe=[0.0])), 0.0)
    with pytest.raises(ConfigurationError, match="starts at the wider end"):
        CriticShield(down(), risk=of_the_action)


@pytest.mark.parametrize(
    ("shield", "match"),
    [
        (lambda: CriticShield(0.3), r"It judges a, b; none was named\. Give constraint="),
        (lambda: CriticShield(0.3, constraint="typo"), r"It judges a, b; 'typo' is none of them\. Give constraint="),
    ],
)
def test_a_shield_says_when_it_is_attached_that_it_does_not_know_whose_risk_to_ask_for(shield, match):
    model = host(SAC)
    before = sorted(vars(model))
    guard = Guard(effort(name="a"), effort(name="b"), shield())
    with pytest.raises(AttachError, match=match):
        wrap(model, guard, cost_critic=SMALL, horizon=9)
    assert sorted(vars(model)) == before
    with pytest.raises(AttachError, match=match):
        SafeActions(Drift(), guard, critic=of_the_action)


def test_the_critic_of_a_host_names_the_argument_that_is_missing():
    model = wrap(host(SAC, vec(1, kind=Drift)), Guard(effort(name="a"), effort(name="b")), cost_critic=SMALL, horizon=9)
    critic, pair = safety_critic(model), (np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32))
    for ask in (lambda **which: critic.risk(*pair, **which), critic.limit):
        with pytest.raises(ConfigurationError, match=r"judges a, b; none was named\. Give constraint="):
            ask()
        with pytest.raises(ConfigurationError, match=r"'typo' is none of them\. Give constraint="):
            ask(constraint="typo")
        ask(constraint="b")


def batches(model):
    """Return the list that every batch the critic learns from is put into."""
    seen, critic = [], safety_critic(model).critic
    update = critic.update
    critic.update = lambda batch: seen.append(batch) or update(batch)
    return seen


class Wide(Drift):
    """Drift whose actions lie in [-2, 6]."""

    action_space = spaces.Box(-2.0, 6.0, (1,), np.float32)

    def step(self, action):
        return super().step(np.asarray(action) / 4.0 - 0.5)


def shielded(kind, env, shield, **settings):
    guard = Guard(Constraint("cost", limit=3.0, scheduler=Fixed(0.0)), shield)
    return wrap(host(kind, env, **settings), guard, cost_critic=SMALL, horizon=9)


@pytest.mark.parametrize(
    ("kind", "env", "safe", "stored", "settings"),
    [
        (SAC, lambda: vec(2, kind=Drift, length=9), [0.5], 0.5, {}),
        (TD3, lambda: vec(2, kind=Wide, length=9), [4.0], 0.5, {"n_steps": 3}),
        (CrossQ, lambda: vec(2, kind=Drift, length=9), lambda observation: observation[1:] - 1.0, None, {}),
        (DQN, lambda: vec(2, kind=Gamble, length=9, observation="discrete"), 1, 1, {}),
        (DQN, lambda: vec(2, kind=Gamble, length=9, observation="dict"), 0, 0, {"policy": "MultiInputPolicy"}),
    ],
)
def test_the_critic_of_a_shield_values_what_is_executed_from_then_on(kind, env, safe, stored, settings):
    model = shielded(kind, env(), CriticShield(-1e9, safe=safe), **settings)  # nothing but the safe action passes
    seen = batches(model)
    model.learn(80)
    assert len(seen) == model._n_updates > 5
    for batch in seen:
        wanted = batch.next_observations[:, 1:] - 1.0 if stored is None else torch.full((16, 1), stored, device=DEVICE)
        torch.testing.assert_close(batch.next_actions, wanted, check_dtype=False)


def test_next_actions_that_the_shield_allows_are_those_of_the_policy_to_the_bit():
    plain, model = (shielded(SAC, vec(2, kind=Wide), CriticShield(1e9, risk=risk)) for risk in (of_the_action, None))
    others, seen = batches(plain), batches(model)
    assert same(parameters(learn(plain, 80)), parameters(learn(model, 80)))
    assert all(torch.equal(one.next_actions, other.next_actions) for one, other in zip(seen, others, strict=True))
    assert len(seen) > 10


def test_a_budget_of_time_is_for_acting_alone():
    shield = CriticShield(1e9, safe=[0.5], budget_ms=1e-3)  # none is decided in a microsecond, and all are allowed
    model = shielded(SAC, vec(1, kind=Drift), shield)
    seen = batches(model)
    model.learn(60)
    assert 0 < shield.late <= 60
    assert len(seen) == 30
    assert sum(int((batch.next_actions == 0.5).sum()) for batch in seen) == 0


@pytest.mark.parametrize(("kind", "env", "safe"), [(SAC, Wide, [4.0]), (DQN, Gamble, 1)])
def test_a_prediction_is_of_the_action_that_brings_the_cost(kind, env, safe):
    model = shielded(kind, vec(2, kind=env, length=9), CriticShield(-1e9, safe=safe))
    critic, predictions, compared = safety_critic(model), learner_of(model)._predictions, []
    predict = predictions.predict

    def watched(means, risks):
        actions = np.array([[4.0]] * 2, np.float32) if kind is SAC else np.array([1, 1])
        asked = critic.risk(model._last_obs, actions).detach().cpu().numpy()
        compared.append(np.allclose(asked, risks[:, 0], atol=1e-6))
        predict(means, risks)

    predictions.predict = watched
    model.learn(60)
    assert len(compared) > 20
    assert all(compared)
