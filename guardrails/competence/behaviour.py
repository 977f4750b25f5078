"""Competence read from what the policy did: failures, actions, sub-goals, and whether a critic foresaw the cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from guardrails.competence.metric import CompetenceMetric, column, cost_column, to_unit
from guardrails.errors import ConfigurationError
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers.base import check_number


class FailureAvoidance(CompetenceMetric):
    """score = 0 for a trajectory that failed, else 1.

    Args:
        failed: a key of the row's info whose truth means failure, or a function of the info; an info
            without the key is an error, so that a failure cannot go unnoticed.
        cost: instead of ``failed``: name of a cost column; a row failed if its cost is above ``level``.
        level: in the cost's unit.

    Raises:
        ConfigurationError: if both ways are given.

    Example:
        >>> FailureAvoidance("fell").measure(Rollout(infos=[{"fell": False}, {"fell": True}]))
        array([1., 0.])
        >>> FailureAvoidance(cost="cost", level=25.0).measure(Rollout(costs={"cost": [10.0, 30.0]}))
        array([1., 0.])
    """

    name = "failure_avoidance"

    def __init__(
        self,
        failed: str | Callable[[Mapping[str, Any]], bool] | None = None,
        *,
        cost: str | None = None,
        level: float = 0.0,
    ) -> None:
        if cost is not None and failed is not None:
            raise ConfigurationError("FailureAvoidance: give either failed or cost, not both.")
        self.failed = "failure" if failed is None and cost is None else failed
        self.cost = cost
        self.level = check_number("FailureAvoidance", "level", level)
        self.requires = frozenset({"infos" if cost is None else cost})

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return 0 for rows that failed; a cost that is not finite is a failure."""
        if self.cost is not None:
            cost = cost_column(rollout, self.cost)
            return (np.isfinite(cost) & (cost <= self.level)).astype(np.float64)
        failed = self.failed
        infos = column(rollout, "infos")
        return np.array([not (failed(info) if callable(failed) else info[failed]) for info in infos], np.float64)


class ActionVariance(CompetenceMetric):
    """score = 1 - Var(actions) / (range / 2)², averaged over action dimensions: 1 for a steady policy.

    (range / 2)² is the largest variance that actions within the range can have. A row's variance is
    over its own T time steps, in the host's trajectory, with T - 1 as divisor; a single step has none and scores 0.

    Args:
        low: lower end of the actions' range.
        high: upper end, above ``low``.

    Example:
        >>> ActionVariance().measure(Rollout(actions=[[[0.5], [0.5]], [[-1.0], [1.0]]]))
        array([1., 0.])
    """

    name = "action_variance"
    requires = frozenset({"actions"})

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        self.low = check_number("ActionVariance", "low", low)
        self.high = check_number("ActionVariance", "high", high, low=self.low, open_low=True)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return how steady the actions of each row are; actions beyond the range are cut to it."""
        scores = [1.0 - 4.0 * self._variance(actions) for actions in column(rollout, "actions")]
        return to_unit(scores)

    def _variance(self, actions: Any) -> float:
        within = np.clip(np.asarray(actions, dtype=np.float64), self.low, self.high)
        if len(within) < 2:
            return 0.25  # the largest there can be: nothing shows that it is less
        return float(((within - self.low) / (self.high - self.low)).var(axis=0, ddof=1).mean())


class SubgoalAdherence(CompetenceMetric):
    """score = share of the sub-goals reached; with ``ordered``, of those reached before the first that was not.

    Args:
        goals: names of sub-goals, looked for in the list under ``key`` of a row's info, which lists them
            as they were reached; or predicates on a completion. Without, the list holds one truth
            value per sub-goal. Anything else, such as a mapping, names without ``goals`` or NaN, is an error.
        ordered: whether a sub-goal counts only after those before it.
        key: of a row's info.

    Raises:
        ConfigurationError: if the goals are neither all names nor all predicates.

    Example:
        >>> SubgoalAdherence(["key", "door"], ordered=True).measure(
        ...     Rollout(infos=[{"subgoals": ["key", "door"]}, {"subgoals": ["door", "key"]}, {"subgoals": []}])
        ... )
        array([1. , 0.5, 0. ])
        >>> SubgoalAdherence([str.isascii, str.islower]).measure(Rollout(completions=["yes", "Yes"]))
        array([1. , 0.5])
    """

    name = "subgoal_adherence"

    def __init__(
        self,
        goals: Sequence[str] | Sequence[Callable[[Any], bool]] = (),
        *,
        ordered: bool = False,
        key: str = "subgoals",
    ) -> None:
        listed = isinstance(goals, Iterable) and not isinstance(goals, str)
        self.goals = tuple(goals) if listed else ()
        self.ordered, self.key = ordered, key
        self._predicates = bool(self.goals) and all(callable(goal) for goal in self.goals)
        if not listed or not (self._predicates or all(isinstance(goal, str) for goal in self.goals)):
            raise ConfigurationError(f"SubgoalAdherence: goals are {goals!r}; give a list of names, or of functions.")
        self.requires = frozenset({"completions" if self._predicates else "infos"})

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return the share of sub-goals that each row reached."""
        rows = column(rollout, "completions" if self._predicates else "infos")
        return np.array([self._share(self._reached(row)) for row in rows], dtype=np.float64)

    def _reached(self, row: Any) -> list[bool]:
        if self._predicates:
            return [bool(goal(row)) for goal in self.goals]  # type: ignore[operator]
        if isinstance(row[self.key], (str, Mapping)):  # a mapping has a key for what was not reached, too
            raise TypeError(f"a row has a {type(row[self.key]).__name__} under '{self.key}', not a list")
        listed = list(row[self.key])
        if not self.goals:
            if any(isinstance(reached, str) or reached != reached for reached in listed):
                raise TypeError(f"a row lists names or NaN under '{self.key}'; without goals, truth values are needed")
            return [bool(reached) for reached in listed]
        reached, position = [], -1
        for goal in self.goals:
            after = listed[position + 1 :] if self.ordered else listed
            reached.append(goal in after)
            if self.ordered and reached[-1]:
                position += 1 + after.index(goal)
        return reached

    def _share(self, reached: list[bool]) -> float:
        if not reached:
            raise ValueError(f"a row lists no sub-goals under '{self.key}'")
        counted = reached.index(False) if self.ordered and False in reached else sum(reached)
        return counted / len(reached)


class CriticCalibration(CompetenceMetric):
    """score = clip(1 - |predicted cost - cost| / scale, 0, 1): whether a critic foresaw what a trajectory cost.

    Args:
        cost: name of the cost column.
        scale: error that counts as 0, > 0, in the cost's unit.
        predicted: key of a row's info with the cost that was predicted: at its start, or on average along it.

    Example:
        >>> CriticCalibration("cost", scale=10.0).measure(
        ...     Rollout(costs={"cost": [20.0, 5.0]}, infos=[{"predicted_cost": 15.0}, {"predicted_cost": 40.0}])
        ... )
        array([0.5, 0. ])
    """

    name = "critic_calibration"

    def __init__(self, cost: str = "cost", *, scale: float = 1.0, predicted: str = "predicted_cost") -> None:
        self.cost, self.predicted = cost, predicted
        self.scale = check_number("CriticCalibration", "scale", scale, low=0.0, open_low=True)
        self.requires = frozenset({cost, "infos"})

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return how close each prediction came."""
        predicted = np.array([info[self.predicted] for info in column(rollout, "infos")], dtype=np.float64)
        return to_unit(1.0 - np.abs(predicted - cost_column(rollout, self.cost)) / self.scale)
