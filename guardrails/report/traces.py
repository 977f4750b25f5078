"""Traces: any number of numbers per step, held in bounded memory by halving the resolution as a run grows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

POINTS = 1000
"""Points a trace may have; beyond, neighbours are merged. It is about one per pixel of a wide screen."""

Key = tuple[str, ...]


@dataclass(slots=True)
class Cell:
    """The values of one number within one point.

    Args:
        low: smallest.
        high: largest.
        total: their sum.
        count: how many.
        last: the latest.
    """

    low: float
    high: float
    total: float
    count: int
    last: float

    @property
    def mean(self) -> float:
        """Their mean; of equal values, that value to the bit."""
        return min(max(self.total / self.count, self.low), self.high)


@dataclass(slots=True)
class Point:
    """Some successive steps.

    Args:
        first: first step.
        last: last step.
        cells: the finite numbers recorded in them.
        remarks: a sentence on a subject, with its step and its weight.
    """

    first: int
    last: int
    cells: dict[Key, Cell] = field(default_factory=dict)
    remarks: dict[str, tuple[float, int, str]] = field(default_factory=dict)

    def merge(self, later: Point) -> None:
        """Take in the point that follows; of two remarks the weightier stays, the later one if equal."""
        self.last = later.last
        for key, theirs in later.cells.items():
            own = self.cells.get(key)
            if own is None:
                self.cells[key] = theirs
            else:
                own.low, own.high = min(own.low, theirs.low), max(own.high, theirs.high)
                own.total, own.count, own.last = own.total + theirs.total, own.count + theirs.count, theirs.last
        for subject, remark in later.remarks.items():
            if subject not in self.remarks or remark[0] >= self.remarks[subject][0]:
                self.remarks[subject] = remark


class Traces:
    """Points in the order of their steps, at most `POINTS` of them, each of the same number of steps.

    Args:
        points: points at most, ≥ 2.

    Example:
        >>> traces = Traces(points=2)
        >>> for step in range(1, 6):
        ...     traces.add(step, {("cost",): float(step)}, {})
        >>> [(point.first, point.last, point.cells["cost",].mean) for point in traces]
        [(1, 4, 2.5), (5, 5, 5.0)]
    """

    def __init__(self, points: int = POINTS) -> None:
        self.stride = 1
        """Steps that a point spans, the last one perhaps fewer."""
        self._limit = points
        self._points: list[Point] = []
        self._filled = 0

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def add(self, step: int, numbers: Mapping[Key, float], remarks: Mapping[str, tuple[float, str]]) -> None:
        """Append a step.

        Args:
            step: its number.
            numbers: what was measured; what is not finite is left out.
            remarks: subject to weight and sentence; in a point of several steps the weightiest stays.
        """
        cells = {key: Cell(value, value, value, 1, value) for key, value in numbers.items() if math.isfinite(value)}
        point = Point(step, step, cells, {name: (weight, step, text) for name, (weight, text) in remarks.items()})
        if self._points and self._filled < self.stride:
            self._points[-1].merge(point)
            self._filled += 1
            return
        if len(self._points) == self._limit:
            self._halve()
            return self.add(step, numbers, remarks)
        self._points.append(point)
        self._filled = 1

    def _halve(self) -> None:
        halved = self._points[::2]
        for earlier, later in zip(halved, self._points[1::2], strict=False):
            earlier.merge(later)
        if len(self._points) % 2:
            self._filled = self.stride
        else:
            self._filled = 2 * self.stride
        self._points, self.stride = halved, 2 * self.stride

    def cut(self, step: int) -> None:
        """Forget the points that begin after ``step``: the run went back there."""
        kept = [point for point in self._points if point.first <= step]
        if len(kept) < len(self._points):
            self._points, self._filled = kept, self.stride
