"""Events: what happened in a run besides its numbers, in bounded memory."""

from __future__ import annotations

from collections import deque

from guardrails.report.view import Event, EventKind

KEPT = 500
"""Events kept of the beginning of a run, and as many of its end."""


class Events:
    """Events in order; what happens in successive steps is one event, and the middle of very many is left out.

    Args:
        kept: events kept of the beginning, and as many of the end.

    Example:
        >>> events = Events()
        >>> for step in (3, 4, 9):
        ...     events.add(step, "failed", "politeness", "raised KeyError", running=True)
        >>> [(event.step, event.last, event.times) for event in events.listed()]
        [(3, 4, 2), (9, 9, 1)]
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.left_out = 0
        """Events that were given up."""
        self._kept = kept
        self._early: list[Event] = []
        self._late: deque[Event] = deque()
        self._running: dict[tuple[EventKind, str], Event] = {}

    def add(self, step: int, kind: EventKind, subject: str, text: str, *, running: bool = False) -> None:
        """Append an event.

        Args:
            step: when.
            kind: what it is.
            subject: of what.
            text: why.
            running: whether it goes on from the step before, if the same happened there.
        """
        before = self._running.get((kind, subject))
        if running and before is not None and before.last in (step - 1, step):
            before.times += step - before.last
            before.last = step
            return
        event = Event(step, step, 1, kind, subject, text)
        self._running[kind, subject] = event
        if len(self._early) < self._kept:
            self._early.append(event)
            return
        if len(self._late) == self._kept:
            self._late.popleft()
            self.left_out += 1
        self._late.append(event)

    def cut(self, step: int) -> None:
        """Forget what happened after ``step``: the run went back there."""
        self._early = [event for event in self._early if event.step <= step]
        self._late = deque(event for event in self._late if event.step <= step)
        self._running.clear()
        for event in self.listed():
            event.times -= max(0, event.last - step)
            event.last = min(event.last, step)

    def listed(self) -> list[Event]:
        """Return the events kept, in order."""
        return [*self._early, *self._late]
