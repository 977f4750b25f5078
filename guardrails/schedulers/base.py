"""The scheduler protocol: a pure pair ``init`` and ``update`` over a small immutable state.

A scheduler turns the violation of a constraint into the strength with which the host enforces it.
It never holds mutable state of its own, so the same scheduler object may serve many constraints.
"""

from __future__ import annotations

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from guardrails.errors import ConfigurationError, StateError, stable
from guardrails.rollout import FloatArray
from guardrails.schedulers.rows import LARGEST, in_range, spread, stack, unstack

S = TypeVar("S", bound=tuple[Any, ...])


class ConstraintScheduler(ABC, Generic[S]):
    """How strength follows violation.

    The violation is dimensionless: ``v = (J - d) / scale`` with mean cost J, limit d and the
    constraint's violation scale, positive when violated. With the default scale, the limit itself,
    and costs that are never negative, v ≥ -1. The strength is the multiplier λ ≥ 0 that the host
    applies to the cost.

    A subclass sets ``state_type`` to a ``NamedTuple`` of floats (or tuples of floats) that has a
    field ``multiplier``, and writes `init` and `update`. Both must be pure: same input, same output.
    One whose state keeps something else, such as ln λ, overrides `strength` and `track` as well.
    `guardrails.testing.SchedulerContract` checks what is promised here.

    Attributes:
        state_type: the ``NamedTuple`` of the state.
        schema: version of what `dump` writes; raise it when the fields change their meaning.
        monotone: whether, from the same state, a larger violation never gives a smaller strength.
        two_sided: whether it can hold a cost at a target (``sense="=="``), not only bound it.
        relative: whether it needs a limit above 0, because it works on the ratio J / d.

    Example:
        >>> from typing import NamedTuple
        >>> class On(NamedTuple):
        ...     multiplier: float
        >>> class Switch(ConstraintScheduler[On]):
        ...     state_type = On
        ...
        ...     def init(self):
        ...         return On(0.0)
        ...
        ...     def update(self, state, violation):
        ...         return On(float(violation > 0.0)), float(violation > 0.0)
        >>> Switch().update(Switch().init(), 0.3)
        (On(multiplier=1.0), 1.0)
    """

    state_type: ClassVar[type[Any]]
    schema: ClassVar[int] = 1
    monotone: bool = True
    two_sided: bool = False
    relative: bool = False

    @abstractmethod
    def init(self) -> S:
        """Return the state before the first update."""

    @abstractmethod
    def update(self, state: S, violation: float) -> tuple[S, float]:
        """Return the next state and the strength λ ≥ 0 for a finite, scaled ``violation``."""

    def strength(self, state: S) -> float:
        """Return the strength in force in ``state``, before any further update."""
        return float(state.multiplier)  # type: ignore[attr-defined]

    def track(self, before: S, after: S, strength: float) -> S:
        """Return ``after`` as it should be, given that ``strength`` was applied in place of its own.

        Wrappers that alter a strength call this, so that what a scheduler accumulates does not run
        away from what the host was told. The default suits every scheduler whose next strength starts
        from the field ``multiplier``. With ``strength`` equal to ``after``'s own, nothing changes.

        Args:
            before: the state the update started from.
            after: the state it returned.
            strength: λ ≥ 0 that the host applies.
        """
        return after._replace(multiplier=strength)  # type: ignore[attr-defined, no-any-return]

    def penalty(self, state: S, violation: Any) -> Any:
        """Return the term that a loss host adds to its loss: λ v.

        Args:
            state: the state in force.
            violation: the scaled violation as a float or as a differentiable tensor of any library.
        """
        return self.strength(state) * violation

    def init_many(self, n: int) -> S:
        """Return the states of ``n`` constraints as one state whose floats are ``(n,)`` float64 arrays.

        All rows are updated together from then on, with `update_many`. To save them, `dump` each row
        of `unstack`; `stack` the rows that `load` returns.

        Raises:
            ConfigurationError: if ``n`` is not a positive whole number.
        """
        rows = whole_number(type(self).__name__, "n", n)
        states: S = spread(self.init(), rows)
        return states

    def update_many(self, states: S, violations: FloatArray) -> tuple[S, FloatArray]:
        """Update many constraints; equal to `update` row by row.

        Args:
            states: what `init_many` or `update_many` returned.
            violations: ``(n,)`` float64, scaled and finite.

        Raises:
            RolloutError: if a violation is NaN or infinite.
        """
        rows = unstack(states)
        results = [self.update(row, float(v)) for row, v in zip(rows, in_range(violations, len(rows)), strict=True)]
        return stack([state for state, _ in results]), np.array([strength for _, strength in results])

    def track_many(self, before: S, after: S, strengths: FloatArray) -> S:
        """Apply `track` row by row."""
        rows = zip(unstack(before), unstack(after), strengths, strict=True)
        states: S = stack([self.track(was, now, float(strength)) for was, now, strength in rows])
        return states

    def dump(self, state: S) -> dict[str, Any]:
        """Return ``state`` as JSON data, with the scheduler's name and schema."""
        fields = state._asdict().items()  # type: ignore[attr-defined]
        return {
            "scheduler": type(self).__name__,
            "schema": self.schema,
            **{name: self._dump_field(name, value) for name, value in fields},
        }

    def load(self, data: Mapping[str, Any]) -> S:
        """Return the state that `dump` wrote.

        Raises:
            StateError: if it is another scheduler's state, is newer than this version, or has
                fields that are missing, foreign or not finite numbers.
        """
        own = type(self).__name__
        if not isinstance(data, Mapping) or "scheduler" not in data:
            raise StateError(f"This is not the state of a scheduler: {data!r:.200}. Pass what {own}.dump returned.")
        if data["scheduler"] != own:
            raise StateError(
                f"This state was saved by {data['scheduler']}, not {own}. "
                f"Configure the constraint with {data['scheduler']} to resume that run."
            )
        schema = data.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise StateError(f"The saved state of {own} is damaged: its schema is {schema!r}.")
        if schema > self.schema:
            raise StateError(
                f"This state of {own} has schema {schema}; this version reads up to {self.schema}. "
                "Upgrade the package that brings this scheduler to load it."
            )
        fields, saved = self.state_type._fields, set(data) - {"scheduler", "schema"}
        if saved != set(fields):
            raise StateError(
                f"The saved state of {own} has fields {sorted(saved)}, expected {sorted(fields)}: "
                "it was written by another version or is damaged."
            )
        state: S = self.state_type(**{name: self._load_field(name, data[name]) for name in fields})
        if self.strength(state) < 0.0:
            raise StateError(f"The saved multiplier of {own} is {self.strength(state)!r}; it must be ≥ 0.")
        return state

    def _dump_field(self, name: str, value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    def _load_field(self, name: str, value: Any) -> Any:
        if isinstance(value, list) and isinstance(getattr(self.init(), name), tuple):
            return tuple(_finite(name, item) for item in value)
        return _finite(name, value)

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def problem_of(before: Any, after: Any, strength: Any) -> str:
    """Return what is wrong with the state and the strength that an update from ``before`` returned; empty if sound."""
    if not isinstance(after, type(before)):
        return f"returned {stable(repr(after)):.100} instead of a {type(before).__name__}"
    if not (math.isfinite(strength) and strength >= 0.0):
        return f"returned a strength of {stable(repr(strength))}"
    if not _all_finite(after):
        return f"returned {stable(repr(after)):.100}, a state whose numbers are not all finite"
    return ""


def _all_finite(state: Any) -> bool:
    """Whether a number is finite, or all those in a state are; a strength need not show it, as max(0.0, nan) is 0."""
    if isinstance(state, tuple):
        return all(map(_all_finite, state))
    return not isinstance(state, (float, np.floating)) or math.isfinite(state)


def _finite(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if number and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass
    raise StateError(f"Field '{name}' of a saved scheduler state is {value!r:.60}; a finite number is needed.")


def check_number(
    owner: str,
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> float:
    """Return ``value`` as float if it is a finite number in [low, high] (or (low, high] if ``open_low``).

    Raises:
        ConfigurationError: otherwise, naming owner, argument, value and the allowed range.
    """
    if isinstance(value, np.generic):
        value = value.item()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max or value < low or value > high or (open_low and value == low):
        left = f"({low:g}" if open_low or low == -math.inf else f"[{low:g}"
        shown = f"{high:g}"  # an end that is rounded up here, such as 1 - 1e-12, does not belong to the range
        right = f"{shown}]" if math.isfinite(high) and float(shown) <= high else f"{shown})"
        raise ConfigurationError(f"{owner}: {name} is {value!r:.60}; give a finite number in {left}, {right}.")
    return float(value)


def check_gain(owner: str, name: str, value: float, *, positive: bool = False) -> float:
    """Return ``value`` if it is a gain: a number in [0, `LARGEST`], above 0 if ``positive``."""
    return check_number(owner, name, value, low=0.0, high=LARGEST, open_low=positive)


def check_share(owner: str, name: str, value: float) -> float:
    """Return ``value`` if it is a smoothing factor: a number in [0, 1), where 0 means none."""
    return check_number(owner, name, value, low=0.0, high=1.0 - 1e-12)


def whole_number(owner: str, name: str, value: int, *, low: int = 1) -> int:
    """Return ``value`` if it is a whole number in [``low``, `LARGEST`]; a fraction is refused, not rounded."""
    number = check_number(owner, name, value, low=low, high=LARGEST)
    if number != int(number):
        raise ConfigurationError(f"{owner}: {name} is {value!r}; give a whole number.")
    return int(number)
