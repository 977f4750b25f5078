"""What a report shows of a run, as data: the page, the picture and ``--json`` are made of it alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Numbers = list[float | None]
"""One entry per point; None where nothing was measured."""

EventKind = Literal["climb", "fall", "frozen", "thawed", "failed", "invalid", "resumed", "lost", "policy", "closed"]


@dataclass(frozen=True, slots=True)
class Trace:
    """A number over the points.

    Args:
        mean: of the steps of each point.
        low: smallest of each point; empty where every point is one step.
        high: largest of each point; empty where every point is one step.
    """

    mean: Numbers
    low: Numbers
    high: Numbers


@dataclass(frozen=True, slots=True)
class Figures:
    """A constraint in a few numbers, over the steps shown.

    Args:
        measured: steps with a cost.
        violated: steps whose cost broke the limit.
        worst: largest violation, in the cost's unit; None with no cost.
        last_cost: cost of the last step that has one, None with no cost.
        last_limit: limit of the last step.
        last_multiplier: multiplier λ after the last step.
        quarter: first step of the last quarter of the points.
        quarter_cost: mean cost from there on.
        quarter_limit: mean limit from there on.
        quarter_violated: steps from there on whose cost broke the limit.
        quarter_measured: steps from there on with a cost.
    """

    measured: int
    violated: int
    worst: float | None
    last_cost: float | None
    last_limit: float | None
    last_multiplier: float | None
    quarter: int
    quarter_cost: float | None
    quarter_limit: float | None
    quarter_violated: int
    quarter_measured: int


@dataclass(frozen=True, slots=True)
class ConstraintView:
    """One constraint.

    Args:
        name: its name.
        sense: ``"<="``, ``">="`` or ``"=="``.
        cost: mean cost of the steps.
        lower: lower end of the 95% band of the mean, normal: cost - 1.96 · spread / √rows.
        upper: upper end.
        limit: the limit it was compared with.
        multiplier: λ after the step.
        violated: steps of each point that broke the limit.
        invalid: rows of each point whose cost was not finite.
        reasons: the sentence of each point's worst step.
        reason_steps: that step.
        figures: the whole in a few numbers.
    """

    name: str
    sense: str
    cost: Trace
    lower: Numbers
    upper: Numbers
    limit: Trace
    multiplier: Trace
    violated: list[int]
    invalid: list[int]
    reasons: list[str]
    reason_steps: list[int]
    figures: Figures


@dataclass(frozen=True, slots=True)
class RequirementView:
    """One requirement of a gate: its threshold, and the mean score with its confidence bounds."""

    name: str
    at_least: float
    audit: bool
    mean: Trace
    lower: Trace
    upper: Trace


@dataclass(frozen=True, slots=True)
class GateView:
    """One gate: its level over the points and after the last step, what it said, and its requirements."""

    name: str
    rungs: int
    level: Trace
    last_level: float | None
    texts: list[str]
    requirements: list[RequirementView]


@dataclass(frozen=True, slots=True)
class DialView:
    """One dial and the value it had."""

    name: str
    value: Trace


@dataclass(slots=True)
class Event:
    """Something that happened, once or in several successive steps; it grows while the run is read.

    Args:
        step: when first.
        last: when last.
        times: steps in which it happened.
        kind: what it is.
        subject: of which constraint, gate or metric; empty when of the run.
        text: the reason, as recorded at ``step``.
    """

    step: int
    last: int
    times: int
    kind: EventKind
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One text before and after the refiner, and whether the refinement was accepted."""

    step: int
    prompt: str
    before: str
    after: str
    accepted: bool


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a refiner did: rows seen, refined and accepted in all, and a few examples."""

    rows: int
    refined: int
    accepted: int
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class RunView:
    """One run.

    Args:
        name: what the reader calls it.
        host: what the guard was attached to; empty where nothing was.
        seed: of the run.
        steps: steps shown.
        rows: trajectories in them.
        stride: steps per point, at most.
        first: first step of each point.
        last: last step of each point.
        started: Unix seconds of the first line.
        ended: of the last line.
        closed: whether the run was closed.
        problem: why reading stopped before the end; empty if it did not.
        constraints: in the guard's order.
        gates: in the guard's order.
        dials: in the guard's order.
        events: in order.
        events_left_out: further ones, which only the ledger has.
        refinement: the refiner's work; None where none was recorded.
        plugins: parts that others wrote: kind, name, distribution, version.
        environment: package to version.
        policy: the guard's configuration.
        verification: what ``guardrails verify`` found; None where it was not asked.
    """

    name: str
    host: str
    seed: int | None
    steps: int
    rows: int
    stride: int
    first: list[int]
    last: list[int]
    started: float
    ended: float
    closed: bool
    problem: str
    constraints: list[ConstraintView]
    gates: list[GateView]
    dials: list[DialView]
    events: list[Event]
    events_left_out: int
    refinement: Refinement | None
    plugins: list[dict[str, str]]
    environment: dict[str, str]
    policy: dict[str, Any]
    verification: dict[str, Any] | None
