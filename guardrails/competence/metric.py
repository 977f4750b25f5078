"""CompetenceMetric: how well each trajectory of a rollout was done, as a score in [0, 1]."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from guardrails.errors import RolloutError, told
from guardrails.rollout import FloatArray, Rollout

_ROUNDING = 1e-6
"""Scores this far outside [0, 1] are clipped: single-precision metrics return 1.0000001 for 1."""


class CompetenceMetric(ABC):
    """Scores the rows of a rollout; 1 is competent, 0 is not.

    A subclass sets `name` and `requires` and writes `measure`. It keeps no state: a gate owns the
    statistics. Score each row by itself: a number for the whole batch repeated in every row would
    count as that many pieces of evidence although it is one.

    Attributes:
        name: what gates, logs and states call it; a plug-in's metric is ``"<package>.<name>"``.
        requires: the columns of `Rollout` it reads; a cost by its own name, or ``"costs"`` for all.

    Example:
        >>> class Brevity(CompetenceMetric):
        ...     name = "acme.brevity"
        ...     requires = {"lengths"}
        ...
        ...     def measure(self, rollout):
        ...         return (rollout.lengths < 100).astype(float)
        >>> Brevity().measure(Rollout(lengths=[20, 300]))
        array([1., 0.])
    """

    name: str
    requires: Collection[str] = frozenset()

    @abstractmethod
    def measure(self, rollout: Rollout) -> FloatArray | Sequence[float]:
        """Return one score in [0, 1] per row of ``rollout``."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({settings})"


class Measurement(NamedTuple):
    """What a metric returned, after checking.

    Args:
        scores: ``(n_rows,)`` float64 in [0, 1]; all 0 when the metric failed.
        failure: what was wrong with it, or an empty string.
    """

    scores: FloatArray
    failure: str


def measure(metric: CompetenceMetric, rollout: Rollout, budget_seconds: float | None = None) -> Measurement:
    """Return the scores of ``metric``; a metric that fails scores 0 on every row.

    A failure is: it raises; it returns something other than one number per row, a NaN, or a number
    outside [0, 1]; or it takes longer than ``budget_seconds``, judged once it has returned, since a
    call cannot be interrupted safely. ``KeyboardInterrupt`` and ``SystemExit`` pass.
    """
    begun = time.perf_counter()
    try:
        failure, scores = _checked(metric.measure(rollout), rollout.n_rows)
    except Exception as error:
        failure, scores = f"raised {told(error)}", None
    seconds = time.perf_counter() - begun
    if not failure and budget_seconds is not None and seconds > budget_seconds:
        failure = f"took {seconds:.3g} s, over its budget of {budget_seconds:g} s"
    if failure or scores is None:
        return Measurement(np.zeros(rollout.n_rows), failure)
    return Measurement(scores, "")


def _checked(values: Any, n_rows: int) -> tuple[str, FloatArray | None]:
    if values is None:
        return "returned None instead of scores", None
    if hasattr(values, "detach"):  # a torch tensor, on any device, in any dtype
        values = values.detach().cpu().double().numpy()
    if np.iscomplexobj(values):
        return "returned complex numbers", None
    if isinstance(values, np.ma.MaskedArray):  # what is masked was not scored
        values = np.ma.filled(values.astype(np.float64), np.nan)
    scores = np.array(values, dtype=np.float64)
    if scores.shape != (n_rows,):
        return f"returned scores of shape {scores.shape} for {n_rows} rows", None
    if not n_rows:
        return "", scores
    low, high = float(scores.min()), float(scores.max())
    if np.isnan(low):
        return f"returned NaN in {int(np.isnan(scores).sum())} of {n_rows} rows", None
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        return f"returned scores from {low:.4g} to {high:.4g}, outside [0, 1]", None
    return "", np.clip(scores, 0.0, 1.0)


def column(rollout: Rollout, name: str) -> Any:
    """Return a column of ``rollout`` that must be there; where there is only a cost of that name, the cost.

    Raises:
        RolloutError: if there is neither.
    """
    values = getattr(rollout, name)
    if values is None and name in rollout.costs:  # a host that provides either was not refused
        return rollout.cost(name)
    if values is None:
        present = ", ".join(sorted(rollout.columns)) or "none"
        raise RolloutError(f"There is no column '{name}' in this rollout. Columns here: {present}.")
    return values


def cost_column(rollout: Rollout, name: str) -> FloatArray:
    """Return a cost of ``rollout`` that must be there; where there is only a column of that name, the column.

    Raises:
        RolloutError: if there is neither.
    """
    values = getattr(rollout, name) if name in Rollout.__dataclass_fields__ else None
    return values if name not in rollout.costs and isinstance(values, np.ndarray) else rollout.cost(name)


def to_unit(values: Any) -> FloatArray:
    """Return ``values`` cut to [0, 1], with NaN for those that are not finite: an infinity is an error, not a feat."""
    values = np.asarray(values, dtype=np.float64)
    scores: FloatArray = np.where(np.isfinite(values), np.clip(values, 0.0, 1.0), np.nan)
    return scores
