"""The control task: PPO makes MuJoCo's Hopper run, a speed limit counts every step that is too fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from guardrails import Constraint, Guard
from guardrails.schedulers import PID, Margin
from guardrails_demo.curves import Curves
from guardrails_demo.jobs import Report
from guardrails_sb3 import wrap

SPEED_LIMIT, LIMIT = 0.7402, 25.0
EPISODE, N_ENVS, TIMESTEPS, QUICK_TIMESTEPS = 200, 4, 60_000, 10_000


class SpeedLimit(gym.Wrapper[Any, Any, Any, Any]):
    """Cost 1 for every step whose forward speed exceeds ``limit`` (m/s)."""

    def __init__(self, env: gym.Env[Any, Any], limit: float) -> None:
        super().__init__(env)
        self.limit = limit

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment and add ``info["cost"]``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(info["x_velocity"] > self.limit)
        return observation, reward, terminated, truncated, info


class Recorder(BaseCallback):
    """Measures return and cost of the episodes of each rollout, the same way with and without a guard."""

    def __init__(self, curves: Curves, guard: Guard | None, total: int, report: Report) -> None:
        super().__init__()
        self.curves, self.guard, self.total, self.report = curves, guard, total, report
        self.costs = [0.0] * N_ENVS
        self.finished: list[tuple[float, float]] = []

    def _on_step(self) -> bool:
        for i, info in enumerate(self.locals["infos"]):
            self.costs[i] += info["cost"]
            if "episode" in info:
                self.finished.append((info["episode"]["r"], self.costs[i]))
                self.costs[i] = 0.0
        return True

    def _on_rollout_end(self) -> None:
        if self.finished:
            returns, costs = zip(*self.finished, strict=True)
            multiplier = self.guard.multipliers["cost"] if self.guard else 0.0
            self.curves.add(self.num_timesteps, sum(returns) / len(returns), sum(costs) / len(costs), multiplier)
            self.finished.clear()
        self.report(self.num_timesteps, self.total)


def train(*, guarded: bool, seed: int, quick: bool, ledger: Path, report: Report) -> Curves:
    """Train once and return what was measured."""
    total = QUICK_TIMESTEPS if quick else TIMESTEPS
    env = make_vec_env(
        lambda: SpeedLimit(gym.make("Hopper-v5", max_episode_steps=EPISODE), SPEED_LIMIT), N_ENVS, seed=seed
    )
    model = PPO("MlpPolicy", env, n_steps=256, batch_size=128, n_epochs=5, learning_rate=1e-3, seed=seed, device="cpu")
    guard = Guard(Constraint("cost", limit=LIMIT, scheduler=Margin(PID(), 0.1))) if guarded else None
    if guard:
        model = wrap(model, guard, ledger=ledger)
    curves = Curves("control", guarded, LIMIT)
    model.learn(total, callback=Recorder(curves, guard, total, report))
    env.close()
    return curves
