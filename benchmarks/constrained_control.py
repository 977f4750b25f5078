"""Velocity-limited MuJoCo: return and cost of guarded training against none and against fixed penalties.

    python benchmarks/constrained_control.py run [--jobs 2] [--only ppo/Hopper]   # resumable, days of CPU time
    python benchmarks/constrained_control.py report                               # table and curves

Cost 1 for each step faster than the task's threshold, limit 25 per episode of 1,000 steps, the protocol of the
velocity tasks of Safety-Gymnasium. Every arm of a task has the host's own settings below and the same seeds. The
fixed penalty is the best of three on runs of a fifth of the length: the highest return among those whose mean
cost is within the limit, else the lowest cost. A finished run is a line of results/constrained_control.jsonl and is
skipped the next time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "constrained_control.jsonl"
LIMIT, SEEDS, ENVS, POINTS = 25.0, 3, 4, 100
SPEED = {"Hopper": 0.7402, "HalfCheetah": 3.2096}
PENALTIES = (0.03, 0.1, 0.3)
SHORT = 0.2
"""Length of the runs that choose the fixed penalty, as a share of the full length."""

TASKS = {("ppo", "Hopper"): 1_000_000, ("ppo", "HalfCheetah"): 1_000_000}
"""Algorithm and environment, to environment steps."""

ARMS = ("unguarded", "fixed penalty", "pid", "augmented lagrangian")

PUBLISHED = {
    "Hopper": {"PPOLag, 1e7 steps": (962, 753, 14, 19), "CPPOPID, 1e7 steps": (1713, 10, 9.0, 4.3)},
    "HalfCheetah": {"PPOLag, 1e7 steps": (2946, 306, 3.4, 4.8), "CPPOPID, 1e7 steps": (2838, 399, 8.1, 9.6)},
}
"""OmniSafe's benchmark: return and cost, mean and standard deviation over seeds."""


def scheduler(arm):
    """Return the scheduler of an arm."""
    from guardrails.schedulers import PID, AugmentedLagrangian, Fixed, Margin

    if arm.startswith("penalty "):
        return Fixed(float(arm.split()[1]))
    return {
        "pid": Margin(PID(kp=0.1, ki=0.01, kd=0.01), 0.1),
        "augmented lagrangian": Margin(AugmentedLagrangian(0.1, learning_rate=0.01), 0.1),
    }[arm]


def environment(name, seed):
    """Return ``ENVS`` environments with ``info["cost"]``, observations and rewards normalised as they come."""
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from guardrails_demo.control import SpeedLimit

    make = lambda: SpeedLimit(gym.make(f"{name}-v5"), SPEED[name])  # noqa: E731
    return VecNormalize(make_vec_env(make, ENVS, seed=seed))


