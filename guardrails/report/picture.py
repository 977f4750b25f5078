"""The picture: the same charts as the page's, drawn by matplotlib for a paper, as PNG, SVG or PDF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardrails.errors import GuardrailsError
from guardrails.report.view import ConstraintView, GateView, Numbers, RunView, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
"""Endings of the files that can be drawn."""

_LARGEST = 1e300
"""Largest number that is drawn: an axis needs room beyond it."""

_COST, _LIMIT, _LAMBDA, _LEVEL, _BROKEN = "#1f5fa8", "#b42318", "#7c3fb3", "#187a49", "#d9480f"


def draw(runs: Sequence[RunView], path: str | Path, *, dpi: int = 150) -> None:
    """Draw a column per run: for each constraint its cost and λ, then the level of each gate.

    Args:
        runs: one or several.
        path: where to; its ending says the format, see `FORMATS`.
        dpi: dots per inch of a PNG.

    Raises:
        GuardrailsError: if the ending is another, matplotlib is missing, there is nothing to draw, or the file cannot
            be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise GuardrailsError(f"A picture ends in {', '.join(FORMATS)}; {path} does not. Give another name.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GuardrailsError(
            "A picture needs matplotlib, which is not installed. Install it with: pip install matplotlib"
        ) from error
    constraints = list(dict.fromkeys(part.name for run in runs for part in run.constraints))
    gates = list(dict.fromkeys(part.name for run in runs for part in run.gates))
    heights = [2.4, 1.2] * len(constraints) + [1.4] * len(gates)
    if not heights:
        raise GuardrailsError("There is nothing to draw: no step with a constraint or a gate was recorded.")
    # Of fixed salt and without a date, so that the same ledger gives the same file; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "guardrails", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(max(5.0, 3.6 * len(runs)), sum(heights) + 0.8), layout="constrained")
        rows = figure.subplots(
            len(heights), len(runs), squeeze=False, sharex="col", sharey="row", height_ratios=heights
        )
        for column, run in enumerate(runs):
            axes = list(rows[:, column])
            _column(run, axes, constraints, gates)
            axes[0].set_title(_plain(run.name), fontsize=10)
            axes[-1].set_xlabel("step")
        for row in rows:
            for axis in row[1:]:
                axis.set_ylabel("")
        try:
            figure.savefig(path, dpi=dpi, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise GuardrailsError(f"{path} cannot be written: {error.strerror or error}. Give another path.") from error


def _column(run: RunView, axes: list[Axes], constraints: list[str], gates: list[str]) -> None:
    xs = [(first + last) / 2 for first, last in zip(run.first, run.last, strict=True)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eeebe5", linewidth=0.8)
        axis.set_axisbelow(True)
    for row, name in enumerate(constraints):
        cost, multiplier = axes[2 * row : 2 * row + 2]
        cost.set_ylabel(_plain(name))
        multiplier.set_ylabel("multiplier λ")
        constraint = next((part for part in run.constraints if part.name == name), None)
        if constraint is None:
            _absent(cost)
            continue
        _cost(constraint, xs, cost)
        _line(multiplier, xs, constraint.multiplier, _LAMBDA)
    for name, axis in zip(gates, axes[2 * len(constraints) :], strict=True):
        axis.set_ylabel(f"level of {_plain(name)}")
        gate = next((part for part in run.gates if part.name == name), None)
        if gate is None:
            _absent(axis)
            continue
        _level(run, gate, xs, axis)


def _absent(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not in this run", transform=axis.transAxes, ha="center", va="center", color="#67635c")


def _cost(part: ConstraintView, xs: list[float], axis: Axes) -> None:
    axis.fill_between(xs, _gaps(part.lower), _gaps(part.upper), color=_COST, alpha=0.18, linewidth=0)
    _line(axis, xs, part.cost, _COST, label="mean cost, 95% band")
    _line(axis, xs, part.limit, _LIMIT, label="limit", linestyle="--", drawstyle="steps-post")
    broken = [x for x, count in zip(xs, part.violated, strict=True) if count]
    axis.plot(broken, [0.0] * len(broken), "|", color=_BROKEN, markersize=5, transform=axis.get_xaxis_transform())
    axis.legend(frameon=False, fontsize=8, loc="best")


def _level(run: RunView, gate: GateView, xs: list[float], axis: Axes) -> None:
    _line(axis, xs, gate.level, _LEVEL, drawstyle="steps-post")
    axis.set_ylim(-0.08, 1.08)
    for event in run.events:
        if event.subject == gate.name and event.kind in ("climb", "fall"):
            place = next((i for i, last in enumerate(run.last) if last >= event.step), None)
            level = None if place is None else gate.level.mean[place]
            if level is not None:
                climbs = event.kind == "climb"
                axis.plot(event.step, level, "^" if climbs else "v", color=_LEVEL if climbs else _LIMIT, markersize=5)


def _line(axis: Axes, xs: list[float], trace: Trace, colour: str, **style: Any) -> None:
    axis.plot(xs, _gaps(trace.mean), color=colour, linewidth=1.2, **style)
    if trace.low:
        axis.fill_between(xs, _gaps(trace.low), _gaps(trace.high), color=colour, alpha=0.12, linewidth=0)


def _gaps(numbers: Numbers) -> list[float]:
    return [math.nan if value is None else min(max(value, -_LARGEST), _LARGEST) for value in numbers]


def _plain(text: str) -> str:
    """Return ``text`` as matplotlib writes it out: no formula between dollars, nothing that does not print."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text).replace("$", r"\$")
