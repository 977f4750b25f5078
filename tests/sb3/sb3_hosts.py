"""Off-policy hosts that are small enough to be trained in a test, and a look at what their critic is given."""

from __future__ import annotations

from devices import DEVICE
from sb3_contrib import QRDQN, TQC, CrossQ
from sb3_envs import Drift, Gamble, callback_of, vec
from stable_baselines3 import DDPG, DQN, SAC, TD3

from guardrails import Constraint, Guard
from guardrails.critic import Ensemble
from guardrails.schedulers import Fixed
from guardrails_sb3 import safety_critic, wrap

ACTORS, GREEDY = [SAC, TQC, CrossQ, TD3, DDPG], [DQN, QRDQN]
SMALL = Ensemble(members=2, hidden=(16,))


def settings_of(kind):
    extra = {"policy_kwargs": {"net_arch": [16]}}
    if kind is QRDQN:
        extra["policy_kwargs"]["n_quantiles"] = 7
    if kind is TQC:
        extra["policy_kwargs"]["n_quantiles"] = 5
    if kind in GREEDY:
        extra |= {"exploration_fraction": 0.2, "target_update_interval": 20}
    return extra


def host(kind=SAC, env=None, policy="MlpPolicy", **settings):
    env = env if env is not None else vec(2, kind=Gamble if kind in GREEDY else Drift, length=9)
    common = {"learning_starts": 30, "batch_size": 16, "seed": 0, "device": DEVICE, "buffer_size": 400}
    return kind(policy, env, **common | settings_of(kind) | settings)


def guarded(model, *constraints, horizon=9, critic=SMALL):
    constraints = constraints or (Constraint("cost", limit=2.0, scheduler=Fixed(0.7)),)
    return wrap(model, Guard(*constraints), cost_critic=critic, horizon=horizon)


def learner_of(model):
    return callback_of(model).critic


def spy(model):
    """Return the list that every batch the critic learns from is put into."""
    seen, critic = [], safety_critic(model).critic
    update = critic.update
    critic.update = lambda batch: seen.append(batch) or update(batch)
    return seen
