"""A shield on the safety critic: which side of a limit it keeps to, what its critic learns from, what is refused."""

import numpy as np
import pytest
from sb3_envs import Drift, vec
from sb3_hosts import SMALL, host
from stable_baselines3 import SAC

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
