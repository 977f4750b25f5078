"""Steps per second of guarded Stable-Baselines3 algorithms over unguarded ones, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_sb3.py [--only PPO]

Stable-Baselines3's defaults on MuJoCo's Hopper. PPO: 2048 steps, batches of 64, 10 epochs, 64 × 64; SAC: one
gradient step per environment step, batches of 256, 256 × 256. Each round trains every variant in turn, in an order
that changes from round to round, so that a machine that slows down slows all of them; a ratio is taken within a
round.

PPO's multiplier is held at 0, where a guarded run does all of its work and trains bit for bit as an unguarded one:
all variants see the same episodes. SAC's is held at 1, since at 0 it would be spared the penalty on its actor; its
work per step does not depend on what the episodes hold. Time is the processor time of this single-threaded process,
which other processes of the machine do not enter.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from functools import partial

import gymnasium as gym
import torch
from alternating import Row, alternate, show
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from guardrails import Constraint, Guard
from guardrails.critic import Ensemble
from guardrails.schedulers import Fixed
from guardrails_sb3 import wrap

STEPS = {PPO: 2048, SAC: 250}
"""Environment steps of a variant in one round."""

WARM_UP = {PPO: 0, SAC: 300}
"""Environment steps before the first round: SAC's 100 random ones and some that train."""

VARIANTS: dict[type[BaseAlgorithm], dict[str, tuple[bool | Ensemble, float]]] = {
    PPO: {"without cost critic": (False, 0.97), "with cost critic": (True, 0.85)},
    SAC: {
        "with a cost critic of 256 × 256": (Ensemble(members=1, kappa=0.0, hidden=(256, 256)), 0.75),
        "with 4 of 128 × 128, the default": (Ensemble(), 0.55),
        "with 4 of 256 × 256": (Ensemble(hidden=(256, 256)), float("nan")),
    },
}
"""Variants with their critic and the least ratio promised."""


class SpeedCost(gym.Wrapper):
    """Report a cost of 1 in info["cost"] for every step faster than 0.7402 metres per second."""

    def step(self, action):
        """Step the environment and add the cost."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(info["x_velocity"] > 0.7402)
        return observation, reward, terminated, truncated, info


def _model(kind: type[BaseAlgorithm], critic: bool | Ensemble | None) -> BaseAlgorithm:
    env = SpeedCost(gym.make("Hopper-v5"))
    if kind is PPO:
        model: BaseAlgorithm = PPO("MlpPolicy", env, n_steps=STEPS[PPO], seed=0, device="cpu")
    else:
        model = SAC("MlpPolicy", env, buffer_size=20_000, seed=0, device="cpu")
    if critic is not None:
        multiplier = 0.0 if kind is PPO else 1.0
        wrap(model, Guard(Constraint("cost", limit=25.0, scheduler=Fixed(multiplier))), cost_critic=critic)
    return model


def measure(kind: type[BaseAlgorithm], rounds: int) -> list[Row]:
    """Return one row per variant, over ``rounds`` alternating rounds after one to warm up."""
    critics = {"unguarded": None} | {name: critic for name, (critic, _) in VARIANTS[kind].items()}
    models = {name: _model(kind, critic) for name, critic in critics.items()}
    if WARM_UP[kind]:
        for model in models.values():
            model.learn(WARM_UP[kind])
    name = f"SB3 {kind.__name__}"
    runs = {
        f"{name} {variant}": partial(model.learn, STEPS[kind], reset_num_timesteps=False)
        for variant, model in models.items()
    }
    targets = {f"{name} {variant}": target for variant, (_, target) in VARIANTS[kind].items()}
    return alternate(runs, STEPS[kind], rounds, targets)


def main(rounds: int = 12, only: Collection[str] = ("PPO", "SAC")) -> list[Row]:
    """Print the table and return its rows."""
    torch.set_num_threads(1)
    rows = [row for kind in VARIANTS if kind.__name__ in only for row in measure(kind, rounds)]
    show(rows)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=("PPO", "SAC"), nargs="+", default=("PPO", "SAC"))
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.only)
