"""Speeds measured alternately: what two benchmarks of Stable-Baselines3 share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        variant: what was measured.
        steps_per_second: median over the rounds; for SAC also its gradient steps per second.
        ratio: median over the rounds of the variant's over the first one's.
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


def alternate(
    variants: Mapping[str, Callable[[], object]], steps: int, rounds: int, targets: Mapping[str, float]
) -> list[Row]:
    """Return a row per variant, over ``rounds`` alternating rounds after one to warm up.

    Each round runs every variant in turn, in an order that changes from round to round, so that a machine that slows
    down slows all of them; a ratio is taken within a round, of processor time.

    Args:
        variants: name to what takes ``steps`` steps; ratios are over the first.
        steps: environment steps of a variant in one round.
        rounds: at least 1.
        targets: the least ratio promised of those that have one.
    """
    names = list(variants)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            variants[name]()
            if turn:
                speeds[name].append(steps / (time.process_time() - start))
    rows = []
    for name in names:
        low, middle, high = np.quantile(np.array(speeds[name]) / np.array(speeds[names[0]]), [0.25, 0.5, 0.75])
        rows.append(Row(name, float(np.median(speeds[name])), middle, low, high, targets.get(name, float("nan"))))
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print(f"{'':44}{'steps/s':>9}{'ratio':>8}{'quartiles':>16}{'target':>9}")
    for row in rows:
        target = "" if np.isnan(row.target) else f">= {row.target:.2f}"
        spread = f"{row.low:.3f} to {row.high:.3f}"
        print(f"{row.variant:44}{row.steps_per_second:9.0f}{row.ratio:8.3f}{spread:>16}{target:>9}")
