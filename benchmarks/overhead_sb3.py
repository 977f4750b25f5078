"""Environment steps per second of PPO, guarded over unguarded, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_sb3.py

Stable-Baselines3's defaults on MuJoCo's Hopper: 2048 steps, batches of 64, 10 epochs, 64 × 64. Each round
trains every variant for one rollout and update, in an order that changes from round to round, so that a
machine that slows down slows all of them; a ratio is taken within a round.

The multiplier is held at 0, where a guarded run does all of its work and trains bit for bit as an unguarded
one: all variants see the same episodes. Time is the processor time of this single-threaded process, which
other processes of the machine do not enter.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO

from guardrails import Constraint, Guard
from guardrails.schedulers import Fixed
from guardrails_sb3 import wrap

N_STEPS = 2048
TARGETS = {"without cost critic": 0.97, "with cost critic": 0.85}


class SpeedCost(gym.Wrapper):
    """Report a cost of 1 in info["cost"] for every step faster than 0.7402 metres per second."""

    def step(self, action):
        """Step the environment and add the cost."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(info["x_velocity"] > 0.7402)
        return observation, reward, terminated, truncated, info


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        variant: what was measured.
        steps_per_second: median over the rounds.
        ratio: median over the rounds of guarded over unguarded.
        low: lower quartile of that ratio.
        high: upper quartile of it.
        target: the least ratio promised, NaN for the baseline.
    """

    variant: str
    steps_per_second: float
    ratio: float
    low: float
    high: float
    target: float


def _model(variant: str) -> PPO:
    model = PPO("MlpPolicy", SpeedCost(gym.make("Hopper-v5")), n_steps=N_STEPS, seed=0, device="cpu")
    if variant != "unguarded":
        wrap(
            model,
            Guard(Constraint("cost", limit=25.0, scheduler=Fixed(0.0))),
            cost_critic=variant == "with cost critic",
        )
    return model


def measure(rounds: int) -> list[Row]:
    """Return one row per variant, over ``rounds`` alternating rounds after one to warm up."""
    variants = ["unguarded", *TARGETS]
    models = {variant: _model(variant) for variant in variants}
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant in variants[turn % 3 :] + variants[: turn % 3]:
            start = time.process_time()
            models[variant].learn(N_STEPS, reset_num_timesteps=False)
            if turn:
                speeds[variant].append(N_STEPS / (time.process_time() - start))
    rows = []
    for variant in variants:
        ratios = np.array(speeds[variant]) / np.array(speeds["unguarded"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        target = TARGETS.get(variant, float("nan"))
        rows.append(Row(f"SB3 PPO {variant}", float(np.median(speeds[variant])), middle, low, high, target))
    return rows


def main(rounds: int = 12) -> list[Row]:
    """Print the table and return its rows."""
    torch.set_num_threads(1)
    rows = measure(rounds)
    print(f"{'':32}{'steps/s':>9}{'ratio':>8}{'quartiles':>16}{'target':>9}")
    for row in rows:
        target = "" if np.isnan(row.target) else f">= {row.target:.2f}"
        spread = f"{row.low:.3f} to {row.high:.3f}"
        print(f"{row.variant:32}{row.steps_per_second:9.0f}{row.ratio:8.3f}{spread:>16}{target:>9}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    main(parser.parse_args().rounds)
