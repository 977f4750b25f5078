"""A gate against what people do today, in real PPO trainings whose environment changes midway.

    python benchmarks/gate_hosts.py run [--seeds 3]      # resumable; benchmarks/results/gate_hosts.jsonl
    python benchmarks/gate_hosts.py report               # benchmarks/results/gate_hosts.md and .png

`road.Road`: distance pays and is limited, between a tight and a loose limit, by how well the policy steers. After
`CHANGE` updates steering answers differently, so that what was competent is not. All arms share seeds, network,
PPO's settings and the controller; they differ only in who moves the limit. About 40 seconds a run on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from road import Road, success
from stable_baselines3 import PPO

from guardrails import Constraint, Dial, Gate, Guard, Require
from guardrails.competence import FailureAvoidance, standing
from guardrails.schedulers import PID
from guardrails_sb3 import wrap

RESULTS = Path(__file__).parent / "results"
RECORDS = RESULTS / "gate_hosts.jsonl"
UPDATES, CHANGE, AFTER = 200, 80, 40
ENVS, STEPS, RUNGS = 32, 50, 5
TIGHT, LOOSE, AT_LEAST = 4.0, 20.0, 0.9
GAINS = (0.8, 0.0)


class Schedule(Gate):
    """Opens with time alone: evenly over the first quarter of the run."""

    def judge(self, state, evidence):
        """Return the next state and what was decided."""
        gathered, _ = self._gather(state, evidence)
        done = gathered.total_rows / (UPDATES * ENVS * STEPS / 25 / 4)
        return _at(self, gathered, min(int(done * RUNGS), RUNGS))


class MovingAverage(Gate):
    """Opens one rung when the mean of the last `window` scores is at or above the threshold, else closes one."""

    def judge(self, state, evidence):
        """Return the next state and what was decided."""
        gathered, _ = self._gather(state, evidence)
        if gathered.rung_rows < self.breaks.window:
            return _at(self, gathered, gathered.rung)
        step = 1 if gathered.breaks.recent()[1][0] >= AT_LEAST else -1
        moved = min(max(gathered.rung + step, 0), RUNGS)
        return _at(self, gathered._replace(rung_rows=0), moved)


def _at(gate, state, rung):
    verdict = "relaxed" if rung > state.rung else "tightened" if rung < state.rung else "held"
    following = state._replace(rung=rung)
    return following, standing.decision(gate, following, state, verdict, "", ("",), standing.bounds(gate, state))


def gate_of(kind, **settings):
    return kind(Require(FailureAvoidance("failed"), at_least=AT_LEAST), rungs=RUNGS, **settings)


def limit_and_dials(arm):
    """Return the limit of an arm and its dials."""
    if arm == "fixed tight":
        return TIGHT, []
    if arm == "fixed loose":
        return LOOSE, []
    if arm == "time schedule":
        return gate_of(Schedule).between(TIGHT, LOOSE), []
    if arm == "moving average":
        return gate_of(MovingAverage, window=64).between(TIGHT, LOOSE), []
    gate = gate_of(Gate, dwell=128, fall="floor")
    scale = [Dial("action_scale", gate.between(0.4, 1.0))] if arm == "gate, also of action scale" else []
    return gate.between(TIGHT, LOOSE), scale


ARMS = ("fixed tight", "fixed loose", "time schedule", "moving average", "gate", "gate, also of action scale")


def train(arm, seed):
    """Return the record of one run: a number per update, and which relaxations were false."""
    torch.set_num_threads(1)
    env = Road(ENVS, seed, GAINS[0])
    limit, dials = limit_and_dials(arm)
    scheduler = PID(kp=0.3, ki=0.02, kd=0.0)
    guard = Guard(Constraint("distance", limit=limit, scale=TIGHT, scheduler=scheduler), *dials)
    series = {"return": [], "distance": [], "failed": [], "limit": []}
    climbs = []
    step = guard.step

    def observed(rollout):
        before, acting = guard.constraints[0].limit, _Acting(model, guard)
        decision = step(rollout)
        after = guard.constraints[0].limit
        series["return"].append(float(rollout.rewards.mean()))
        series["distance"].append(float(rollout.costs["distance"].mean()))
        series["failed"].append(float(np.mean([info["failed"] for info in rollout.infos])))
        series["limit"].append(after)
        if after > before:
            # The policy in force on episodes nobody has seen: as it acted before the relaxation, and as it acts now.
            shares = [success(each, env.gain, seed=1000 + decision.step) for each in (acting, _Acting(model, guard))]
            climbs.append([decision.step, *shares])
        if decision.step == CHANGE:
            env.gain = GAINS[1]
        return decision

    guard.step = observed
    model = PPO(
        "MlpPolicy", env, n_steps=STEPS, batch_size=400, n_epochs=8, learning_rate=2e-3, gamma=0.5, ent_coef=0.005,
        policy_kwargs={"net_arch": [32, 32], "log_std_init": -0.7}, seed=seed, device="cpu",
    )  # fmt: skip
    wrap(model, guard).learn(UPDATES * ENVS * STEPS)
    return {"arm": arm, "seed": seed, **{k: np.round(v, 4).tolist() for k, v in series.items()}, "climbs": climbs}


class _Acting:
    """A model's policy as it acts in its environments."""

    def __init__(self, model, guard):
        self._policy, self._scale = model.policy, guard.dials.get("action_scale", 1.0)

    def __call__(self, observations):
        return (self._policy(observations)[0].clamp(-1.0, 1.0) * self._scale,)


