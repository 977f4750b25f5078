"""Means of what a guard decided since its host last logged its training."""

from __future__ import annotations

import math
from collections import defaultdict

from guardrails import Decision
from guardrails_transformers.attached import PREFIX


class Averages:
    """Collects the metrics of decisions, one by one, for the next log.

    Example:
        >>> averages = Averages()
        >>> averages.join({"loss": 0.5})
        {'loss': 0.5}
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, decision: Decision) -> None:
        """Keep the metrics of a decision; what was not measured in it is left out of the mean."""
        for name, value in decision.metrics().items():
            if not math.isnan(value):
                self._values[name].append(value)

    def clear(self) -> None:
        """Forget what was not logged."""
        self._values.clear()

    def join(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a host's log of its training with the means in it, and forget them; another log as it is."""
        if "loss" not in logs:
            return logs
        means = {f"{PREFIX}{name}": sum(values) / len(values) for name, values in self._values.items()}
        self.clear()
        return logs | means
