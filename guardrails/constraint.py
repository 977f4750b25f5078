"""Constraint and Dial: what is bounded and what is turned, by how much, and who decides how hard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from guardrails.competence.between import Between
from guardrails.errors import ConfigurationError
from guardrails.evidence import CostEvidence
from guardrails.rollout import FloatArray
from guardrails.schedulers.base import ConstraintScheduler, check_number
from guardrails.schedulers.pid import PID

CostFunction = Callable[..., Any]


class Measured(NamedTuple):
    """Costs of one step after sanitising.

    Args:
        cost: mean cost J, finite; NaN when there were no rows.
        rows: ``(n_rows,)`` finite costs, with unmeasurable rows set to the worst value.
        invalid_rows: how many rows were NaN or infinite.
    """

    cost: float
    rows: FloatArray
    invalid_rows: int


@dataclass(frozen=True)
class Constraint:
    """A bound on a mean cost: J ≤ limit, J ≥ limit with ``sense=">="``, or a target with ``sense="=="``.

    J is the mean over a step's rows of the cost of a row: the undiscounted sum over an RL episode,
    or the value of one completion.

    Args:
        name: what logs, states and errors call it; unique in a guard, without ``/``.
        limit: d ≥ 0, in the cost's own unit; or ``gate.between(tight, loose)``, and the limit moves with
            the gate's level from the stricter value to the other.
        cost: where a row's cost comes from. For TRL a function with the signature of a reward
            function, or several, whose values are summed, and for GRPO and RLOO also ``"kl"``; for
            Stable-Baselines3 a key of ``info`` or a function ``info -> float``, summed over the episode;
            for transformers a function of a batch's outputs and inputs, or the name of an evaluation's
            metric (``"eval_loss"``). ``None`` reads the key or column that bears the constraint's name.
        scheduler: how the multiplier follows the violation: an instance, or the name of a built-in or
            plug-in scheduler, which is then made with its defaults. Default `PID()`.
        sense: ``"<="`` for an upper limit, ``">="`` for a lower one, ``"=="`` for a target to be held
            from both sides, by a scheduler that can (`AdaptiveKL`).
        scale: the violation, in the cost's unit, that a scheduler sees as 1. Default: the limit
            itself, so one set of gains serves limits of 0.05 and of 25; the tight end of a limit that
            moves (the loose one if that is 0), so that gains do not move with it, and a gate that
            never opens trains just as the tight limit would; for a scheduler on the ratio to the limit
            (`AdaptiveKL`), the limit in force.

    Raises:
        ConfigurationError: if the limit is negative or not finite, is 0 with no ``scale`` or with a
            scheduler that needs a ratio to it, if its tight end is the looser one, or if the
            scheduler cannot hold a target.
        PluginError: if no scheduler has the name given.

    Example:
        >>> constraint = Constraint("toxicity", limit=0.05)
        >>> constraint.measure(np.array([0.0, 0.2])).cost
        0.1
    """

    name: str
    limit: float | Between
    cost: CostFunction | Sequence[CostFunction] | str | None = None
    scheduler: ConstraintScheduler[Any] | str = field(default_factory=PID)
    sense: Literal["<=", ">=", "=="] = "<="
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ConfigurationError(
                f"A constraint's name must be a non-empty string without '/', not {self.name!r}: loggers group by '/'."
            )
        owner = f"Constraint '{self.name}'"
        if self.sense not in ("<=", ">=", "=="):
            raise ConfigurationError(
                f"{owner}: sense is {self.sense!r}; give '<=' (at most), '>=' (at least) or '==' (a target)."
            )
        self._check_limit(owner)
        object.__setattr__(self, "scheduler", _scheduler(owner, self.scheduler))
        self._check_scheduler(owner)
        if self.scale is None:
            if self.violation_scale == 0.0:
                raise ConfigurationError(
                    f"{owner}: a limit of 0 has no scale to measure violations by. Give scale=, the violation in the "
                    "cost's unit that counts as 1."
                )
        else:
            object.__setattr__(self, "scale", check_number(owner, "scale", self.scale, low=0.0, open_low=True))
        self._check_cost(owner)

    def _check_limit(self, owner: str) -> None:
        if not isinstance(self.limit, Between):
            object.__setattr__(self, "limit", check_number(owner, "limit", self.limit, low=0.0))
            return
        tight, loose = self.limit.tight, self.limit.loose
        if (self.sense == "<=" and tight > loose) or (self.sense == ">=" and tight < loose):
            raise ConfigurationError(
                f"{owner}: between({tight:g}, {loose:g}) starts at the looser end for sense '{self.sense}', so "
                "competence would tighten it. Give the strict value first."
            )

    def _check_scheduler(self, owner: str) -> None:
        kind = type(self.controller).__name__
        if self.sense == "==" and not self.controller.two_sided:
            raise ConfigurationError(
                f"{owner}: {kind} bounds a cost from one side and cannot hold it at a target (sense '=='). Use "
                "AdaptiveKL, or two constraints on the same cost, one with '<=' and one with '>='."
            )
        if self.controller.relative and 0.0 in self._ends():
            raise ConfigurationError(f"{owner}: {kind} works on the ratio of cost and limit. Give a limit above 0.")

    def _check_cost(self, owner: str) -> None:
        cost = self.cost
        if cost is None or isinstance(cost, str) or callable(cost):
            return
        if isinstance(cost, Sequence) and cost and all(callable(function) for function in cost):
            object.__setattr__(self, "cost", tuple(cost))
            return
        raise ConfigurationError(
            f"{owner}: cost is {cost!r}; give a function, a non-empty list of functions, or the name of a key."
        )

    @property
    def controller(self) -> ConstraintScheduler[Any]:
        """The scheduler as an instance, also where it was given by name."""
        return cast("ConstraintScheduler[Any]", self.scheduler)

    @property
    def violation_scale(self) -> float:
        """The violation, in the cost's unit, that a scheduler sees as 1."""
        tight, loose = self._ends()
        return self.scale if self.scale is not None else tight or loose

    @property
    def bound(self) -> float:
        """The limit d as a number; the tight end of one that moves, see `at`."""
        return self._ends()[0]

    def _ends(self) -> tuple[float, float]:
        return (self.limit.tight, self.limit.loose) if isinstance(self.limit, Between) else (self.limit, self.limit)

    def at(self, level: float) -> Constraint:
        """Return this constraint with the limit that is in force at a gate's ``level``, as a number."""
        if not isinstance(self.limit, Between):
            return self
        scale = None if self.scale is None and self.controller.relative else self.violation_scale
        return replace(self, limit=self.limit.at(level), scale=scale)

    def violation(self, cost: float) -> float:
        """Return J - d, or d - J for a lower limit: positive when violated, in the cost's unit."""
        return self.bound - cost if self.sense == ">=" else cost - self.bound

    def reduce(self, costs: FloatArray) -> CostEvidence:
        """Return what a step's costs come down to, whatever the limit in force.

        Args:
            costs: ``(n_rows,)`` float64.
        """
        n_rows = costs.size
        if n_rows == 0:
            return CostEvidence(math.nan, 0.0)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told below, not by a warning
            total = float(costs.sum())
        if math.isfinite(total):
            return CostEvidence(total / n_rows, _spread(costs, total / n_rows))
        finite = costs[np.isfinite(costs)]
        invalid = n_rows - finite.size
        if not finite.size:
            return CostEvidence(0.0, 0.0, invalid)
        worst = float(finite.min() if self.sense == ">=" else finite.max()) if invalid else math.nan
        spread = _spread(finite, float((finite / finite.size).sum()))
        return CostEvidence(float((finite / n_rows).sum()), spread, invalid, worst)

    def mean(self, evidence: CostEvidence, n_rows: int) -> float:
        """Return J of a step, with NaN and infinite costs counted as violations; NaN with no rows.

        An unmeasurable row takes the worst finite cost of the step or one scale beyond the limit,
        whichever is worse; and J itself is at least the share of such rows beyond the limit, so that
        a cost function cannot loosen a constraint by failing.

        Args:
            evidence: what `reduce` returned.
            n_rows: rows it was reduced from.
        """
        if not evidence.invalid_rows:
            return float(evidence.mean)
        sign, share = self._sign, evidence.invalid_rows / n_rows
        mean = sign * evidence.mean + self._stand_in(evidence) * share
        return float(sign * max(mean, sign * self.bound + self.violation_scale * share))

    def sanitise(self, costs: FloatArray) -> FloatArray:
        """Return ``costs`` with each unmeasurable row set to the worst value, see `mean`."""
        evidence = self.reduce(costs)
        if not evidence.invalid_rows:
            return np.array(costs)
        return np.where(np.isfinite(costs), costs, self._sign * self._stand_in(evidence))

    def measure(self, costs: FloatArray) -> Measured:
        """Return J of a step and its rows, with NaN and infinite costs counted as violations; see `mean`.

        Args:
            costs: ``(n_rows,)`` float64.
        """
        evidence = self.reduce(costs)
        return Measured(self.mean(evidence, costs.size), self.sanitise(costs), evidence.invalid_rows)

    @property
    def _sign(self) -> float:
        return -1.0 if self.sense == ">=" else 1.0

    def _stand_in(self, evidence: CostEvidence) -> float:
        """Return what an unmeasurable row counts as, times the sign of the sense."""
        floor = self._sign * self.bound + self.violation_scale
        return floor if math.isnan(evidence.worst) else max(floor, self._sign * evidence.worst)


