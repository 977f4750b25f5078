"""ALGD against SAC under the same constraint: return and cost over steps, and how much the dual variable swings.

    python benchmarks/algd.py run [--jobs 2] [--only Hopper/tight]   # resumable, a day of CPU time
    python benchmarks/algd.py report                                 # results/algd.md and the curves

MuJoCo's Hopper (3 seeds) and HalfCheetah (2), cost = speed, limits on the *discounted* cost, γ = 0.99: the published
ones, and tight ones that bind within the first thousands of steps, at which the augmented Lagrangian is held against
the plain one too. Every arm takes 50,000 steps, and after 5,000
random ones ONE gradient step for each (ALGD's own protocol takes ten), of batches of 256 at a learning rate of 3e-4,
with the same ensemble of cost critics; every multiplier moves once per 100 gradient steps, on what these critics
expect of the replayed actions. What differs is the policy, its loss and the scheduler; these are SAC's and the
schedulers' documented ones. λ of ALGD begins at ln 2, that of the others at 0.

The targets of the cost critics follow by 0.05 at every second gradient step, ten times the published 0.005: per step of
the environment that is as fast as the authors' ten gradient steps. With 0.005 the estimates have a time constant of
40,000 gradient steps, nearly the whole run; some runs with it are kept beside the others, to show what that does.

Twenty times in a run three episodes are played without noise; costs are counted from their starts. A run is a
process of one thread; a finished one is a line of results/algd.jsonl and is skipped the next time.
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

import gymnasium as gym
import numpy as np

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "algd.jsonl"
STEPS, WARMUP, GAMMA, INTERVAL, POINTS, EPISODES = 50_000, 5_000, 0.99, 100, 20, 3
TAU, SLOW = 0.05, 0.005
KEY = ("env", "budget", "arm", "seed", "steps", "tau")
SEEDS = {"Hopper": 3, "HalfCheetah": 2}
LIMITS = {
    "Hopper": {"tight": 40.0, "published": 82.748},
    "HalfCheetah": {"tight": 60.0, "published": 151.989},
}
"""Unguarded SAC has a discounted cost of 70 on Hopper after 10,000 steps, and of 60 on HalfCheetah after 15,000."""

ARMS = {
    "unguarded": "SAC",
    "algd": "ALGD, augmented",
    "algd plain": "ALGD, plain",
    "augmented lagrangian": "SAC, AugmentedLagrangian",
    "pid": "SAC, PID",
}


class SpeedCost(gym.Wrapper):
    """``info["cost"]`` is the speed in m/s; the last info of an episode has its sums, and its discounted cost."""

    def reset(self, **settings):
        self._sums, self._weight = np.zeros(4), 1.0
        return self.env.reset(**settings)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        cost = abs(float(info["x_velocity"]))
        self._sums += [float(reward), cost, self._weight * cost, 1.0]
        self._weight *= GAMMA
        info["cost"] = cost
        if terminated or truncated:
            info["sums"] = self._sums.tolist()
        return observation, reward, terminated, truncated, info


def build(name, limit, arm, seed, tau, warmup):
    """Return the model and its guard; what is not named here is a default of Stable-Baselines3 or of this project."""
    from stable_baselines3 import SAC

    from guardrails import Constraint, Guard
    from guardrails.critic import Ensemble, critic_unit
    from guardrails.schedulers import PID, AugmentedLagrangian
    from guardrails_sb3 import algd, wrap
    from guardrails_sb3.wrap import attachment_of

    env = SpeedCost(gym.make(f"{name}-v5"))
    common = {"buffer_size": STEPS, "learning_starts": warmup, "seed": seed, "device": "cpu"}
    if arm.startswith("algd"):
        rho = 1.0 if arm == "algd" else 0.0
        settings = {"gradient_steps": 1, "dual_interval": INTERVAL, "penalty_coefficient": rho, "critic_tau": tau}
        model = algd.make(env, cost_limit=limit, discounted=True, **settings, **common)
        return model, attachment_of(model).callback.guard
    model = SAC("MlpPolicy", env, **common)
    if arm == "unguarded":
        return model, None
    scheduler = PID() if arm == "pid" else AugmentedLagrangian(2.0, learning_rate=0.1)
    guard = Guard(Constraint("cost", limit=limit / critic_unit(1000, GAMMA), scheduler=scheduler))
    critics = Ensemble(
        4, math.sqrt(4 / 3), (256, 256), learning_rate=3e-4, tau=tau, target_interval=2, activation="silu"
    )
    return wrap(model, guard, cost_critic=critics, dual_interval=INTERVAL), guard


def dual(guard):
    """Return λ: what the schedulers accumulate, without the augmented one's ρ times the violation."""
    state = guard.state_dict()["constraints"]["cost"]["state"]
    return state["inner"]["multiplier"] if "inner" in state else state.get("dual", state["multiplier"])


