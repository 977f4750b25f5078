"""Projection: a set that a user's own function projects onto."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from guardrails import RolloutError
from guardrails.competence import Between
from guardrails_sb3.action_sets.base import Array, SafeSet, Situation, row


class Projection(SafeSet):
    """A(s) = {a: project(a, s) = a}, with a function that maps any action to the nearest safe one.

    The function is called for each environment at each step; what it returns is clipped to the action space.
    One that raises, or returns something else than a finite action, stops the run: the action it was given is
    not known to be safe.

    Args:
        function: ``(action, observation) -> action``, or ``(action, observation, width) -> action`` where ``width``
            is given; the observation as the environment gives it. Idempotent, or the set is not one.
        width: what the gate moves, such as a distance to keep: a number ≥ 0, or ``gate.between(tight, loose)``.
        name: what logs and errors call it.

    Raises:
        ConfigurationError: if ``function`` is none, or ``width`` is out of range.

    Example:
        >>> slow_near_wall = Projection(lambda action, observation: np.minimum(action, observation[0]))
        >>> slow_near_wall.name
        'projection'
    """

    observes = True

    def __init__(
        self, function: Callable[..., Any], *, width: float | Between | None = None, name: str = "projection"
    ) -> None:
        super().__init__(name)
        self.must_call("function", function)
        self.function, self.width = function, self.ends("width", width)

    @property
    def widths(self) -> Mapping[str, float | Between]:
        """The width, if there is one."""
        return {} if self.width is None else {"width": self.width}

    def check(self, space: spaces.Space[Any]) -> None:
        """Accept any space whose actions are arrays of numbers."""

    def project(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Array:
        """Return what the function makes of each action, within the action space."""
        observations, width = situation.observations, tuple(widths.values())
        answers = [
            self.answer(self.function, action.copy(), row(observations, index), *width)
            for index, action in enumerate(actions)
        ]
        projected = self.actions(answers, actions[0])
        if situation.bounds is not None:
            return np.clip(projected, situation.bounds.low, situation.bounds.high)
        outside = [action for action in projected if not situation.space.contains(action)]
        if outside:
            raise RolloutError(f"{self.owner}: its function returned {outside[0]}, which is not in {situation.space}.")
        return projected