PENALTY = "penalty"
"""Name of the dial that the guard turns itself."""


@dataclass(frozen=True)
class Dial:
    """A knob of the host that moves with competence.

    Args:
        name: which knob; an adapter names those it has, such as ``"beta"`` or ``"action_scale"``, and
            refuses others. ``"penalty"`` every host has: the guard multiplies each multiplier with its
            value, and what the schedulers remember stays as it is.
        value: ``gate.between(tight, loose)``; which end is the strict one is for the user to know.

    Raises:
        ConfigurationError: if the name or the value cannot be used.

    Example:
        >>> from guardrails import Gate, Require
        >>> gate = Gate(Require("reward_level", at_least=0.9))
        >>> Dial("beta", gate.between(0.10, 0.01, scale="geometric")).value.at(0.0)
        0.1
    """

    name: str
    value: Between

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ConfigurationError(
                f"A dial's name must be a non-empty string without '/', not {self.name!r}: loggers group by '/'."
            )
        if not isinstance(self.value, Between):
            raise ConfigurationError(
                f"Dial '{self.name}': value is {self.value!r}; give gate.between(tight, loose). A knob that does not "
                "move is set on the host itself."
            )


def _scheduler(owner: str, given: Any) -> ConstraintScheduler[Any]:
    """Return the scheduler given as an instance or by name."""
    if isinstance(given, str):
        from guardrails import plugins

        kind = plugins.scheduler(given)
        try:
            return kind()
        except TypeError as error:
            raise ConfigurationError(
                f"{owner}: scheduler '{given}' cannot be made without arguments ({error}). Give an instance instead."
            ) from error
    if not isinstance(given, ConstraintScheduler):
        raise ConfigurationError(
            f"{owner}: scheduler is {given!r}; give an instance such as PID() or DualAscent(), or a name."
        )
    return given


def _spread(costs: FloatArray, mean: float) -> float:
    """Return the standard deviation of finite ``costs`` about their mean; inf where it exceeds the largest float."""
    with np.errstate(over="ignore"):
        centred = costs - mean
        return math.sqrt(float(centred @ centred) / costs.size)
