"""Velocity-limited MuJoCo: return and cost of guarded training against none and against fixed penalties.

    python benchmarks/constrained_control.py run [--jobs 2] [--only ppo/Hopper]   # resumable, days of CPU time
    python benchmarks/constrained_control.py report                               # table and curves

Cost 1 for each step faster than the task's threshold, limit 25 per episode of 1,000 steps, the protocol of the
velocity tasks of Safety-Gymnasium. Every arm of a task has the host's own settings below and the same seeds: PPO in
four environments with observations and rewards normalised, SAC in one as it is. PPO's guarded hoppers have a limit on
falls besides; what they are without it, the arms "cost alone" show. The fixed penalty is the best of three on runs of
a fifth of the length: the highest return among those whose mean cost is within the limit, else the lowest cost. A
finished run is a line of results/constrained_control.jsonl and is skipped the next time.
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
LIMIT, SEEDS, POINTS = 25.0, 3, 100
ENVS = {"ppo": 4, "sac": 1}
SPEED = {"Hopper": 0.7402, "HalfCheetah": 3.2096}
PENALTIES = {"ppo": (0.03, 0.1, 0.3), "sac": (0.5, 1.0, 2.0)}
"""In units of reward per cost; PPO's rewards are normalised."""

SHORT = 0.2
"""Length of the runs that choose the fixed penalty, as a share of the full length."""

TASKS = {("ppo", "Hopper"): 1_000_000, ("ppo", "HalfCheetah"): 1_000_000, ("sac", "Hopper"): 100_000}
"""Algorithm and environment, to environment steps."""

ARMS = ("unguarded", "fixed penalty", "pid", "augmented lagrangian")
ALONE = ", cost alone"
"""Mark of an arm of the hopper without its limit on falls."""

ALSO = {("ppo", "Hopper"): (f"pid{ALONE}", f"augmented lagrangian{ALONE}")}
FALLS = 0.2
"""Falls per episode: one that ends early keeps a limit on an episode's cost at any speed. A cheetah cannot fall, and
SAC's hopper fell no less with it (seed 11; a falling one falls unguarded too)."""

PUBLISHED = {
    "ppo/Hopper": {
        "PPOLag, 1e7": (962, 753, 14, 19),
        "CPPOPID, 1e7": (1713, 10, 9.0, 4.3),
        "TRPOLag, 1e7": (1392, 269, 11, 10),
    },
    "ppo/HalfCheetah": {
        "PPOLag, 1e7": (2946, 306, 3.4, 4.8),
        "CPPOPID, 1e7": (2838, 399, 8.1, 9.6),
        "TRPOLag, 1e7": (2885, 77, 9.0, 12),
    },
    "sac/Hopper": {"SACLag, 1e6": (963, 292, 20, 28), "DDPGLag, 1e6": (1093, 82, 15, 21)},
}
"""OmniSafe's published benchmark with its steps: return and cost, mean and standard deviation over seeds."""


def constraints(algorithm, name, arm):
    """Return the constraints of an arm that has any."""
    from guardrails import Constraint
    from guardrails.schedulers import PID
    from guardrails_sb3 import terminated

    cost = Constraint("cost", limit=LIMIT, scheduler=scheduler(algorithm, arm.removesuffix(ALONE)))
    if (algorithm, name) not in ALSO or arm.startswith("penalty ") or arm.endswith(ALONE):
        return [cost]
    return [cost, Constraint("falls", limit=FALLS, cost=terminated, scheduler=PID(kp=1.0, ki=0.02, kd=0.0))]


def scheduler(algorithm, arm):
    """Return the scheduler that an arm has for the cost."""
    from guardrails.schedulers import PID, AugmentedLagrangian, Cap, Fixed, Margin

    if arm.startswith("penalty "):
        return Fixed(float(arm.split()[1]))
    return {
        # PPO's gains are low: where λ grows before the hopper has learned to stand, it learns to fall, which is a way
        # of being slow. Its rewards are normalised, so a λ of 0.1 is much. With SAC a step earns about 1 + its speed;
        # its hoppers fall for most of 100,000 steps, guarded or not, and their cost falls sooner where λ starts strict.
        ("ppo", "pid"): Margin(PID(kp=0.01, ki=0.001, kd=0.001), 0.2),
        ("ppo", "augmented lagrangian"): Margin(AugmentedLagrangian(0.01, learning_rate=0.001), 0.2),
        ("sac", "pid"): Margin(PID(kp=0.5, ki=0.02, kd=0.0, initial=1.0), 0.3),
        ("sac", "augmented lagrangian"): Margin(
            Cap(AugmentedLagrangian(0.5, learning_rate=0.02, initial=1.0), 10.0), 0.3
        ),
    }[algorithm, arm]


