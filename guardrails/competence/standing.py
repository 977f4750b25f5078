"""Where a gate stands in a state: its bounds, the facts of a decision, and what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from guardrails.competence.confidence import bernstein_boundary, rows_until_certain, spending
from guardrails.competence.state import GateState
from guardrails.decision import GateDecision, RequirementDecision, Verdict
from guardrails.rollout import FloatArray

if TYPE_CHECKING:
    from guardrails.competence.gate import Gate


def log_inverse_error(gate: Gate, state: GateState) -> FloatArray:
    """Return log(1 / error) of each requirement's current evidence, ``(k,)``."""
    share = (1.0 - gate.confidence) / len(gate.requires)
    spent: FloatArray = -np.log(spending(share, state.attempts))
    return spent


def bounds(gate: Gate, state: GateState) -> tuple[FloatArray, FloatArray]:
    """Return lower and upper bounds on each requirement's running average, ``(k,)``; 0 and 1 without evidence."""
    rows = np.maximum(state.rows, 1.0)
    means = state.totals / rows
    width = bernstein_boundary(state.variances, log_inverse_error(gate, state)) / rows
    none = state.rows == 0.0
    return np.where(none, 0.0, np.maximum(means - width, 0.0)), np.where(none, 1.0, np.minimum(means + width, 1.0))


def waits(gate: Gate, state: GateState) -> str:
    """Return what keeps a gate from climbing once every requirement is met, or an empty string."""
    if state.rung_rows < gate.dwell:
        return f"dwelling for {gate.dwell - state.rung_rows} more rows"
    if state.rung_updates < gate.interval:
        return f"dwelling for {gate.interval - state.rung_updates} more updates"
    rows, recent = state.breaks.recent()
    low = [each.name for each, mean in zip(gate.requires, recent, strict=True) if mean < each.at_least]
    return f"waiting for the last {rows} rows of {low[0]} to meet it too" if low else ""


def decision(
    gate: Gate,
    state: GateState,
    shown: GateState,
    verdict: Verdict,
    text: str,
    failures: Sequence[str],
    limits: tuple[FloatArray, FloatArray],
) -> GateDecision:
    """Return the facts of a step.

    Args:
        gate: the gate.
        state: its state from now on, whose rung is reported.
        shown: the state on whose evidence it was decided.
        verdict: what happened to the gate.
        text: the sentence that says so; without one, it says what is waited for.
        failures: what went wrong with each metric.
        limits: `bounds` in ``shown``.
    """
    lower, upper = limits
    rows = np.maximum(shown.rows, 1.0)
    means = shown.totals / rows
    certain = rows_until_certain(means - gate.thresholds, shown.variances / rows, log_inverse_error(gate, shown))
    to_go = np.where(lower >= gate.thresholds, 0.0, np.maximum(np.ceil(certain) - shown.rows, 1.0))
    seen = np.where(shown.rows > 0, means, np.nan)
    columns = np.array([seen, lower, upper, shown.rows, to_go]).T.tolist()
    facts = tuple(
        RequirementDecision(each.name, each.at_least, mean, low, high, n, wait, each.audit, failure)
        for each, failure, (mean, low, high, n, wait) in zip(gate.requires, failures, columns, strict=True)
    )
    decided = GateDecision(gate.name, gate.level(state), state.rung, gate.rungs, facts, state.frozen, verdict, text)
    if text:
        return decided
    if state.rung == gate.rungs:
        return decided.worded("open")
    if state.frozen:
        return decided.worded("frozen until every audit is met with confidence")
    return decided.worded(waits(gate, state) if decided.binding is None else "")
