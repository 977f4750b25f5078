"""The scheduler protocol: a pure pair ``init`` and ``update`` over a small immutable state.

A scheduler turns the violation of a constraint into the strength with which the host enforces it.
It never holds mutable state of its own, so the same scheduler object may serve many constraints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from guardrails.errors import ConfigurationError, StateError

S = TypeVar("S", bound=tuple[Any, ...])


class ConstraintScheduler(ABC, Generic[S]):
    """How strength follows violation.

    The violation is dimensionless: ``v = (J - d) / scale`` with mean cost J, limit d and the
    constraint's violation scale, positive when violated. The strength is the multiplier λ ≥ 0 that
    the host applies to the cost.

    A subclass sets ``state_type`` to a ``NamedTuple`` of floats (or tuples of floats) that has a
    field ``multiplier``, and writes `init` and `update`. Both must be pure: same input, same output.
    """

    state_type: ClassVar[type[Any]]

    @abstractmethod
    def init(self) -> S:
        """Return the state before the first update."""

    @abstractmethod
    def update(self, state: S, violation: float) -> tuple[S, float]:
        """Return the next state and the strength λ ≥ 0 for a finite, scaled ``violation``."""

    def strength(self, state: S) -> float:
        """Return the strength in force in ``state``, before any further update."""
        return float(state.multiplier)  # type: ignore[attr-defined]

    def dump(self, state: S) -> dict[str, Any]:
        """Return ``state`` as JSON data."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in state._asdict().items()  # type: ignore[attr-defined]
        }

    def load(self, data: Mapping[str, Any]) -> S:
        """Return the state that `dump` wrote.

        Raises:
            StateError: if fields are missing, foreign or not finite numbers.
        """
        fields = self.state_type._fields
        if set(data) != set(fields):
            raise StateError(
                f"The saved state of {type(self).__name__} has fields {sorted(data)}, expected {sorted(fields)}: "
                "it was written by another scheduler or version. Configure the scheduler the run was saved with."
            )
        values = {
            name: tuple(map(_finite(name), value)) if isinstance(value, list) else _finite(name)(value)
            for name, value in data.items()
        }
        state: S = self.state_type(**values)
        return state

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def _finite(name: str) -> Any:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise StateError(f"Field '{name}' of a saved scheduler state is {value!r}; a finite number is needed.")
        return value

    return check


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
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < low or value > high or (open_low and value == low):
        left = f"({low:g}" if open_low or low == -math.inf else f"[{low:g}"
        right = f"{high:g})" if high == math.inf else f"{high:g}]"
        raise ConfigurationError(f"{owner}: {name} is {value!r}; give a finite number in {left}, {right}.")
    return float(value)
