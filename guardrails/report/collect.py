"""From a run's ledger to what a report shows of it, in bounded memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from guardrails.decision import GateDecision
from guardrails.errors import LedgerError
from guardrails.ledger import AlteredError, read, verify
from guardrails.report.reading import Reading
from guardrails.report.traces import POINTS, Key, Point
from guardrails.report.view import (
    ConstraintView,
    DialView,
    Figures,
    GateView,
    Numbers,
    RequirementView,
    RunView,
    Trace,
)

_ROWS: Key = ("rows",)


def collect(run: str | Path, *, name: str = "", verified: bool = True, points: int = POINTS) -> RunView:
    """Return what a report shows of a run.

    A line that is damaged or was altered ends the reading; what came before is shown, and the problem with it.

    Args:
        run: the run's folder, or its ledger.
        name: what the reader calls it; by default as ``run`` was given.
        verified: also verify the record, which replays every decision.
        points: points a trace may have.

    Raises:
        LedgerError: if there is no ledger, an empty one, or one of a newer schema.
    """
    reading = Reading(points)
    problem = ""
    try:
        for line in read(run):
            reading.take(line)
    except AlteredError as error:
        problem = str(error)
    if not reading.lines:
        raise LedgerError(problem or f"{run} holds no complete line. Nothing was recorded.")
    found = None
    if verified:
        result = verify(run)
        found = dataclasses.asdict(result) | {"ok": result.ok}
    return _view(reading, name or str(run), problem, found)


def _view(reading: Reading, name: str, problem: str, verification: dict[str, Any] | None) -> RunView:
    points, header, last = list(reading.traces), reading.header, reading.last
    policy = _table(header.get("policy"))
    constraints, gates, dials = (last.constraints, last.gates, last.dials) if last else ({}, {}, {})
    return RunView(
        name=name,
        host=str(header.get("host") or ""),
        seed=header.get("seed") if isinstance(header.get("seed"), int) else None,
        steps=sum(_count(point) for point in points),
        rows=round(sum(point.cells[_ROWS].total for point in points)),
        stride=reading.traces.stride,
        first=[point.first for point in points],
        last=[point.last for point in points],
        started=reading.started,
        ended=reading.ended,
        closed=reading.closed,
        problem=problem,
        constraints=[_constraint(each, points, policy) for each in constraints],
        gates=[_gate(gate, points) for gate in gates.values()],
        dials=[DialView(each, _trace(points, ("dial", each))) for each in dials],
        events=reading.events.listed(),
        events_left_out=reading.events.left_out,
        refinement=reading.refinements.view(),
        plugins=[_texts(each) for each in _list(header.get("plugins"))],
        environment=_texts(header.get("environment")),
        policy=policy,
        verification=verification,
    )


def _constraint(name: str, points: list[Point], policy: dict[str, Any]) -> ConstraintView:
    def key(field: str) -> Key:
        return ("constraint", name, field)

    remarks = [_remark(point, f"constraint {name}") for point in points]
    return ConstraintView(
        name=name,
        sense=str(_table(_table(policy.get("constraints")).get(name)).get("sense", "<=")),
        cost=_trace(points, key("cost")),
        lower=[point.cells[key("lower")].low if key("lower") in point.cells else None for point in points],
        upper=[point.cells[key("upper")].high if key("upper") in point.cells else None for point in points],
        limit=_trace(points, key("limit")),
        multiplier=_trace(points, key("multiplier")),
        violated=[_total(point, key("violated")) for point in points],
        invalid=[_total(point, key("invalid")) for point in points],
        reasons=[text for _, text in remarks],
        reason_steps=[step for step, _ in remarks],
        figures=_figures(points, key("cost"), key("limit"), key("multiplier"), key("violated"), key("violation")),
    )


def _gate(gate: GateDecision, points: list[Point]) -> GateView:
    def trace(*fields: str) -> Trace:
        return _trace(points, ("gate", gate.name, *fields))

    return GateView(
        name=gate.name,
        rungs=gate.rungs,
        level=trace("level"),
        last_level=_last(points, ("gate", gate.name, "level")),
        texts=[_remark(point, f"gate {gate.name}")[1] for point in points],
        requirements=[
            RequirementView(
                name=each.name,
                at_least=each.at_least,
                audit=each.audit,
                mean=trace(each.name, "mean"),
                lower=trace(each.name, "lower"),
                upper=trace(each.name, "upper"),
            )
            for each in gate.requirements
        ],
    )


def _figures(points: list[Point], cost: Key, limit: Key, multiplier: Key, violated: Key, violation: Key) -> Figures:
    quarter = points[len(points) * 3 // 4 :]
    worst = [point.cells[violation].high for point in points if violation in point.cells]
    return Figures(
        measured=sum(point.cells[violated].count for point in points if violated in point.cells),
        violated=sum(_total(point, violated) for point in points),
        worst=max(worst, default=None),
        last_cost=_last(points, cost),
        last_limit=_last(points, limit),
        last_multiplier=_last(points, multiplier),
        quarter=quarter[0].first if quarter else 0,
        quarter_cost=_mean(quarter, cost),
        quarter_limit=_mean(quarter, limit),
        quarter_violated=sum(_total(point, violated) for point in quarter),
        quarter_measured=sum(point.cells[violated].count for point in quarter if violated in point.cells),
    )


def _trace(points: list[Point], key: Key) -> Trace:
    cells = [point.cells.get(key) for point in points]
    mean: Numbers = [cell.mean if cell else None for cell in cells]
    if all(cell is None or cell.count == 1 for cell in cells):
        return Trace(mean, [], [])
    return Trace(mean, [cell.low if cell else None for cell in cells], [cell.high if cell else None for cell in cells])


def _mean(points: list[Point], key: Key) -> float | None:
    cells = [point.cells[key] for point in points if key in point.cells]
    if not cells:
        return None
    count = sum(cell.count for cell in cells)
    mean = sum(cell.mean * (cell.count / count) for cell in cells)  # weighted first: a sum may be beyond a float
    return min(max(mean, min(cell.low for cell in cells)), max(cell.high for cell in cells))


def _last(points: list[Point], key: Key) -> float | None:
    return next((point.cells[key].last for point in reversed(points) if key in point.cells), None)


def _total(point: Point, key: Key) -> int:
    return round(point.cells[key].total) if key in point.cells else 0


def _count(point: Point) -> int:
    return point.cells[_ROWS].count


def _remark(point: Point, subject: str) -> tuple[int, str]:
    _, step, text = point.remarks.get(subject, (0.0, point.last, ""))
    return step, text


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in _table(value).items()}