def build(algorithm, env, seed):
    """Return the host; what is not named here is its default."""
    from stable_baselines3 import PPO

    assert algorithm == "ppo"  # noqa: S101
    return PPO("MlpPolicy", env, n_steps=2048 // ENVS, batch_size=128, n_epochs=10, seed=seed, device="cpu")


def train(algorithm, name, arm, seed, steps):
    """Return the record of one run: episodes in ``POINTS`` equal parts of its steps."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from guardrails import Constraint, Guard
    from guardrails_sb3 import wrap

    class Episodes(BaseCallback):
        def __init__(self):
            super().__init__()
            self.running, self.ended, self.multipliers = np.zeros(ENVS), [], []

        def _on_step(self):
            for index, info in enumerate(self.locals["infos"]):
                self.running[index] += info["cost"]
                if "episode" in info:
                    self.ended.append((self.num_timesteps, info["episode"]["r"], self.running[index]))
                    self.running[index] = 0.0
            return True

        def _on_rollout_end(self):
            self.multipliers.append((self.num_timesteps, guard.multipliers["cost"] if guard else 0.0))

    torch.set_num_threads(1)
    begun = time.process_time()
    env = environment(name, seed)
    model = build(algorithm, env, seed)
    guard = None
    if arm != "unguarded":
        guard = Guard(Constraint("cost", limit=LIMIT, scheduler=scheduler(arm)))
        wrap(model, guard, ledger=False)
    episodes = Episodes()
    model.learn(steps, callback=episodes)
    env.close()
    ended = np.array(episodes.ended)
    part = np.minimum((ended[:, 0] - 1) * POINTS // steps, POINTS - 1).astype(int)
    multipliers = np.array(episodes.multipliers)
    rollout = np.minimum((multipliers[:, 0] - 1) * POINTS // steps, POINTS - 1).astype(int)
    curve = {
        "return": [_mean(ended[part == i, 1]) for i in range(POINTS)],
        "cost": [_mean(ended[part == i, 2]) for i in range(POINTS)],
        "multiplier": [_mean(multipliers[rollout == i, 1]) for i in range(POINTS)],
    }
    last = ended[ended[:, 0] > 0.9 * steps]
    return {
        "task": f"{algorithm}/{name}", "arm": arm, "seed": seed, "steps": steps,
        "cpu_s": round(time.process_time() - begun),
        "return": last[:, 1].mean(), "cost": last[:, 2].mean(), "cost_sd": last[:, 2].std(),
        "over": (last[:, 2] > LIMIT).mean(), "episodes": len(last), "curve": curve,
    }  # fmt: skip


def _mean(values):
    return round(float(np.mean(values)), 4) if len(values) else None


def records():
    """Return every finished run, by task, arm, seed and steps."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    found = map(json.loads, lines)
    return {(each["task"], each["arm"], each["seed"], each["steps"]): each for each in found}


def wanted(task, seeds):
    """Return the runs of a task as (arm, seed, steps); those of the best penalty once the short ones are done."""
    steps = TASKS[task]
    short = [(f"penalty {value}", seed, int(SHORT * steps)) for seed in range(seeds) for value in PENALTIES]
    best = best_penalty(task, seeds)
    arms = [arm if arm != "fixed penalty" else best for arm in ARMS]
    return [(arm, seed, steps) for seed in range(seeds) for arm in arms if arm] + short


def best_penalty(task, seeds):
    """Return the arm of the penalty that the short runs choose, or None until all are done."""
    done, steps = records(), int(SHORT * TASKS[task])
    means = {}
    for value in PENALTIES:
        runs = [done.get(("/".join(task), f"penalty {value}", seed, steps)) for seed in range(seeds)]
        if None in runs:
            return None
        means[f"penalty {value}"] = np.mean([[run["return"], run["cost"]] for run in runs], axis=0)
    within = {arm: mean for arm, mean in means.items() if mean[1] <= LIMIT}
    if within:
        return max(within, key=lambda arm: within[arm][0])
    return min(means, key=lambda arm: means[arm][1])


def run(jobs, only, seeds):
    """Train what is missing, a process each."""
    RESULTS.mkdir(exist_ok=True)
    tried = set()
    while True:
        done = set(records()) | tried
        todo = [
            ("/".join(task), *each)
            for task in TASKS
            if only in "/".join(task)
            for each in wanted(task, seeds)
            if ("/".join(task), *each) not in done
        ]
        if not todo:
            return
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_one, todo))
        tried |= set(todo)


def _one(key):
    task, arm, seed, steps = key
    command = [sys.executable, __file__, "one", task, arm, str(seed), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"FAILED {key}: {done.stderr[-500:]}", flush=True)
        return
    record = json.loads(done.stdout.splitlines()[-1])
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(task, arm, seed, steps, f"return {record['return']:.0f} cost {record['cost']:.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "one"])
    parser.add_argument("key", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a task's name, such as ppo/Hopper")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    if arguments.what == "one":
        task, arm, seed, steps = arguments.key
        print(json.dumps(train(*task.split("/"), arm, int(seed), int(steps))))
    else:
        run(arguments.jobs, arguments.only, arguments.seeds)


if __name__ == "__main__":
    main()
