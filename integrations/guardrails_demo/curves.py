"""Curves: what one training of the demo measured, step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Curves:
    """One training, one entry per point in each list.

    Args:
        task: ``"language"`` or ``"control"``.
        guarded: whether a guard was attached.
        limit: the limit d on the mean cost.
        steps: optimiser steps (language) or environment steps (control).
        reward: mean task reward at that point.
        cost: mean cost at that point, measured alike in both arms.
        multiplier: λ at that point; 0 without a guard.
    """

    task: str
    guarded: bool
    limit: float
    steps: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    multiplier: list[float] = field(default_factory=list)

    def add(self, step: int, reward: float, cost: float, multiplier: float) -> None:
        """Append one point."""
        self.steps.append(step)
        self.reward.append(reward)
        self.cost.append(cost)
        self.multiplier.append(multiplier)

    def last_quarter(self, values: list[float]) -> float:
        """Mean of ``values`` over the points in the last quarter of the training; NaN if there are none."""
        if not self.steps:
            return math.nan
        start = self.steps[-1] * 0.75
        tail = [value for step, value in zip(self.steps, values, strict=True) if step > start]
        return sum(tail) / len(tail)

    @property
    def held(self) -> bool:
        """Whether the mean cost of the last quarter kept the limit."""
        return self.last_quarter(self.cost) <= self.limit
