"""One set of equations for one constraint and for thousands: written once, run on floats or on arrays."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from guardrails.errors import GuardrailsError, RolloutError
from guardrails.rollout import FloatArray
from guardrails.schedulers.base import ConstraintScheduler, S, problem_of
from guardrails.schedulers.rows import LARGEST, in_range, unstack


@dataclass(frozen=True, slots=True)
class Ops:
    """The operations that floats and arrays do not share as operators.

    Args:
        clip: ``clip(x, low, high)``; a negative zero comes out as zero.
        where: ``where(condition, a, b)``.
        exp: eˣ.
        cos: cosine.
        sqrt: square root.
        any: whether a condition holds in some row.
        update: ``update(scheduler, state, violation)``, for a scheduler inside another, whose failure it tells.
        track: ``track(scheduler, before, after, strength)``, likewise.
        strength: ``strength(scheduler, state)``, the strength in force of a scheduler inside another.
    """

    clip: Callable[[Any, Any, Any], Any]
    where: Callable[[Any, Any, Any], Any]
    exp: Callable[[Any], Any]
    cos: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    any: Callable[[Any], bool]
    update: Callable[[ConstraintScheduler[Any], Any, Any], tuple[Any, Any]]
    track: Callable[[ConstraintScheduler[Any], Any, Any, Any], Any]
    strength: Callable[[ConstraintScheduler[Any], Any], Any]


def _clip(x: float, low: float, high: float) -> float:
    raised = low if x < low else x
    return (high if raised > high else raised) + 0.0


def _clip_many(x: Any, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high) + 0.0


def _update(scheduler: ConstraintScheduler[Any], state: Any, violation: float) -> tuple[Any, float]:
    after, strength = scheduler.update(state, violation)
    problem = problem_of(state, after, strength)
    if problem:
        raise GuardrailsError(f"{type(scheduler).__name__} {problem}")
    return after, strength


def _update_many(scheduler: ConstraintScheduler[Any], states: Any, violations: Any) -> tuple[Any, Any]:
    after, strengths = scheduler.update_many(states, violations)
    if not (np.isfinite(strengths) & (strengths >= 0.0)).all():
        raise GuardrailsError(f"{type(scheduler).__name__} returned strengths of {strengths!r:.100}")
    return after, strengths


def _strength_many(scheduler: ConstraintScheduler[Any], states: Any) -> Any:
    if type(scheduler).strength is ConstraintScheduler.strength:
        return states.multiplier
    return np.array([scheduler.strength(row) for row in unstack(states)])


# numpy's exp and cos serve floats too: the C library's round differently in the last bit.
SCALAR = Ops(
    clip=_clip,
    where=lambda condition, a, b: a if condition else b,
    exp=lambda x: float(np.exp(x)),
    cos=lambda x: float(np.cos(x)),
    sqrt=math.sqrt,
    any=bool,
    update=_update,
    track=lambda scheduler, before, after, strength: scheduler.track(before, after, strength),
    strength=lambda scheduler, state: scheduler.strength(state),
)

ARRAY = Ops(
    clip=_clip_many,
    where=np.where,
    exp=np.exp,
    cos=np.cos,
    sqrt=np.sqrt,
    any=lambda condition: bool(np.any(condition)),
    update=_update_many,
    track=lambda scheduler, before, after, strengths: scheduler.track_many(before, after, strengths),
    strength=_strength_many,
)


class ElementwiseScheduler(ConstraintScheduler[S]):
    """A scheduler whose equations are written once, in `advance`, and run on floats or on arrays.

    The arithmetic is the same in both, so 1,000 constraints updated in one call get, bit for bit,
    the multipliers that 1,000 calls would give.
    """

    @abstractmethod
    def advance(self, state: S, violation: Any, ops: Ops) -> S:
        """Return the next state, whose field ``multiplier`` is the strength.

        Args:
            state: a state of floats, or of ``(n,)`` arrays.
            violation: a float, or ``(n,)`` float64; within ±`LARGEST`.
            ops: what to use in place of ``min``, ``max``, ``if`` and ``math``.
        """

    def advance_tracking(self, before: S, after: S, strength: Any, ops: Ops) -> S:
        """Return ``after``, corrected for ``strength`` having been applied; see `track`."""
        return after._replace(multiplier=strength)  # type: ignore[attr-defined, no-any-return]

    def update(self, state: S, violation: float) -> tuple[S, float]:
        """Advance by one measurement.

        Raises:
            RolloutError: if ``violation`` is NaN or infinite.
        """
        if not -LARGEST <= violation <= LARGEST:
            violation = _bounded(violation)
        after = self.advance(state, float(violation), SCALAR)
        return after, after.multiplier  # type: ignore[attr-defined]

    def update_many(self, states: S, violations: FloatArray) -> tuple[S, FloatArray]:
        """Advance many constraints by one measurement each; see `ConstraintScheduler.update_many`."""
        after = self.advance(states, in_range(violations, len(states.multiplier)), ARRAY)  # type: ignore[attr-defined]
        return after, after.multiplier  # type: ignore[attr-defined]

    def track(self, before: S, after: S, strength: float) -> S:
        """Return ``after``, corrected for ``strength`` having been applied."""
        return self.advance_tracking(before, after, strength, SCALAR)

    def track_many(self, before: S, after: S, strengths: FloatArray) -> S:
        """Apply `track` to every row."""
        return self.advance_tracking(before, after, strengths, ARRAY)


def held(before: Any, after: Any, strength: Any, own: Any, ops: Ops) -> Any:
    """Return what an accumulator becomes when ``strength`` was applied in place of ``own``.

    Conditional integration: an accumulator does not move further in the direction in which its output
    is already limited, and moves freely in the other.
    """
    below, above = ops.clip(after, -LARGEST, before), ops.clip(after, before, LARGEST)
    return ops.where(strength < own, below, ops.where(strength > own, above, after))


def _bounded(violation: float) -> float:
    if not math.isfinite(violation):
        raise RolloutError(f"The violation is {violation!r}. Sanitise costs with Constraint.measure first.")
    return math.copysign(LARGEST, violation)
