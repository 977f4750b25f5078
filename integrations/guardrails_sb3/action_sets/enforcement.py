"""Enforcement: the sets of one guard applied to rows of actions, and what they had to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from guardrails import AttachError, Guard, RolloutError
from guardrails_sb3.action_sets.base import Array, BoolArray, Bounds, SafeSet, Situation

INTERVENTIONS = "interventions"
"""Key of ``info``: 1.0 at a step whose action a set changed, else 0.0; ``interventions/<set>`` says it of one set."""

EPISODE = "episode_interventions"
"""Key of ``info`` at the last step of an episode: on how many of its steps an action was changed, by set and in all."""


@dataclass(eq=False)
class Memory:
    """What has to be known of each environment from one step to the next.

    Args:
        n_rows: environments.
        n_sets: sets.
        previous: actions executed last, ``(n_rows, *space.shape)``; before the first step any.

    Attributes:
        fresh: ``(n_rows,)``, whether the next action is the first of its episode.
        changed: of each set that changed anything in the last step, by its place, whether it changed each row.
        counts: per row, on how many steps of the running episode each set changed the action, and any did.
        seen: the same of all rows and episodes together.
        going: ``(n_rows,)``, no row at all: `fresh` in the midst of all episodes.
    """

    n_rows: int
    n_sets: int
    previous: Array
    fresh: BoolArray = field(init=False)
    changed: dict[int, list[bool]] = field(init=False, default_factory=dict)
    counts: list[list[int]] = field(init=False)
    seen: list[int] = field(init=False)
    going: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        self.going = np.zeros(self.n_rows, dtype=bool)
        self.going.flags.writeable = False
        self.seen = [0] * (self.n_sets + 1)
        self.begin()

    def begin(self) -> None:
        """Begin an episode in every environment."""
        self.fresh = np.ones(self.n_rows, dtype=bool)
        self.counts = [[0] * (self.n_sets + 1) for _ in range(self.n_rows)]


class Enforcement:
    """Applies the sets of a guard, in the order it has them, with the widths in force.

    Args:
        guard: has the sets and the widths in force.
        space: the action space.
        owner: what errors call the host.

    Raises:
        AttachError: if a set is none of this host, or means nothing in this action space or beside the constraints.
    """

    def __init__(self, guard: Guard, space: spaces.Space[Any], owner: str) -> None:
        self.guard, self.space, self.bounds = guard, space, Bounds.of(space)
        self.sets = tuple(_safe_sets(guard, owner))
        self.senses = {part.name: part.sense for part in guard.constraints}
        for part in self.sets:
            part.check(space)
            part.suits(self.senses)
        self.remembers = any(part.remembers for part in self.sets)
        self.keys = tuple(f"{INTERVENTIONS}/{part.name}" for part in self.sets)
        self._untouched = dict.fromkeys((INTERVENTIONS, *self.keys), 0.0)
        self._told: dict[tuple[int, ...], dict[str, float]] = {}
        self._moving = bool(any(part.turned for part in self.sets))
        self._asking = bool(any(part.needs_environment for part in self.sets))
        self._widths = self.widths()
        self._decided: Any = None

    def widths(self) -> list[dict[str, float]]:
        """Return the widths in force of each set, as numbers."""
        dials = self.guard.dials
        return [part.in_force(dials) for part in self.sets]

    def refresh(self) -> bool:
        """Take up the widths in force; return whether any has moved."""
        before, self._widths, self._decided = self._widths, self.widths(), self.guard.decision
        return before != self._widths

    def memory(self, n_rows: int) -> Memory:
        """Return the memory of so many environments that all begin an episode."""
        return Memory(n_rows, len(self.sets), np.zeros((n_rows, *(self.space.shape or ())), dtype=self.space.dtype))

    def execute(self, actions: Array, situation: Situation, memory: Memory) -> Array:
        """Return what is executed in place of ``actions``, and note in ``memory`` which rows each set changed.

        What is noted is a copy: an environment may edit the action that it is given.

        Args:
            actions: ``(n_rows, *space.shape)``, inside the action space.
            situation: what they are chosen in.
            memory: of the same rows.

        Raises:
            RolloutError: if an action is not finite in the end.
        """
        if self._moving and self.guard.decision is not self._decided:
            self.refresh()
        changed: dict[int, list[bool]] = {}
        finite = self.bounds is None
        for index, part in enumerate(self.sets):
            widths = self._widths[index]
            if self._asking and part.needs_environment and situation.call is None:
                continue
            if (held := part.held(actions, situation, widths)) is not None:
                finite = True
                actions, moved = held
                if moved is not None:
                    changed[index] = moved
                continue
            projected = part.project(actions, situation, widths)
            # Bytes are compared several times faster than numbers; where they differ the numbers decide.
            if projected is actions or projected.tobytes() == actions.tobytes():
                continue
            changed[index], finite = _rows_that_differ(projected, actions), self.bounds is None
            actions = projected
        # The sum of squares is finite if all are, unless it overflows: one number to look at in place of many.
        if not finite and not math.isfinite(np.vdot(actions, actions)) and not np.isfinite(actions).all():
            raise RolloutError(f"The policy's action is not finite: {actions}. It has diverged; nothing was executed.")
        memory.changed, memory.previous = changed, actions.copy()
        return actions

    def report(self, memory: Memory, dones: BoolArray, infos: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Write into each ``info`` what was changed, and return the counts of the episodes that ended, the total last.

        Args:
            memory: of the step that was executed last.
            dones: ``(n_rows,)``, whether that step ended its episode.
            infos: what the environments said of it.
        """
        if memory.changed:
            self._count(memory, infos)
        else:
            for info in infos:
                info.update(self._untouched)
        if not any(now := dones.tolist()):
            memory.fresh = memory.going
            return []
        memory.fresh = np.array(now, dtype=bool)
        ended = [index for index, done in enumerate(now) if done]
        names = [*(part.name for part in self.sets), "total"]
        counts = [memory.counts[index] for index in ended]
        for index in ended:
            infos[index][EPISODE] = dict(zip(names, memory.counts[index], strict=True))
            memory.counts[index] = [0] * len(names)
        return counts

    def _count(self, memory: Memory, infos: Sequence[dict[str, Any]]) -> None:
        for row, info in enumerate(infos):
            which = tuple(index for index, rows in memory.changed.items() if rows[row])
            if not which:
                info.update(self._untouched)
                continue
            info.update(self._touched(which))
            counts = memory.counts[row]
            for index in (*which, -1):
                counts[index] += 1
                memory.seen[index] += 1

    def _touched(self, which: tuple[int, ...]) -> dict[str, float]:
        """Return what an ``info`` is told of a step whose action these sets changed; kept from call to call."""
        if which not in self._told:
            changed = {INTERVENTIONS, *(self.keys[index] for index in which)}
            self._told[which] = {key: float(key in changed) for key in self._untouched}
        return self._told[which]

    def tensors(self, memory: Memory) -> dict[str, Array]:
        """Return what an exact resume of the running episodes needs."""
        return {"fresh": memory.fresh, "counts": np.array(memory.counts), "previous": memory.previous}

    def load(self, memory: Memory, tensors: Mapping[str, Array]) -> bool:
        """Restore what `tensors` returned; False, and nothing is, if it is of other environments or sets."""
        counts = tensors.get("counts")
        if counts is None or counts.shape != np.shape(memory.counts):
            return False
        memory.counts = counts.tolist()
        memory.fresh, memory.previous = tensors["fresh"].astype(bool), tensors["previous"]
        return True


def _rows_that_differ(one: Array, other: Array) -> list[bool]:
    differs = one != other
    if len(differs) == 1:
        return [np.count_nonzero(differs) > 0]  # several times faster than any()
    rows: BoolArray = differs if differs.ndim == 1 else differs.reshape(len(differs), -1).any(axis=1)
    return rows.tolist()


def _safe_sets(guard: Guard, owner: str) -> Iterable[SafeSet]:
    for part in guard.action_sets:
        if not isinstance(part, SafeSet):
            raise AttachError(
                f"Action set '{part.name}' is a {type(part).__name__}, which says nothing of {owner}. Use one of "
                "guardrails_sb3, or a Projection."
            )
        yield part
