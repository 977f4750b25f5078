"""Environment steps per second of PPO with action sets over plain PPO, measured alternately.

    OMP_NUM_THREADS=1 python benchmarks/overhead_action_sets.py

Stable-Baselines3's defaults on MuJoCo's HalfCheetah: 2048 steps, batches of 64, 10 epochs, 64 × 64. Each round trains
every variant for one rollout and update, in an order that changes from round to round, so that a machine that slows
down slows all of them; a ratio is taken within a round. Sets that hold everything change nothing, so all variants see
the same episodes and the work of holding alone is measured; a set that intervenes costs the same. Time is the
processor time of this process.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO

from guardrails import Guard
from guardrails_sb3 import ActionBox, CriticShield, Projection, RateLimit, wrap

N_STEPS = 2048
VARIANTS = {
    # A box about a given centre, since the whole range about its own is not computed at all.
    "ActionBox": (lambda: [ActionBox(1.0, centre=[0.0] * 6)], 0.98),
    "RateLimit": (lambda: [RateLimit(2.0)], 0.98),
    "ActionBox and RateLimit": (lambda: [ActionBox(1.0, centre=[0.0] * 6), RateLimit(2.0)], float("nan")),
    "Projection": (lambda: [Projection(lambda action, observation: action)], float("nan")),
    "CriticShield, 5 ms": (
        lambda: [CriticShield(1.0, risk=lambda rows, actions: np.zeros(len(actions)), budget_ms=5.0)],
        float("nan"),
    ),
}
"""Name to sets and the least ratio promised."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        variant: what was measured.
        steps_per_second: median over the rounds.
        ratio: median over the rounds of guarded over unguarded.
        low: lower quartile of that ratio.
        high: upper quartile of it.
        target: the least ratio promised, NaN where none is.
    """

    variant: str
    steps_per_second: float
    ratio: float
    low: float
    high: float
    target: float


def _model(sets):
    model = PPO("MlpPolicy", gym.make("HalfCheetah-v5"), n_steps=N_STEPS, seed=0, device="cpu")
    return model if sets is None else wrap(model, Guard(*sets()))


def measure(rounds: int) -> list[Row]:
    """Return one row per variant, over ``rounds`` alternating rounds after one to warm up."""
    variants = ["plain PPO", *VARIANTS]
    targets = {"plain PPO": float("nan")} | {name: target for name, (_, target) in VARIANTS.items()}
    models = {variant: _model(VARIANTS[variant][0] if variant in VARIANTS else None) for variant in variants}
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            start = time.process_time()
            models[variant].learn(N_STEPS, reset_num_timesteps=False)
            if turn:
                speeds[variant].append(N_STEPS / (time.process_time() - start))
    rows = []
    for variant in variants:
        ratios = np.array(speeds[variant]) / np.array(speeds["plain PPO"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        rows.append(Row(variant, float(np.median(speeds[variant])), middle, low, high, targets[variant]))
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
