"""Metrics made from what others wrote: a function, or a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from guardrails.competence.metric import CompetenceMetric, column, to_unit
from guardrails.errors import ConfigurationError
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers.base import check_number


class FromFunction(CompetenceMetric):
    """score = function(column, ...) of each row.

    Args:
        function: takes the row's entry of each column, in the order named, and returns a number in [0, 1].
        columns: one column of `Rollout` or several; a cost by its own name.
        name: what gates and logs call it. Default: the function's name.

    Raises:
        ConfigurationError: if there is no column, or a function without a name gets none.

    Example:
        >>> short = FromFunction(lambda text: len(text) < 10, "completions", name="short")
        >>> short.measure(Rollout(completions=["yes", "it depends on"]))
        array([1., 0.])
    """

    def __init__(self, function: Callable[..., float], columns: str | Iterable[str], *, name: str = "") -> None:
        self.columns = (columns,) if isinstance(columns, str) else tuple(columns)
        self.name = name or getattr(function, "__name__", "")
        if not callable(function) or not self.columns or self.name in ("", "<lambda>"):
            raise ConfigurationError(
                f"FromFunction({function!r}): give a function, at least one column, and a name= "
                "where the function has none."
            )
        self.function = function
        self.requires = frozenset(self.columns)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return the function's value on each row."""
        columns = [_entries(rollout, name) for name in self.columns]
        return np.array([float(self.function(*row)) for row in zip(*columns, strict=True)], dtype=np.float64)


class FromTorchMetrics(CompetenceMetric):
    """score = (value - low) / (high - low) of a torchmetrics metric, on each row by itself.

    The metric is cloned, so what it has accumulated elsewhere stays. A value for the whole batch would
    be one piece of evidence, not one per row; therefore each row is updated and computed alone.

    Args:
        metric: a ``torchmetrics.Metric`` whose ``compute`` gives one number.
        inputs: from a rollout to the arguments of ``update`` for each row, a tuple per row.
        requires: the columns that ``inputs`` reads.
        name: what gates and logs call it.
        low: value that counts as 0.
        high: value that counts as 1; below ``low`` where less is better.

    Raises:
        ConfigurationError: if ``metric`` is no torchmetrics metric, or ``low`` equals ``high``.

    Example:
        >>> from torchmetrics.text import CharErrorRate  # doctest: +SKIP
        >>> FromTorchMetrics(
        ...     CharErrorRate(), lambda rollout: zip(rollout.completions, answers(rollout)),
        ...     requires={"completions", "infos"}, name="spelling", low=1.0, high=0.0,
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        metric: Any,
        inputs: Callable[[Rollout], Iterable[Sequence[Any]]],
        *,
        requires: Iterable[str],
        name: str,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        if not all(callable(getattr(metric, method, None)) for method in ("clone", "reset", "update", "compute")):
            raise ConfigurationError(
                f"FromTorchMetrics('{name}') takes a torchmetrics.Metric, not {metric!r}. "
                "Use FromFunction for functions."
            )
        self.low = check_number(f"FromTorchMetrics('{name}')", "low", low)
        self.high = check_number(f"FromTorchMetrics('{name}')", "high", high)
        if self.low == self.high:
            raise ConfigurationError(f"FromTorchMetrics('{name}'): low and high are both {low:g}.")
        self.metric = metric.clone()
        self.inputs = inputs
        self.name = name
        self.requires = frozenset(requires)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return the metric's value on each row, rescaled and cut to [0, 1]; NaN stays NaN."""
        values = []
        for arguments in self.inputs(rollout):
            self.metric.reset()
            self.metric.update(*arguments)
            values.append(float(self.metric.compute()))
        self.metric.reset()
        return to_unit((np.array(values, dtype=np.float64) - self.low) / (self.high - self.low))


def _entries(rollout: Rollout, name: str) -> Any:
    return column(rollout, name) if name in Rollout.__dataclass_fields__ else rollout.cost(name)