def environment(algorithm, name, seed):
    """Return the environments, with ``info["cost"]``; for PPO observations and rewards are normalised as they come."""
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from guardrails_demo.control import SpeedLimit

    make = lambda: SpeedLimit(gym.make(f"{name}-v5"), SPEED[name])  # noqa: E731
    envs = make_vec_env(make, ENVS[algorithm], seed=seed)
    return VecNormalize(envs) if algorithm == "ppo" else envs


def build(algorithm, env, seed):
    """Return the host; what is not named here is its default."""
    from stable_baselines3 import PPO, SAC

    if algorithm == "sac":
        return SAC("MlpPolicy", env, seed=seed, device="cpu")
    steps = 2048 // ENVS[algorithm]
    return PPO("MlpPolicy", env, n_steps=steps, batch_size=128, n_epochs=10, seed=seed, device="cpu")


def train(algorithm, name, arm, seed, steps):
    """Return the record of one run: episodes in ``POINTS`` equal parts of its steps."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from guardrails import Guard
    from guardrails_sb3 import wrap

    class Episodes(BaseCallback):
        def __init__(self):
            super().__init__()
            self.running, self.ended, self.multipliers = np.zeros(ENVS[algorithm]), [], []

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
    env = environment(algorithm, name, seed)
    model = build(algorithm, env, seed)
    guard = None
    if arm != "unguarded":
        guard = Guard(*constraints(algorithm, name, arm))
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
    short = [(f"penalty {value}", seed, int(SHORT * steps)) for seed in range(seeds) for value in PENALTIES[task[0]]]
    best = best_penalty(task, seeds)
    arms = [arm if arm != "fixed penalty" else best for arm in ARMS]
    runs = [(arm, seed, steps) for seed in range(seeds) for arm in arms if arm]
    return runs + short + [(arm, seed, steps) for arm in ALSO.get(task, ()) for seed in range(seeds)]


def best_penalty(task, seeds):
    """Return the arm of the penalty that the short runs choose, or None until all are done."""
    done, steps = records(), int(SHORT * TASKS[task])
    means = {}
    for value in PENALTIES[task[0]]:
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


def report():
    """Write tables and curves of what is recorded, and say what is missing."""
    done = records()
    lines = [
        "# Return within a speed limit",
        "",
        "`python benchmarks/constrained_control.py run`, then `report`. Cost 1 for each step above the speed limit, at "
        f"most {LIMIT:g} per episode; training episodes of the last tenth of each run, exploration included. "
        "Mean ± standard deviation over seeds (divisor n - 1); *within* is whether mean + sd of the cost is within "
        "the limit, *over* the share of episodes above it. PPO's guarded hoppers may fall in one episode of five "
        "besides, but for those of *cost alone*. PPO's gains and its limit on falls were chosen on runs of 400,000 "
        "steps of seeds 11 and 12, and of 0, which is one of the table's; SAC's on runs of seed 11. Published: "
        "OmniSafe's benchmark (arXiv 2305.09304 and the pages of its repository), whose runs are longer.",
    ]
    shown = {}
    for task, steps in TASKS.items():
        name, runs, missing = "/".join(task), {}, {}
        for arm in (*ARMS, *ALSO.get(task, ())):
            held = best_penalty(task, SEEDS) if arm == "fixed penalty" else arm
            label = f"fixed {held}" if arm == "fixed penalty" and held else arm
            keys = [(name, held, seed, steps) for seed in range(SEEDS)]
            runs[label] = [done[key] for key in keys if key in done]
            missing[label] = [key[2] for key in keys if key not in done]
        for value in PENALTIES[task[0]]:
            keys = [(name, f"penalty {value}", seed, int(SHORT * steps)) for seed in range(SEEDS)]
            missing[f"the short one of penalty {value}"] = [key[2] for key in keys if key not in done]
        missing = [f"{arm} (seeds {', '.join(map(str, seeds))})" for arm, seeds in missing.items() if seeds]
        lines += ["", f"## {name}, {steps:,} steps", "", *_arms(name, runs), "", *_per_seed(runs)]
        if missing:
            lines += ["", f"Not run yet: {'; '.join(missing)}."]
        if any(runs.values()):
            lines += ["", *_chosen(name, steps, done)]
            shown[f"{name}, {steps:,} steps"] = runs
    if shown:
        lines += ["", "![return, cost and multiplier over the steps](constrained_control.png)"]
    text = "\n".join([*lines, ""])
    (RESULTS / "constrained_control.md").write_text(text, encoding="utf-8")
    print(text)
    if shown:
        _curves(shown)


def _arms(name, runs):
    lines = ["| arm | seeds | return | cost | within | over |", "|---|---|---|---|---|---|"]
    for arm, of in runs.items():
        if of:
            returns, costs = ([run[key] for run in of] for key in ("return", "cost"))
            within = "–" if len(of) < 2 else "yes" if np.mean(costs) + np.std(costs, ddof=1) <= LIMIT else "no"
            over = f"{np.mean([run['over'] for run in of]):.2f}"
            cells = (len(of), _spread(returns, 0), _spread(costs, 1), within, over)
            lines.append(f"| {arm} | {' | '.join(map(str, cells))} |")
    for peer, (mean, sd, cost, cost_sd) in PUBLISHED[name].items():
        within = "yes" if cost + cost_sd <= LIMIT else "no"
        lines.append(f"| *{peer} steps, published* |  | {mean:,} ± {sd} | {cost:g} ± {cost_sd:g} | {within} |  |")
    return lines


def _spread(values, digits):
    sd = f" ± {np.std(values, ddof=1):,.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{sd}"


def _per_seed(runs):
    lines = [
        "| arm | seed | return | cost | sd over episodes | over | episodes | processor time, min |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, of in runs.items():
        for run in of:
            cells = (f"{run['return']:,.0f}", f"{run['cost']:.1f}", f"{run['cost_sd']:.1f}", f"{run['over']:.2f}")
            rest = f"{run['episodes']} | {run['cpu_s'] / 60:.0f}"
            lines.append(f"| {arm} | {run['seed']} | {' | '.join(cells)} | {rest} |")
    return lines if len(lines) > 2 else []


def _chosen(name, steps, done):
    """Return the short runs that choose the fixed penalty."""
    short = int(SHORT * steps)
    lines = [
        f"Runs of {short:,} steps that choose the fixed penalty:",
        "",
        "| penalty | seeds | return | cost |",
        "|---|---|---|---|",
    ]
    for value in PENALTIES[name.split("/")[0]]:
        of = [run for key, run in done.items() if key[0] == name and key[1] == f"penalty {value}" and key[3] == short]
        if of:
            returns, costs = ([run[key] for run in of] for key in ("return", "cost"))
            lines.append(f"| {value:g} | {len(of)} | {_spread(returns, 0)} | {_spread(costs, 1)} |")
    return lines if len(lines) > 4 else []


def _curves(shown):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(shown), 3, figsize=(13, 3.4 * len(shown)), constrained_layout=True, squeeze=False)
    for (title, runs), axes in zip(shown.items(), grid, strict=True):
        for axis, key in zip(axes, ("return", "cost", "multiplier"), strict=True):
            for arm, of in runs.items():
                if of:
                    curves = np.array(
                        [[np.nan if value is None else value for value in run["curve"][key]] for run in of]
                    )
                    at = (np.arange(POINTS) + 0.5) * of[0]["steps"] / POINTS
                    line = axis.plot(at, _over_seeds(np.nanmean, curves), label=arm)[0]
                    low, high = _over_seeds(np.nanmin, curves), _over_seeds(np.nanmax, curves)
                    axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
            axis.set(title=f"{title}: {key}", xlabel="steps")
        axes[1].axhline(LIMIT, color="black", linewidth=0.8, linestyle="--")
        axes[1].set_yscale("symlog", linthresh=LIMIT)
        axes[1].set_ylim(bottom=0.0)
        axes[0].legend(fontsize="small", loc="upper left")
    figure.savefig(RESULTS / "constrained_control.png", dpi=110)


def _over_seeds(reduce, curves):
    """Return a reduction over seeds; NaN for parts of the run in which no episode ended."""
    known = ~np.isnan(curves).all(axis=0)
    reduced = np.full(curves.shape[1], np.nan)
    reduced[known] = reduce(curves[:, known], axis=0)
    return reduced


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report", "one"])
    parser.add_argument("key", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of a task's name, such as ppo/Hopper")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    if arguments.what == "one":
        task, arm, seed, steps = arguments.key
        print(json.dumps(train(*task.split("/"), arm, int(seed), int(steps))))
    elif arguments.what == "report":
        report()
    else:
        run(arguments.jobs, arguments.only, arguments.seeds)


if __name__ == "__main__":
    main()