def run(seeds):
    RESULTS.mkdir(exist_ok=True)
    done = {(record["arm"], record["seed"]) for record in records()}
    for seed in range(seeds):
        for arm in ARMS:
            if (arm, seed) not in done:
                record = train(arm, seed)
                with RECORDS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(arm, seed, round(float(np.mean(record["return"])), 2), len(record["climbs"]), flush=True)


def records():
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def figures(record):
    """Return what the table shows of one run."""
    rate, limit = np.array(record["failed"]), np.array(record["limit"])
    closed = np.flatnonzero(limit[CHANGE:] == TIGHT)
    moves = record["arm"] not in ("fixed tight", "fixed loose")
    episodes = ENVS * STEPS // 25
    reopened = np.flatnonzero(limit[CHANGE + closed[0] :] > TIGHT) if moves and closed.size else np.empty(0)
    return {
        "return": np.mean(record["return"]),
        "return, last 40 updates": np.mean(record["return"][-40:]),
        "failed": 100 * rate.mean(),
        "failed before": 100 * rate[:CHANGE].mean(),
        f"failed in {AFTER} updates after": 100 * rate[CHANGE : CHANGE + AFTER].mean(),
        "relaxations": len(record["climbs"]) if moves else np.nan,
        "of these false": sum(before < AT_LEAST for _, before, _ in record["climbs"]) if moves else np.nan,
        "of these too far": sum(after < AT_LEAST for _, _, after in record["climbs"]) if moves else np.nan,
        "episodes to close": (closed[0] + 1) * episodes if moves and closed.size else np.nan,
        "updates to open again": reopened[0] if reopened.size else np.nan,
    }


def report():
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = records()
    columns = list(figures(found[0]))
    seeds = len({record["seed"] for record in found})
    lines = [
        "# A gate in real trainings, against what people do today",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/gate_hosts.py run`, then `report`. Mean (smallest to largest) over the "
        "seeds; what the columns say is in [competence](../../docs/competence.md#in-real-trainings).",
        "",
        f"| {seeds} seeds | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for arm in ARMS:
        rows = [figures(record) for record in found if record["arm"] == arm]
        cells = []
        for column in columns:
            values = np.array([row[column] for row in rows], float)
            known = values[~np.isnan(values)]
            cell = f"{known.mean():.1f} ({known.min():.1f} to {known.max():.1f})" if known.size else "–"
            cells.append(cell + (f", {len(values) - len(known)} never" if 0 < len(known) < len(values) else ""))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "gate_hosts.md").write_text(text, encoding="utf-8")
    print(text)

    figure, axes = plt.subplots(
        3, len(ARMS), figsize=(3 * len(ARMS), 7), sharex=True, sharey="row", layout="constrained"
    )
    for column, arm in zip(axes.T, ARMS, strict=True):
        for record in (record for record in found if record["arm"] == arm):
            for ax, key in zip(column, ("limit", "return", "failed"), strict=True):
                ax.plot(record[key], lw=0.9, color=f"C{record['seed']}")
        for ax in column:
            ax.axvline(CHANGE, color="0.5", ls=":")
        column[0].set_title(arm)
        column[2].set_xlabel("update (64 episodes each)")
    for ax, label in zip(axes[:, 0], ("limit on distance", "return", "share of failed episodes"), strict=True):
        ax.set_ylabel(label)
    figure.savefig(RESULTS / "gate_hosts.png", dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    run(arguments.seeds) if arguments.what == "run" else report()
