"""Schedulers side by side: a disturbed plant, a constrained control task, and the time an update takes.

    python benchmarks/schedulers.py

takes about a minute on one core. It writes benchmarks/results/schedulers.json, the pictures in
docs/img/, and the tables between the markers in docs/schedulers.md.
"""

from __future__ import annotations

import json
import platform
import re
import timeit
from pathlib import Path

import matplotlib as mpl
import numpy as np
from cmdp import LIMIT, Learner, optimum
from PIL import Image
from plant import DISTURBANCES, plant

from guardrails.schedulers import (
    BUILTIN,
    CRPO,
    PID,
    AdamAscent,
    AdaptiveKL,
    Anneal,
    AugmentedLagrangian,
    Cap,
    ConstraintScheduler,
    DualAscent,
    Fixed,
    LogDual,
    Margin,
    NuPI,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
UPDATES, SEEDS, LAST = 200, 10, 50

SCHEDULERS: dict[str, ConstraintScheduler] = {
    "PID()": PID(),
    "PID(kd=1.0, smoothing_p=0.0)": PID(kd=1.0, smoothing_p=0.0),
    "Margin(PID(), 0.1)": Margin(PID(), 0.1),
    "NuPI()": NuPI(),
    "AugmentedLagrangian(2.0, learning_rate=0.1)": AugmentedLagrangian(2.0, learning_rate=0.1),
    "AugmentedLagrangian()": AugmentedLagrangian(),
    "DualAscent()": DualAscent(),
    "Cap(DualAscent(), 3.0)": Cap(DualAscent(), 3.0),
    "AdamAscent()": AdamAscent(),
    "LogDual()": LogDual(),
    "AdaptiveKL(1.0, batch_size=2500)": AdaptiveKL(1.0, batch_size=2500),
    "CRPO()": CRPO(),
    "Anneal(0.0, 4.0)": Anneal(0.0, 4.0),
    "Fixed(2.0)": Fixed(2.0),
}


def draw_plant(path: Path) -> None:
    figure, axes = plt.subplots(len(SCHEDULERS), 4, figsize=(11, 1.35 * len(SCHEDULERS)), sharex=True, sharey=True)
    for row, (name, scheduler) in zip(axes, SCHEDULERS.items(), strict=True):
        for axis, disturbance in zip(row, DISTURBANCES, strict=True):
            costs, multipliers = plant(scheduler, disturbance)
            axis.axhline(1.0, color="0.6", linewidth=0.8)
            axis.plot(costs, color="C3", linewidth=1.4, label="J / limit")
            axis.plot(np.minimum(multipliers, 10.0), color="C0", linewidth=1.0, label="λ")
            axis.set_ylim(0.0, 6.2)
            axis.tick_params(labelsize=7)
        label = name if len(name) < 17 else name.replace("(", "\n(", 1).replace(", ", ",\n")
        row[0].annotate(label, (-0.16, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=7.5)
    for axis, (disturbance, words) in zip(axes[0], DISTURBANCES.items(), strict=True):
        axis.set_title(f"{disturbance}: {words}", fontsize=9)
    axes[0][3].legend(fontsize=7, loc="upper right", frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("update", fontsize=8)
    figure.tight_layout(h_pad=0.2, w_pad=0.4)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a picture of 32 colours, which is a fifth of the size."""
    figure.savefig(path, dpi=80)
    plt.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(32, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def plant_table() -> list[dict[str, object]]:
    """Return the mean excess of J over its limit from update 40 on, in percent, per disturbance."""
    rows = []
    for name, scheduler in SCHEDULERS.items():
        row: dict[str, object] = {"scheduler": name}
        for disturbance in DISTURBANCES:
            costs, _ = plant(scheduler, disturbance)
            row[disturbance] = round(float(100.0 * np.maximum(costs[40:] - 1.0, 0.0).mean()), 1)
        rows.append(row)
    return rows


# --- the control task ---


def control(scheduler: ConstraintScheduler, cutoff: float = np.inf) -> dict[str, np.ndarray]:
    """Train `SEEDS` policies, one scheduler each, and return exact return and cost, (updates, seeds)."""
    learner = Learner(SEEDS, cutoff=cutoff)
    states, multipliers = scheduler.init_many(SEEDS), np.full(SEEDS, scheduler.strength(scheduler.init()))
    returns, costs, applied = [], [], []
    for _ in range(UPDATES):
        measured = learner.rollout()
        states, multipliers = scheduler.update_many(states, measured / LIMIT - 1.0)
        learner.learn(multipliers)
        value, cost = learner.evaluate()
        returns.append(value)
        costs.append(cost)
        applied.append(multipliers)
    return {"return": np.array(returns), "cost": np.array(costs) / LIMIT, "multiplier": np.array(applied)}


def measures(run: dict[str, np.ndarray]) -> dict[str, object]:
    """Return the figures of one scheduler, each as (mean, standard deviation over seeds).

    overshoot: the highest cost after the limit was first kept, in percent above the limit.
    undershoot: the lowest cost after that, in percent below the limit.
    settling: the update from which the cost stays below 110% of the limit; None where it never does.
    violation: share of all updates with a cost above 110% of the limit, in percent.
    """
    cost = run["cost"]
    kept = np.where((cost <= 1.0).any(axis=0), (cost <= 1.0).argmax(axis=0), UPDATES)
    above = cost > 1.1
    settled = np.where(above.any(axis=0), UPDATES - above[::-1].argmax(axis=0), 0).astype(float)
    settled[settled == UPDATES] = np.nan
    after = [cost[first:, seed] for seed, first in enumerate(kept) if first < UPDATES]
    figures: dict[str, object] = {
        "return": spread(run["return"][-LAST:].mean(axis=0)),
        "cost": spread(cost[-LAST:].mean(axis=0)),
        "overshoot": spread([100.0 * max(path.max() - 1.0, 0.0) for path in after]),
        "undershoot": spread([100.0 * (1.0 - path.min()) for path in after]),
        "settling": spread(settled[~np.isnan(settled)]),
        "settled_seeds": int((~np.isnan(settled)).sum()),
        "violation": spread(100.0 * above.mean(axis=0)),
        "multiplier": spread(run["multiplier"][-LAST:].mean(axis=0)),
    }
    return figures


def spread(values: object) -> tuple[float, float] | None:
    array = np.asarray(values, dtype=float)
    return (round(float(array.mean()), 2), round(float(array.std()), 2)) if array.size else None


def draw_control(runs: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    shown = [name for name in runs if name not in ("Anneal(0.0, 4.0)", "AugmentedLagrangian()")]
    figure, axes = plt.subplots(2, 6, figsize=(12, 3.8), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, shown, strict=False):
        cost = runs[name]["cost"]
        axis.axhline(1.0, color="0.6", linewidth=0.8)
        axis.fill_between(range(UPDATES), cost.min(axis=1), cost.max(axis=1), color="C3", alpha=0.2, linewidth=0)
        axis.plot(cost.mean(axis=1), color="C3", linewidth=1.3)
        axis.set_title(
            name.replace("AugmentedLagrangian(2.0, learning_rate=0.1)", "AugmentedLagrangian(2.0, ...)"), fontsize=7.5
        )
        axis.set_ylim(0.0, 3.2)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    figure.supxlabel("update", fontsize=8)
    for row in axes:
        row[0].set_ylabel("J / limit", fontsize=8)
    figure.tight_layout(pad=0.6)
    save(figure, path)


# --- speed ---


def speed() -> list[dict[str, object]]:
    """Return microseconds per call: the best of 20 rounds, one update and 1,000 constraints in one."""
    violations = np.random.default_rng(0).normal(0.0, 2.0, 1000)
    rows = []
    for name, kind in BUILTIN.items():
        scheduler = kind()
        state, states = scheduler.init(), scheduler.init_many(1000)
        for _ in range(20):
            state, _ = scheduler.update(state, 0.3)
            states, _ = scheduler.update_many(states, violations)
        one = min(timeit.repeat(lambda: scheduler.update(state, 0.3), number=2000, repeat=20)) / 2000  # noqa: B023
        many = min(timeit.repeat(lambda: scheduler.update_many(states, violations), number=50, repeat=20)) / 50  # noqa: B023
        rows.append({"scheduler": name, "update": round(1e6 * one, 2), "update_many_1000": round(1e6 * many, 1)})
    return rows


# --- tables ---


def table(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(pair: tuple[float, float] | None, digits: int = 0) -> str:
    return "-" if pair is None else f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def settling(figures: dict[str, object]) -> str:
    seeds = figures["settled_seeds"]
    text = shown(figures["settling"])  # type: ignore[arg-type]
    return text if seeds == SEEDS else f"{text} ({seeds} of {SEEDS} seeds)" if seeds else "never"


def write(marker: str, text: str) -> None:
    """Replace what stands between the markers in docs/schedulers.md."""
    page = ROOT / "docs" / "schedulers.md"
    pattern = re.compile(f"(<!-- {marker} -->\n).*?(\n<!-- /{marker} -->)", re.DOTALL)
    page.write_text(pattern.sub(lambda found: found[1] + text + found[2], page.read_text()))


def main() -> None:
    pictures = ROOT / "docs" / "img"
    pictures.mkdir(parents=True, exist_ok=True)
    draw_plant(pictures / "schedulers_plant.png")
    runs = {name: control(scheduler) for name, scheduler in SCHEDULERS.items()}
    runs["early termination"] = control(Fixed(0.0), cutoff=LIMIT)
    runs["no constraint"] = control(Fixed(0.0))
    draw_control(runs, pictures / "schedulers_control.png")
    best, dual = optimum()
    free, _ = optimum(1e9)
    results = {
        "command": "python benchmarks/schedulers.py",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "plant_mean_excess_percent_from_update_40": plant_table(),
        "control": {
            "updates": UPDATES,
            "seeds": SEEDS,
            "optimal_return": round(best, 1),
            "optimal_multiplier": round(dual, 3),
            "optimal_return_without_limit": round(free, 1),
            "schedulers": {name: measures(run) for name, run in runs.items()},
        },
        "microseconds": speed(),
    }
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / "schedulers.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    )
    excess = [[f"`{row['scheduler']}`", *(row[each] for each in DISTURBANCES)] for row in plant_table()]
    write("plant", table(["scheduler", *DISTURBANCES], excess))
    rows = []
    for name, run in runs.items():
        figures = measures(run)
        label = f"`{name}`" if "(" in name else name
        rows.append(
            [label]
            + [shown(figures[each], digits) for each, digits in (("return", 0), ("cost", 2))]
            + [
                shown(figures["overshoot"]),
                shown(figures["undershoot"]),
                settling(figures),
                shown(figures["violation"]),
            ]
            + [shown(figures["multiplier"], 1) if "(" in name and name != "CRPO()" else ""]
        )
    header = ["scheduler", "return", "cost / limit", "overshoot %", "undershoot %", "settling", "in violation %", "λ"]
    optimal = f"The optimum by linear programming: return {best:.0f} with λ = {dual:.2f}; without the limit {free:.0f}."
    write("control", table(header, rows) + "\n\n" + optimal)
    timed = [[f"`{row['scheduler']}`", row["update"], row["update_many_1000"]] for row in results["microseconds"]]
    write("speed", table(["scheduler", "one update, µs", "1,000 in one call, µs"], timed))


if __name__ == "__main__":
    main()
