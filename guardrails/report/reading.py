"""Taking in a ledger's lines one by one, in bounded memory: numbers, events, refinements."""

from __future__ import annotations

import math
from typing import Any

from guardrails.decision import Decision, GateDecision
from guardrails.evidence import Evidence
from guardrails.ledger import AlteredError, Line
from guardrails.report.events import Events
from guardrails.report.refinement import SUBJECT, Refinements
from guardrails.report.traces import Key, Traces
from guardrails.report.view import EventKind

NORMAL_95 = 1.959963984540054
"""Standard deviations to either side that hold 95% of a normal distribution."""

_YEAR_10000 = 253_402_300_800
"""Unix seconds at which it begins: a later time is none, and no browser can write just any."""

_MOVES: dict[str, EventKind] = {"relaxed": "climb", "tightened": "fall", "frozen": "frozen"}


class Reading:
    """What was read so far."""

    def __init__(self, points: int) -> None:
        self.lines = 0
        self.traces, self.events, self.refinements = Traces(points), Events(), Refinements()
        self.header: dict[str, Any] = {}
        self.started = self.ended = math.nan
        self.closed = False
        self.last: Decision | None = None
        self._at = 0  # the step that the run is at; a resume may put it back
        self._frozen: set[str] = set()

    def take(self, line: Line) -> None:
        """Take in one line.

        Raises:
            AlteredError: if a step is malformed.
        """
        time = line.data.get("time")
        if isinstance(time, (int, float)) and 0 <= time < _YEAR_10000:
            self.started, self.ended = (time if math.isnan(self.started) else self.started), time
        if line.kind == "step":
            try:
                self._step(line.evidence, line.decision)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise AlteredError(f"{line.place}: the step is malformed ({type(error).__name__}: {error}).") from error
        elif line.kind in ("header", "seam"):
            self._begin(line)
        elif line.kind == "note" and line.data.get("subject") == SUBJECT:
            self.refinements.add(line.data.get("data"))
        self.closed = line.kind == "end"
        self.lines += 1

    def _begin(self, line: Line) -> None:
        previous, self.header = self.header, line.data
        state = line.data.get("state")
        start = state.get("step") if isinstance(state, dict) else None
        start = start if isinstance(start, int) else 0
        before, self._at = self._at, start
        if line.kind == "header":
            return
        if line.data.get("reason") == "lost":
            self.events.add(start, "lost", "", f"steps {before + 1} to {start} could not be written to the disk")
        else:
            text = f"went on after step {start}"
            if start < before and self.last:
                text += f"; steps {start + 1} to {before} were given up with it, only the ledger still has them"
                self.traces.cut(start)
                self.events.cut(start)
            self.events.add(start, "resumed", "", text)
        if line.data.get("policy") != previous.get("policy"):
            self.events.add(start, "policy", "", "the guard's configuration is another from here on")

    def _step(self, evidence: Evidence, decision: Decision) -> None:
        numbers: dict[Key, float] = {("rows",): float(decision.n_rows)}
        remarks: dict[str, tuple[float, str]] = {}
        said = {reason.subject: reason.text for reason in reversed(decision.reasons)}
        for name, facts in decision.constraints.items():
            finite = evidence.n_rows - facts.invalid_rows
            spread = evidence.costs[name].spread if name in evidence.costs and finite > 0 else math.nan
            width = NORMAL_95 * spread / math.sqrt(max(finite, 1))
            values = {
                "cost": facts.cost,
                "lower": facts.cost - width,
                "upper": facts.cost + width,
                "limit": facts.limit,
                "multiplier": facts.multiplier,
                "violation": facts.violation,
                "violated": float(facts.violation > 0.0) if math.isfinite(facts.violation) else math.nan,
                "invalid": float(facts.invalid_rows),
            }
            numbers |= {("constraint", name, field): value for field, value in values.items()}
            weight = facts.violation if math.isfinite(facts.violation) else -math.inf
            remarks[f"constraint {name}"] = (weight, said.get(name, ""))
        for name, gate in decision.gates.items():
            numbers["gate", name, "level"] = gate.level
            remarks[f"gate {name}"] = (0.0, gate.text)
            for each in gate.requirements:
                values = {"mean": each.mean, "lower": each.lower, "upper": each.upper}
                numbers |= {("gate", name, each.name, field): value for field, value in values.items()}
            self._moved(decision.step, gate)
        for name, value in decision.dials.items():
            numbers["dial", name] = value
        for reason in decision.reasons:
            if reason.verdict in ("failed", "invalid"):
                self.events.add(decision.step, reason.verdict, reason.subject, reason.text, running=True)
        self.traces.add(decision.step, numbers, remarks)
        self.last, self._at = decision, decision.step

    def _moved(self, step: int, gate: GateDecision) -> None:
        kind: EventKind | None = _MOVES.get(gate.verdict)
        if kind is None and gate.name in self._frozen and not gate.frozen:
            kind = "thawed"
        if kind is not None:
            self.events.add(step, kind, gate.name, gate.text)
        (self._frozen.add if gate.frozen else self._frozen.discard)(gate.name)
