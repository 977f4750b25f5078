"""A short training that breaks its limit unguarded and holds it guarded, and the example script."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from devices import DEVICE
from sb3_envs import vec
from stable_baselines3 import A2C, PPO

from guardrails import Constraint, Guard
from guardrails.schedulers import Fixed
from guardrails_sb3 import wrap

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 6.0
"""Of about 20 steps; a policy that gambles 30% of the time keeps it, and λ* = 0.7."""


def mean_of_last_half(algorithm, constraint, steps, **settings):
    """Return mean cost per episode and mean multiplier over the second half of a run."""
    guard = Guard(constraint)
    rows, step = [], guard.step

    def record(rollout):
        decision = step(rollout)
        rows.extend((cost, decision.multipliers["cost"]) for cost in rollout.costs["cost"])
        return decision

    guard.step = record
    model = algorithm("MlpPolicy", vec(8), seed=0, device=DEVICE, gamma=0.9, **settings)
    wrap(model, guard).learn(steps)
    return np.mean(rows[len(rows) // 2 :], axis=0)


@pytest.mark.parametrize(
    ("algorithm", "steps", "settings"),
    [
        (PPO, 24_000, {"n_steps": 64, "batch_size": 256, "n_epochs": 5, "learning_rate": 2e-3}),
        (A2C, 20_000, {"n_steps": 16}),
    ],
)
def test_unguarded_training_breaks_the_limit_and_guarded_training_holds_it(algorithm, steps, settings):
    unguarded, _ = mean_of_last_half(
        algorithm, Constraint("cost", limit=LIMIT, scheduler=Fixed(0.0)), steps, **settings
    )
    guarded, multiplier = mean_of_last_half(algorithm, Constraint("cost", limit=LIMIT), steps, **settings)
    assert unguarded > 4 * LIMIT
    assert guarded < LIMIT * 1.25  # so short a run still swings about the limit; measured 1.06 and 1.10
    assert guarded > LIMIT * 0.4  # the limit is used, the policy has not just been frozen
    assert 0.4 < multiplier < 1.2  # λ* = 0.7


def test_a_lower_limit_makes_the_policy_give_more():
    settings = {"n_steps": 64, "batch_size": 256, "n_epochs": 5, "learning_rate": 2e-3}
    caution = {"cost": lambda info: 1.0 - info["cost"], "sense": ">="}
    free, _ = mean_of_last_half(
        PPO, Constraint("cost", limit=15.0, scheduler=Fixed(0.0), **caution), 16_000, **settings
    )
    guarded, _ = mean_of_last_half(PPO, Constraint("cost", limit=15.0, **caution), 16_000, **settings)
    assert free < 5.0
    assert guarded > 12.0


def test_the_example_runs_and_saves_a_model_that_resumes(tmp_path):
    path = tmp_path / "hopper.zip"
    command = [sys.executable, str(ROOT / "examples" / "sb3_ppo.py"), "--timesteps", "2048", "--save", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"guardrails/ +\|", result.stdout)
    assert re.search(r"cost/multiplier +\| \S+", result.stdout)
    assert "mean cost" in result.stdout.splitlines()[-1]
    assert path.exists()
