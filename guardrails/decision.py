"""Decision: what a guard decided in one step, and why, in words a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Verdict = Literal["tightened", "relaxed", "held", "invalid", "failed", "empty", "frozen"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One sentence of explanation.

    Args:
        subject: name of the constraint, gate or metric it speaks of.
        verdict: what happened to it.
        text: the sentence.
    """

    subject: str
    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.subject} {self.verdict}: {self.text}"


@dataclass(frozen=True, slots=True)
class ConstraintDecision:
    """The facts of one constraint after a step.

    Args:
        name: the constraint's name.
        cost: mean cost J of the step, in the cost's own unit; NaN when the step had no rows or did not measure it.
        limit: the limit d the cost was compared with, in the same unit.
        violation: J - d for an upper limit, d - J for a lower one; positive means violated.
        multiplier: strength λ ≥ 0 that the host applies from now on.
        invalid_rows: rows whose cost was NaN or infinite and was counted as a violation.
    """

    name: str
    cost: float
    limit: float
    violation: float
    multiplier: float
    invalid_rows: int = 0

    @property
    def satisfied(self) -> bool:
        """Whether the step kept the limit; False when nothing could be measured."""
        return self.violation <= 0.0


@dataclass(frozen=True, slots=True)
class RequirementDecision:
    """The evidence for one requirement of a gate, on which a step was decided.

    Args:
        name: the metric's name.
        at_least: threshold on the mean score.
        mean: mean score of the current evidence, NaN when there is none.
        lower: lower confidence bound on the running average of the conditional mean score.
        upper: upper confidence bound on it.
        rows: rows of the evidence.
        rows_to_go: about how many more it takes at this mean and variance; 0 when met, inf when the
            mean is not above the threshold by enough.
        audit: whether it is measured only, never trained on.
        failure: what went wrong with the metric in this step, or an empty string.
    """

    name: str
    at_least: float
    mean: float
    lower: float
    upper: float
    rows: float
    rows_to_go: float
    audit: bool = False
    failure: str = ""

    @property
    def met(self) -> bool:
        """Whether the threshold is met with confidence."""
        return self.lower >= self.at_least


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Where a gate stands after a step, and what it waits for.

    Args:
        name: the gate's name.
        level: rung / rungs, in [0, 1]; 0 is the tightest.
        rung: rung in force from now on.
        rungs: the highest rung.
        requirements: the evidence, in the order the gate was given its requirements.
        frozen: whether it climbs no more because proxies and audits diverge.
        verdict: what happened to the gate.
        text: the sentence that says so.
    """

    name: str
    level: float
    rung: int
    rungs: int
    requirements: tuple[RequirementDecision, ...]
    frozen: bool
    verdict: Verdict
    text: str

    @property
    def binding(self) -> RequirementDecision | None:
        """The requirement that will take longest to be met, or None when all are."""
        unmet = [each for each in self.requirements if not each.met]
        return max(unmet, key=lambda each: (each.rows_to_go, each.at_least - each.lower), default=None)

    def worded(self, waits: str) -> GateDecision:
        """Return the decision with a text that says what is waited for: ``waits``, or the binding requirement."""
        text, binding = f"rung {self.rung} of {self.rungs}", self.binding
        if waits:
            text += f": {waits}"
        elif binding is None:
            text += ": every requirement is met with confidence"
        else:
            text += f": waiting for {binding.name}, {binding.lower:.3f} ≥ {binding.at_least:g} needed, "
            if not binding.rows:
                text += "nothing measured yet"
            elif math.isinf(binding.rows_to_go):
                text += f"not on course at a mean of {binding.mean:.3f}"
            else:
                digits = 1 - math.floor(math.log10(binding.rows_to_go)) if binding.rows_to_go >= 1 else 0
                text += f"about {round(binding.rows_to_go, min(digits, 0)):.0f} more rows"
        return replace(self, text=text)


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of `Guard.step`, frozen.

    Args:
        step: number of steps the guard has decided, this one included.
        n_rows: trajectories the decision rests on.
        constraints: name to facts, in the order the guard was given them.
        gates: name to facts of each gate that moves a limit or a dial.
        dials: name to the value that each dial is to have from now on.
        weights: name of the refinement to its weight α from now on; empty without one.
        reasons: why, at least one sentence per constraint and gate.
    """

    step: int
    n_rows: int
    constraints: Mapping[str, ConstraintDecision]
    reasons: tuple[Reason, ...] = ()
    gates: Mapping[str, GateDecision] = field(default_factory=dict)
    dials: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier λ of each constraint by name."""
        return {name: facts.multiplier for name, facts in self.constraints.items()}

    def metrics(self) -> dict[str, float]:
        """Flat scalars for a logger, named by their part.

        ``<constraint>/cost``, ``/limit``, ``/violation``, ``/multiplier``; ``<gate>/level``,
        ``<gate>/<metric>/mean``, ``<gate>/<metric>/lower``; ``<dial>/value``; ``<refinement>/weight``.
        """
        scalars: dict[str, float] = {}
        for name, facts in self.constraints.items():
            scalars[f"{name}/cost"] = facts.cost
            scalars[f"{name}/limit"] = facts.limit
            scalars[f"{name}/violation"] = facts.violation
            scalars[f"{name}/multiplier"] = facts.multiplier
        for name, gate in self.gates.items():
            scalars[f"{name}/level"] = gate.level
            for each in gate.requirements:
                scalars[f"{name}/{each.name}/mean"] = each.mean
                scalars[f"{name}/{each.name}/lower"] = each.lower
        for name, value in self.dials.items():
            scalars[f"{name}/value"] = value
        for name, weight in self.weights.items():
            scalars[f"{name}/weight"] = weight
        return scalars

    def explain(self) -> str:
        """Return the decision as text, a line per constraint and reason."""
        lines = [f"step {self.step}, {self.n_rows} rows"]
        lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join(lines)
