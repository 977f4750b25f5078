"""An action set that opens: HalfCheetah from 30% of its action range, widened as competence is earned.

    python benchmarks/action_sets.py run [--jobs 2] [--seeds 3]     # resumable; results/action_sets.jsonl
    python benchmarks/action_sets.py report                         # results/action_sets.md and .png

A step is unsafe while the cheetah lies on its back (its trunk is turned by more than 90°); an episode is a violation
if that is so on more than 25 of its 1,000 steps. Nothing in the reward speaks of it, and in two arms no multiplier acts
either: with all of its range a beginner throws itself over, and PPO then learns to slide on its back. The opening box
begins at 30% of the range and climbs four rungs to all of it, one whenever at least 80% of the episodes are shown, with
confidence, to be none. All arms have PPO's settings and seeds in common. A finished run is a line of the records and is
skipped the next time.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "action_sets.jsonl"
STEPS, ENVS, POINTS, ALLOWED = 300_000, 4, 30, 25
ARMS = ("full range", "constraint, full range", "30% throughout", "opening")


def environment(seed):
    """Return ``ENVS`` environments that count in ``info["cost"]`` the steps on the back; observations normalised."""
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class OnItsBack(gym.Wrapper):
        def reset(self, **kwargs):
            self.unsafe = 0
            return self.env.reset(**kwargs)

        def step(self, action):
            observation, reward, terminated, truncated, info = self.env.step(action)
            info["cost"] = float(math.cos(observation[1]) < 0.0)  # the trunk's angle
            self.unsafe += info["cost"]
            info["unsafe_steps"] = self.unsafe
            return observation, reward, terminated, truncated, info

    return VecNormalize(make_vec_env(lambda: OnItsBack(gym.make("HalfCheetah-v5")), ENVS, seed=seed))


def guard_of(arm):
    """Return the guard of an arm, or None."""
    from guardrails import Constraint, Gate, Guard, Require
    from guardrails.competence import FailureAvoidance
    from guardrails_sb3 import ActionBox

    if arm == "constraint, full range":
        return Guard(Constraint("cost", limit=float(ALLOWED)))
    if arm == "30% throughout":
        return Guard(ActionBox(0.3))
    if arm == "opening":
        upright = FailureAvoidance(lambda info: info["unsafe_steps"] > ALLOWED)
        gate = Gate(Require(upright, at_least=0.8), rungs=4, dwell=16, confidence=0.9)
        return Guard(ActionBox(gate.between(0.3, 1.0)))
    return None


def train(arm, seed, steps):
    """Return the record of one run: episodes in ``POINTS`` equal parts of its steps, and an evaluation at its end."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    from guardrails import Constraint, Guard
    from guardrails_sb3 import evaluate_guarded, wrap

    class Episodes(BaseCallback):
        def __init__(self):
            super().__init__()
            self.ended, self.widths = [], []

        def _on_step(self):
            for info in self.locals["infos"]:
                if "episode" in info:
                    changed = info.get("episode_interventions", {"total": 0})["total"]
                    self.ended.append((self.num_timesteps, info["episode"]["r"], info["unsafe_steps"], changed))
            return True

        def _on_rollout_end(self):
            width = 1.0 if guard is None else guard.dials.get("action_box_scale", 0.3 if guard.action_sets else 1.0)
            self.widths.append((self.num_timesteps, width))

    torch.set_num_threads(1)
    begun = time.process_time()
    env = environment(seed)
    model = PPO("MlpPolicy", env, n_steps=512, batch_size=128, n_epochs=10, seed=seed, device="cpu")
    guard = guard_of(arm)
    if guard is not None:
        wrap(model, guard, ledger=False)
    episodes = Episodes()
    model.learn(steps, callback=episodes)
    ended = np.array(episodes.ended)
    part = np.minimum((ended[:, 0] - 1) * POINTS // steps, POINTS - 1).astype(int)
    judged = None if guard is not None else Guard(Constraint("cost", limit=float(ALLOWED)))
    final = evaluate_guarded(model, env, judged, n_episodes=8, seed=1000 + seed)
    env.close()
    last = ended[ended[:, 0] > 0.9 * steps]
    at, widths = np.array(episodes.widths).T
    return {
        "arm": arm, "seed": seed, "steps": steps, "cpu_s": round(time.process_time() - begun),
        "violations": int((ended[:, 2] > ALLOWED).sum()), "episodes": len(ended),
        "unsafe_steps": int(ended[:, 2].sum()), "return": last[:, 1].mean(),
        "violation_rate": (last[:, 2] > ALLOWED).mean(), "evaluated": final.reward.mean,
        "curve": {
            "return": [_mean(ended[part == i, 1]) for i in range(POINTS)],
            "violations": [_mean(ended[part == i, 2] > ALLOWED) for i in range(POINTS)],
            "interventions": [_mean(ended[part == i, 3]) for i in range(POINTS)],
            "width": [_mean(widths[(at - 1) * POINTS // steps == i]) for i in range(POINTS)],
        },
    }  # fmt: skip


def _mean(values):
    return round(float(np.mean(values)), 4) if len(values) else None


def records():
    """Return every finished run by arm, seed and steps."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {(each["arm"], each["seed"], each["steps"]): each for each in map(json.loads, lines)}


def run(seeds, jobs, steps):
    """Do the runs that are not recorded yet, each in a process of its own."""
    wanted = [(arm, seed, steps) for seed in range(seeds) for arm in ARMS]
    todo = [each for each in wanted if each not in records()]

    def one(task):
        done = subprocess.run(
            [sys.executable, __file__, "one", json.dumps(task)], capture_output=True, text=True, check=True
        )
        line = done.stdout.splitlines()[-1]
        with RECORDS.open("a") as file:
            file.write(line + "\n")
        record = json.loads(line)
        print({key: value for key, value in record.items() if key != "curve"}, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))


def report():
    """Write the table and the picture of what is recorded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = records()
    steps = max(key[2] for key in found)
    arms = [arm for arm in ARMS if any(key[0] == arm and key[2] == steps for key in found)]
    of = {arm: [found[key] for key in sorted(found) if key[0] == arm and key[2] == steps] for arm in arms}
    lines = [
        f"HalfCheetah, PPO, {steps:,} steps, {len(of[arms[0]])} seeds. A violation is an episode with more than "
        f"{ALLOWED} steps on the back. Return and violation rate: the last tenth of the training; evaluated: 8 "
        "episodes of the most likely action. Mean over seeds (least to greatest).",
        "",
        "| arm | violations in training | of episodes | unsafe steps | return | violation rate | evaluated return |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, runs in of.items():
        cells = [_spread(runs, key) for key in ("violations", "episodes", "unsafe_steps", "return")]
        cells += [_spread(runs, "violation_rate", 2), _spread(runs, "evaluated")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "`python benchmarks/action_sets.py run && python benchmarks/action_sets.py report`", ""]
    lines += ["![violations, return and width over the steps, mean and range of the seeds](action_sets.png)", ""]
    (RESULTS / "action_sets.md").write_text("\n".join(lines))
    print("\n".join(lines))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    at = (np.arange(POINTS) + 0.5) * steps / POINTS
    for axis, key, title in zip(
        axes,
        ("violations", "return", "width"),
        ("share of episodes in violation", "return", "share of the action range"),
        strict=True,
    ):
        for arm, runs in of.items():
            curves = np.array([[np.nan if value is None else value for value in each["curve"][key]] for each in runs])
            axis.plot(at, np.nanmean(curves, axis=0), label=arm)
            axis.fill_between(at, np.nanmin(curves, axis=0), np.nanmax(curves, axis=0), alpha=0.15)
        axis.set(title=title, xlabel="steps")
    axes[0].legend()
    figure.savefig(RESULTS / "action_sets.png", dpi=130)


def _spread(runs, key, digits=0):
    values = [each[key] for each in runs]
    return f"{np.mean(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report", "one"])
    parser.add_argument("task", nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(train(*json.loads(args.task))))
    elif args.command == "run":
        run(args.seeds, args.jobs, args.steps)
    else:
        report()
