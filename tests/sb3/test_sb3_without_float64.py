"""Hosts on a device without float64, as Apple's MPS, and environments whose actions have it."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_envs import Drift, vec
from sb3_hosts import SMALL, host
from stable_baselines3 import PPO, SAC
from torch.overrides import TorchFunctionMode

from guardrails import Constraint, Guard
from guardrails.schedulers import Fixed
from guardrails_sb3 import ActionBox, CriticShield, wrap


class Precise(Drift):
    """Drift whose actions are float64."""

    action_space = spaces.Box(-1.0, 1.0, (1,), np.float64)


class WithoutFloat64(TorchFunctionMode):
    """Refuses what such a device refuses: a float64 tensor that is put on it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("device") is not None and result.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64: this device has none.")
        return result


PLAIN = {"n_steps": 20, "batch_size": 40, "n_epochs": 1, "seed": 0, "device": "cpu"}
SQUASHED = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
HOSTS = {
    "sac": lambda env: host(SAC, env),
    "ppo": lambda env: PPO("MlpPolicy", env, **PLAIN),
    "squashed ppo": lambda env: PPO("MlpPolicy", env, **PLAIN, **SQUASHED),
}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("part", [lambda: ActionBox(0.5), lambda: CriticShield(0.0, safe=[0.0])], ids=["box", "shield"])
def test_a_critic_judges_float64_actions_on_a_device_that_has_none(kind, part):
    model = HOSTS[kind](vec(2, kind=Precise, length=9))
    wrap(model, Guard(Constraint("cost", limit=1.0, scheduler=Fixed(0.7)), part()), cost_critic=SMALL, horizon=9)
    with WithoutFloat64():
        model.learn(80)
