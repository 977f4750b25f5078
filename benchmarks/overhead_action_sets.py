"""Environment steps per second of PPO with action sets over plain PPO, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_action_sets.py

Stable-Baselines3's defaults on MuJoCo's HalfCheetah: 2048 steps, batches of 64, 10 epochs, 64 × 64. Each round trains
every variant for one rollout and update, in an order that changes from round to round, so that a machine that slows
down slows all of them; a ratio is taken within a round. Sets that hold everything change nothing, so these variants see
the same episodes and the work of holding alone is measured; half a box changes nearly every action, on episodes of its
own, and shows what that takes besides. Time is the processor time of this process.
"""

from __future__ import annotations

import argparse
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from alternating import Row, alternate, show
from stable_baselines3 import PPO

from guardrails import Guard
from guardrails_sb3 import ActionBox, CriticShield, Projection, RateLimit, wrap

N_STEPS = 2048
VARIANTS = {
    # A box about a given centre, since the whole range about its own is not computed at all.
    "ActionBox": (lambda: [ActionBox(1.0, centre=[0.0] * 6)], 0.98),
    "RateLimit": (lambda: [RateLimit(2.0)], 0.98),
    "ActionBox and RateLimit": (lambda: [ActionBox(1.0, centre=[0.0] * 6), RateLimit(2.0)], float("nan")),
    "ActionBox of half, intervening": (lambda: [ActionBox(0.5)], float("nan")),
    "Projection": (lambda: [Projection(lambda action, observation: action)], float("nan")),
    "CriticShield, 5 ms": (
        lambda: [CriticShield(1.0, risk=lambda rows, actions: np.zeros(len(actions)), budget_ms=5.0)],
        float("nan"),
    ),
}
"""Name to sets and the least ratio promised."""


def _model(sets):
    model = PPO("MlpPolicy", gym.make("HalfCheetah-v5"), n_steps=N_STEPS, seed=0, device="cpu")
    return model if sets is None else wrap(model, Guard(*sets()))


def measure(rounds: int) -> list[Row]:
    """Return one row per variant, over ``rounds`` alternating rounds after one to warm up."""
    models = {"plain PPO": _model(None)} | {name: _model(sets) for name, (sets, _) in VARIANTS.items()}
    runs = {name: partial(model.learn, N_STEPS, reset_num_timesteps=False) for name, model in models.items()}
    return alternate(runs, N_STEPS, rounds, {name: target for name, (_, target) in VARIANTS.items()})


def main(rounds: int = 12) -> list[Row]:
    """Print the table and return its rows."""
    torch.set_num_threads(1)
    rows = measure(rounds)
    show(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    main(parser.parse_args().rounds)