def estimate(guard):
    """Return the discounted cost that the critics expected of the replayed actions at the last decision."""
    from guardrails.critic import critic_unit

    return guard.decision.constraints["cost"].cost * critic_unit(1000, GAMMA) if guard.decision else math.nan


def play(model, name):
    """Return return, cost, discounted cost and length of a few episodes without noise, their means."""
    env, found = SpeedCost(gym.make(f"{name}-v5")), []
    for episode in range(EPISODES):
        observation, info = env.reset(seed=1000 + episode)
        while "sums" not in info:
            observation, _, _, _, info = env.step(model.predict(observation, deterministic=True)[0])
        found.append(info["sums"])
    return np.mean(found, axis=0).round(3).tolist()


def train(name, budget, arm, seed, steps, tau):
    """Return the record of one run."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    class Course(BaseCallback):
        def __init__(self):
            super().__init__()
            self.episodes, self.played, self.duals, self.estimates = [], [], [], []

        def _on_step(self):
            for info in self.locals["infos"]:
                if "sums" in info:
                    self.episodes.append([self.num_timesteps, *np.round(info["sums"], 3).tolist()])
            if self.num_timesteps % (steps // POINTS) == 0:
                self.played.append([self.num_timesteps, *play(self.model, name)])
                if guard is not None and self.num_timesteps > warmup + INTERVAL:
                    self.estimates.append([self.num_timesteps, round(estimate(guard), 3)])
            if guard is not None and self.num_timesteps % INTERVAL == 0 and self.num_timesteps > warmup:
                self.duals.append([self.num_timesteps, dual(guard), guard.multipliers["cost"]])
            return True

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the optimizers' averages of dead units would cost time, and decide nothing
    begun, warmup = (time.process_time(), time.perf_counter()), min(WARMUP, steps // 4)
    model, guard = build(name, LIMITS[name].get(budget), arm, seed, tau, warmup)
    course = Course()
    model.learn(steps, callback=course)
    return {
        "env": name, "budget": budget, "arm": arm, "seed": seed, "steps": steps, "tau": tau,
        "cpu_s": round(time.process_time() - begun[0]), "wall_s": round(time.perf_counter() - begun[1]),
        "played": course.played, "episodes": course.episodes,
        "duals": [[step, round(lam, 5), round(strength, 5)] for step, lam, strength in course.duals],
        "estimates": course.estimates,
    }  # fmt: skip


def records():
    """Return every finished run by `KEY`."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {tuple(each[key] for key in KEY): each for each in map(json.loads, lines)}


def arms(budget):
    """Return the arms that are run under a limit, or under none."""
    if budget == "none":
        return ["unguarded"]
    return [arm for arm in ARMS if arm != "unguarded" and (budget, arm) != ("published", "algd plain")]


def wanted(steps):
    """Return all runs: those that tell most come first."""
    runs = [
        (name, budget, arm, seed, steps, None if budget == "none" else TAU)
        for budget in ("none", "tight", "published")
        for seed in range(max(SEEDS.values()))
        for name in SEEDS
        if seed < SEEDS[name]
        for arm in arms(budget)
    ]
    return runs + lagging(steps)


def lagging(steps):
    """Return the runs whose cost critics are as slow per gradient step as ALGD's authors have them."""
    hopper = [("Hopper", "tight", arm, seed, steps, SLOW) for seed in range(SEEDS["Hopper"]) for arm in arms("tight")]
    return hopper + [("HalfCheetah", "published", arm, 0, steps, SLOW) for arm in arms("published")]


def run(jobs, only, steps):
    """Train what is missing, a process each."""
    RESULTS.mkdir(exist_ok=True)
    done = records()
    todo = [key for key in wanted(steps) if key not in done and only in "/".join(map(str, key))]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_one, todo))


def _one(key):
    done = subprocess.run([sys.executable, __file__, "one", *map(str, key)], capture_output=True, text=True)
    if done.returncode:
        print(f"FAILED {key}: {done.stderr[-500:]}", flush=True)
        return
    line = done.stdout.splitlines()[-1]
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    record = json.loads(line)
    last = record["played"][-1]
    print(*key, f"return {last[1]:.0f} discounted cost {last[3]:.1f}, {record['cpu_s']} s of CPU", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "one", "report"])
    parser.add_argument("key", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="part of env/budget/arm/seed/steps/tau, such as Hopper/tight/algd")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.what == "one":
        name, budget, arm, seed, steps, tau = arguments.key
        print(json.dumps(train(name, budget, arm, int(seed), int(steps), None if tau == "None" else float(tau))))
    elif arguments.what == "report":
        import algd_report

        algd_report.write(records(), arguments.steps)
    else:
        run(arguments.jobs, arguments.only, arguments.steps)


if __name__ == "__main__":
    main()
