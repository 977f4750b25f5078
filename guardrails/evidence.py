"""Evidence: what a step's rows come down to, small enough to record and enough to decide on again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CostEvidence:
    """One cost column, reduced.

    Args:
        mean: sum of the finite costs over the number of all rows, in the cost's unit; NaN with no rows.
        spread: standard deviation of the finite costs about their mean, in the same unit; 0 with none.
        invalid_rows: rows whose cost was NaN or infinite.
        worst: worst finite cost in the constraint's sense; NaN unless some rows are invalid and some are not.
    """

    mean: float
    spread: float
    invalid_rows: int = 0
    worst: float = float("nan")


@dataclass(frozen=True, slots=True)
class GateEvidence:
    """The scores of a gate's k requirements, reduced.

    Args:
        n_rows: rows scored.
        totals: ``k`` sums of scores.
        squares: ``k`` sums of squared distances from the centre that the gate's state set.
        growth: ``k`` times 5 logs, what the rows add to the change detector's bets.
        failures: ``k`` texts, what went wrong with each metric; empty for those that did not fail.
    """

    n_rows: int
    totals: tuple[float, ...]
    squares: tuple[float, ...]
    growth: tuple[tuple[float, ...], ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that `Guard.decide` needs of a step.

    Args:
        n_rows: trajectories of the step.
        costs: constraint name to its reduced costs.
        gates: gate name to its reduced scores.
    """

    n_rows: int
    costs: Mapping[str, CostEvidence]
    gates: Mapping[str, GateEvidence] = field(default_factory=dict)
