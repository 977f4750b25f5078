"""Decision: what a guard decided in one step, and why, in words a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["tightened", "relaxed", "held", "invalid", "failed", "empty"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One sentence of explanation.

    Args:
        subject: name of the constraint, dial or metric it speaks of.
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
        cost: mean cost J of the step, in the cost's own unit; NaN when the step had no rows.
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
class Decision:
    """The outcome of `Guard.step`, frozen.

    Args:
        step: number of steps the guard has decided, this one included.
        n_rows: trajectories the decision rests on.
        constraints: name to facts, in the order the guard was given them.
        reasons: why, one sentence per constraint that changed or could not be measured.
    """

    step: int
    n_rows: int
    constraints: Mapping[str, ConstraintDecision]
    reasons: tuple[Reason, ...] = ()

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier λ of each constraint by name."""
        return {name: facts.multiplier for name, facts in self.constraints.items()}

    def metrics(self) -> dict[str, float]:
        """Flat scalars for a logger: ``<name>/cost``, ``/limit``, ``/violation``, ``/multiplier``."""
        scalars: dict[str, float] = {}
        for name, facts in self.constraints.items():
            scalars[f"{name}/cost"] = facts.cost
            scalars[f"{name}/limit"] = facts.limit
            scalars[f"{name}/violation"] = facts.violation
            scalars[f"{name}/multiplier"] = facts.multiplier
        return scalars

    def explain(self) -> str:
        """Return the decision as text, a line per constraint and reason."""
        lines = [f"step {self.step}, {self.n_rows} rows"]
        lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join(lines)
