"""Copies of what is guarded: refused where they would act through the original, free of it where they can be."""

import copy
import inspect

import numpy as np
import pytest
import torch
from devices import DEVICE
from sb3_envs import Drift, learn, parameters, same, vec
from sb3_hosts import guarded, host
from stable_baselines3 import DQN, PPO, SAC, TD3

from guardrails import AttachError, Constraint, Guard
from guardrails_sb3 import ActionBox, unwrap, wrap


@pytest.mark.parametrize("kind", [SAC, DQN])
def test_a_copy_of_a_guarded_model_is_refused_with_the_cure(kind):
    model = guarded(host(kind))
    learn(model, 60)
    with pytest.raises(AttachError, match=r"This \w+ is guarded, and a copy .* unwrap"):
        copy.deepcopy(model)
    unwrap(model)
    twin = copy.deepcopy(model)
    assert same(parameters(twin), parameters(model))


def test_a_copy_of_a_model_whose_predict_is_held_is_refused():
    model = PPO("MlpPolicy", vec(kind=Drift), n_steps=32, batch_size=32)
    wrap(model, Guard(Constraint("cost", limit=1.0), ActionBox(0.5)))
    with pytest.raises(AttachError, match="This PPO is guarded"):
        copy.deepcopy(model)


def test_a_copy_of_a_guarded_policy_has_nothing_of_the_guard():
    model = guarded(host(SAC))
    learn(model, 60)
    twin = copy.deepcopy(model.policy)
    observations = torch.zeros(1, *model.observation_space.shape, device=DEVICE)
    actions = torch.zeros(1, *model.action_space.shape, device=DEVICE, requires_grad=True)
    before = [value.clone() for value in model.policy.critic(observations, actions)]
    for value, known in zip(twin.critic(observations, actions), before, strict=True):
        assert torch.equal(value, known)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.count_nonzero(value) == 0 for value in twin.critic(observations, actions))
    for value, known in zip(model.policy.critic(observations, actions), before, strict=True):
        assert torch.equal(value, known)


@pytest.mark.parametrize("kind", [TD3, DQN])
def test_a_policy_with_a_method_of_the_guards_is_not_copied(kind):
    model = guarded(host(kind))
    with pytest.raises(AttachError, match="is guarded, and a copy"):
        copy.deepcopy(model.policy)


def test_the_overlaid_methods_have_the_hosts_signatures():
    model = guarded(host(SAC))
    assert list(inspect.signature(model.save).parameters) == ["path", "exclude", "include"]
    assert np.array_equal(model.predict(np.zeros(model.observation_space.shape))[0].shape, model.action_space.shape)
