"""The schedulers of a guard's constraints: their states, the strengths in force, and what holds when one fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from guardrails import saved
from guardrails.constraint import Constraint
from guardrails.errors import ConfigurationError, told
from guardrails.schedulers.base import problem_of


class Controllers:
    """A scheduler's state for each constraint, and λ ≥ 0, the strength it gives.

    A scheduler that raises, or returns what is no state of finite numbers and no strength, is not followed: λ is raised
    by the violation in its stead. What was added so stays when it works again, for as long as the constraint is
    violated, and fades by what it is then within its limit.

    Args:
        constraints: each has a name of its own.

    Raises:
        ConfigurationError: if a scheduler begins with a strength that is no number ≥ 0.
    """

    def __init__(self, constraints: Iterable[Constraint]) -> None:
        parts = tuple(constraints)
        self._states: dict[str, Any] = {part.name: part.controller.init() for part in parts}
        self._strengths = {part.name: _initial(part, self._states[part.name]) for part in parts}
        self._raised = {part.name: 0.0 for part in parts}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: dictionaries of its own, since `update` writes into them."""
        return {name: dict(value) for name, value in vars(self).items()}

    @property
    def strengths(self) -> Mapping[str, float]:
        """λ of each constraint, before any dial."""
        return self._strengths

    def update(self, part: Constraint, violation: float) -> str:
        """Advance the scheduler of a constraint by a scaled violation.

        Returns:
            How it failed and what was done instead; empty if it did not.
        """
        name, controller = part.name, part.controller
        state = self._states[name]
        try:
            after, strength = controller.update(state, violation)
            problem = problem_of(state, after, strength)
        except Exception as error:
            problem = f"raised {told(error)}"
        if problem:
            self._raised[name] += max(0.0, violation)
            self._strengths[name] += max(0.0, violation)
            return f"{type(controller).__name__} {problem}; λ held or raised by the violation instead"
        self._states[name], self._strengths[name] = after, float(strength)
        if self._raised[name]:
            self._raised[name] = max(0.0, self._raised[name] + min(0.0, violation))
            self._strengths[name] += self._raised[name]
        return ""

    def penalty(self, part: Constraint, violation: Any) -> Any:
        """Return the loss term of a scaled violation, whose slope is λ where a scheduler's own is its strength."""
        term = part.controller.penalty(self._states[part.name], violation)
        raised = self._raised[part.name]
        return term + raised * violation if raised else term

    def dump(self, part: Constraint) -> dict[str, Any]:
        """Return the state of a constraint's scheduler as JSON data."""
        raised = self._raised[part.name]
        return {
            "scheduler": type(part.controller).__name__,
            "multiplier": self._strengths[part.name],
            "state": part.controller.dump(self._states[part.name]),
            **({"raised": raised} if raised else {}),
        }

    def load(self, found: Mapping[str, saved.Controlled]) -> None:
        """Take up what `saved.parse` found."""
        self._states = {name: each.state for name, each in found.items()}
        self._strengths = {name: each.strength for name, each in found.items()}
        self._raised = {name: each.raised for name, each in found.items()}


def _initial(part: Constraint, state: Any) -> float:
    strength = part.controller.strength(state)
    try:
        if math.isfinite(strength) and strength >= 0.0:
            return float(strength)
    except TypeError:
        pass
    raise ConfigurationError(
        f"Constraint '{part.name}': its scheduler {part.controller!r} begins with a strength of {strength!r}; a "
        "multiplier is a finite number, at least 0. A scheduler that keeps something else in its state, such as ln λ, "
        "overrides strength()."
    )
