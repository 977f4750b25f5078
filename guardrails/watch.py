"""Watch: a run's ledger in the terminal while it grows."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from guardrails.decision import Decision
from guardrails.ledger import AlteredError, Line, Reader

STEPS = 60
"""Steps in a sparkline, at most."""

_BESIDE = 52
"""Columns of the terminal that are not sparkline."""

_BLOCKS = "▁▂▃▄▅▆▇█"


class Watch:
    """Follows one run; `poll` reads what was written since, `frame` draws where it stands.

    It holds the steps that it draws and no others, however many there are.

    Args:
        run: the run's folder, or its ledger.

    Raises:
        LedgerError: if there is no ledger.

    Example:
        >>> watch = Watch("runs/x")  # doctest: +SKIP
        >>> watch.poll()  # doctest: +SKIP
        >>> rich.print(watch.frame())  # doctest: +SKIP
    """

    def __init__(self, run: str | Path) -> None:
        self._run, self._reader = run, Reader(run)
        self._steps: deque[Line] = deque(maxlen=STEPS)
        self._moves: deque[tuple[int, str, str]] = deque(maxlen=4)
        self._header: dict[str, Any] = {}
        self._begun: float | None = None
        self.ended = False
        """Whether the last line read closes the run."""

    def poll(self) -> None:
        """Read what was written since.

        Raises:
            AlteredError: at a line that is damaged or not in its place.
            LedgerError: if the ledger can no longer be read.
        """
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[Line]:
        """Read what was written since, and yield its steps one by one.

        Raises:
            AlteredError: at a line that is damaged or not in its place.
            LedgerError: if the ledger can no longer be read.
        """
        for line in self._reader.poll():
            self.ended = line.kind == "end"
            if line.kind == "step":
                self._note(line)
                self._steps.append(line)
                yield line
            elif line.kind in ("header", "seam"):
                self._header = line.data

    def _note(self, line: Line) -> None:
        """Keep the reasons of gates that moved and of what failed; the decision is decoded when drawn."""
        try:
            for subject, verdict, text in line.data["decision"].get("reasons", ()):
                gate = line.data["decision"].get("gates", {}).get(subject)
                if verdict in ("failed", "frozen", "invalid") or (gate and verdict in ("relaxed", "tightened")):
                    self._moves.append((line.data["step"], f"{subject} {verdict}", text))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise AlteredError(f"{line.place}: its decision is malformed ({type(error).__name__}: {error}).") from error

    def frame(self, width: int = 80) -> RenderableType:
        """Return what the terminal shows: cost against limit, λ and level, and the last reasons.

        Args:
            width: columns of the terminal.

        Raises:
            AlteredError: if a step is malformed.
        """
        if not self._steps:
            return Panel(Text("No step was recorded yet."), title=_text(str(self._run)))
        try:
            return self._drawn(width)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            place = self._steps[-1].place
            raise AlteredError(f"{place}: the step is malformed ({type(error).__name__}: {error}).") from error

    def _drawn(self, width: int) -> Panel:
        shown = max(6, min(STEPS, (width - _BESIDE) // 2))
        decisions = [line.decision for line in list(self._steps)[-shown:]]
        last, when = decisions[-1], float(self._steps[-1].data.get("time", math.nan))
        parts: list[RenderableType] = [_constraints(decisions)]
        if last.gates:
            parts.append(_gates(decisions))
        if last.dials:
            parts.append(Text("   ".join(f"{_clean(name)} = {value:.4g}" for name, value in last.dials.items())))
        for reason in last.reasons:
            if reason.subject in last.constraints:
                parts.append(Text(f"{_clean(reason.subject)} {reason.verdict}: {_clean(reason.text)}", style="dim"))
        for step, what, text in self._moves:
            parts.append(Text(f"step {step}: {_clean(what)}: {_clean(text)}", style="yellow"))
        ago = time.time() - when
        state = "ended" if self.ended else f"last line {ago:.0f} s ago" if ago >= 2 else "live"
        host = f"{_clean(str(self._header.get('host')))}, " if self._header.get("host") else ""
        title = _text(f"{host}step {last.step}, {last.n_rows} rows, {state}")
        run = _text(str(self._run))  # apart from the title, which a long path would push out of sight
        return Panel(Group(*parts), title=title, title_align="left", subtitle=run, subtitle_align="left")


def follow(watch: Watch, interval: float) -> Iterator[Line]:
    """Yield each step of a run, one by one, until it is closed.

    Args:
        watch: what to follow.
        interval: seconds between readings, > 0.
    """
    while True:
        yield from watch.steps()
        if watch.ended:
            return
        time.sleep(interval)


def state(line: Line) -> dict[str, Any]:
    """Return a step as JSON data: its number, time, scalars and reasons; what is not finite is None."""
    decision = line.decision
    scalars = {name: value if math.isfinite(value) else None for name, value in decision.metrics().items()}
    reasons = [{"subject": each.subject, "verdict": each.verdict, "text": each.text} for each in decision.reasons]
    return {"step": decision.step, "time": line.data.get("time"), "scalars": scalars, "reasons": reasons}


def sparkline(values: Sequence[float], *, low: float, high: float) -> str:
    """Return ``values`` as blocks between ``low`` and ``high``; a space where nothing was measured.

    Example:
        >>> sparkline([0.0, 0.5, 1.0], low=0.0, high=1.0)
        '▁▅█'
    """
    half = high / 2 - low / 2 or 0.5  # of the width, which may be beyond a float
    places = [
        round((value / 2 - low / 2) / half * (len(_BLOCKS) - 1) + 1e-9) if math.isfinite(value) else -1
        for value in values
    ]
    return "".join(" " if place < 0 else _BLOCKS[min(max(place, 0), len(_BLOCKS) - 1)] for place in places)


def _constraints(decisions: list[Decision]) -> Table:
    table = Table(box=None, padding=(0, 1), expand=False)
    for heading in ("constraint", "cost", "limit", "", "λ", ""):
        table.add_column(heading, justify="right" if heading in ("cost", "limit", "λ") else "left", no_wrap=True)
    for name, facts in decisions[-1].constraints.items():
        past = [each.constraints[name] for each in decisions if name in each.constraints]
        costs, lambdas = [each.cost for each in past], [each.multiplier for each in past]
        bounds = [each.limit for each in past]
        finite = [value for value in [*costs, *bounds] if math.isfinite(value)]
        line = Text()
        for fact, block in zip(
            past, sparkline(costs, low=min([0.0, *finite]), high=max(finite, default=1.0)), strict=True
        ):
            line.append(block, style="green" if fact.satisfied else "red")
        known = next((each for each in reversed(past) if math.isfinite(each.cost)), facts)  # the last that was measured
        table.add_row(
            _text(name),
            Text(f"{known.cost:.4g}", style="green" if known.satisfied else "bold red"),
            Text(f"{facts.limit:.4g}"),
            line,
            Text(f"{facts.multiplier:.4g}"),
            Text(sparkline(lambdas, low=0.0, high=max(lambdas) or 1.0), style="magenta"),
        )
    return table


def _gates(decisions: list[Decision]) -> Table:
    table = Table(box=None, padding=(0, 1), expand=False)
    for heading in ("gate", "level", "", "standing"):
        table.add_column(heading, justify="right" if heading == "level" else "left")
    for name, gate in decisions[-1].gates.items():
        levels = [each.gates[name].level for each in decisions if name in each.gates]
        table.add_row(
            _text(name),
            Text(f"{gate.level:.3g}"),
            Text(sparkline(levels, low=0.0, high=1.0), style="green", no_wrap=True),
            _text(gate.text),
        )
    return table


def _text(text: str) -> Text:
    return Text(_clean(text))


def _clean(text: str) -> str:
    """Return ``text`` without what could steer a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
