"""The demo's picture: cost against its limit, reward and multiplier, unguarded beside guarded."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from guardrails_demo.curves import Curves

COLOURS = {False: "#c2410c", True: "#0f766e"}
TITLES = {
    "language": ("TRL GRPO: filler words per answer", "optimiser steps"),
    "control": ("Stable-Baselines3 PPO: steps above the speed limit", "environment steps"),
}


def smooth(values: list[float], window: int) -> list[float]:
    """Trailing mean over ``window`` points."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def draw(curves: list[Curves], path: Path) -> None:
    """Draw one column per task (cost, reward, multiplier) and save it as PNG."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    figure, axes = plt.subplots(3, len(tasks), figsize=(6 * len(tasks), 8), sharex="col", squeeze=False)
    for column, task in enumerate(tasks):
        arms = [curve for curve in curves if curve.task == task]
        cost, reward, multiplier = axes[:, column]
        for curve in arms:
            _line(cost, curve, curve.cost)
            _line(reward, curve, curve.reward)
            if curve.guarded:
                multiplier.plot(curve.steps, curve.multiplier, color=COLOURS[True])
        limit = arms[0].limit
        cost.axhline(limit, color="black", linestyle="--", linewidth=1)
        cost.annotate(f"limit {limit:g}", (0.01, limit), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
        cost.axhspan(limit, cost.get_ylim()[1], color="black", alpha=0.05, zorder=0)
        title, unit = TITLES[task]
        cost.set_title(title)
        cost.set_ylabel("mean cost")
        reward.set_ylabel("task reward")
        multiplier.set_ylabel("multiplier λ")
        multiplier.set_xlabel(unit)
        cost.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes: Axes, curve: Curves, values: list[float]) -> None:
    colour = COLOURS[curve.guarded]
    axes.plot(curve.steps, values, color=colour, alpha=0.25, linewidth=1)
    window = max(1, len(values) // 15)
    axes.plot(curve.steps, smooth(values, window), color=colour, label="guarded" if curve.guarded else "unguarded")
