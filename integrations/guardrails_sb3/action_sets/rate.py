"""RateLimit: how far an action may move away from the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from guardrails import AttachError
from guardrails.competence import Between
from guardrails.schedulers.base import check_number
from guardrails_sb3.action_sets.base import Array, Held, SafeSet, Situation, columns, few


class RateLimit(SafeSet):
    """A(s_t, a_{t-1}) = {a: |a - a_{t-1}| ≤ max_change, in each dimension}, with a_{t-1} the action executed before.

    The first action of an episode is free. Not to be taken for the scheduler of that name, which limits a multiplier.

    Args:
        max_change: per step, in the actions' own unit, > 0; ``gate.between(0.1, 0.5)``; or a number for each
            dimension, which does not move.
        name: what logs and errors call it.

    Raises:
        ConfigurationError: if ``max_change`` is out of range or narrows with competence.

    Example:
        >>> RateLimit(0.1).widths
        {'max_change': 0.1}
    """

    remembers = True

    def __init__(self, max_change: float | Between | Sequence[float], *, name: str = "rate_limit") -> None:
        super().__init__(name)
        self.max_change = max_change
        self._each: Array | None = None
        self._width: float | Between | None = None
        self._kept: tuple[float | None, Any, int, list[float]] | None = None
        if isinstance(max_change, (Sequence, np.ndarray)):
            self._each = np.array([self._positive(float(value)) for value in max_change])
        else:
            self._width = self.opening("max_change", max_change, self._positive)

    def _positive(self, value: float) -> float:
        return check_number(self.owner, "max_change", value, low=0.0, open_low=True)

    @property
    def widths(self) -> Mapping[str, float | Between]:
        """The largest change, unless each dimension has its own."""
        return {} if self._width is None else {"max_change": self._width}

    def check(self, space: spaces.Space[Any]) -> None:
        """Raise AttachError unless the actions are continuous, with as many dimensions as there are limits."""
        if not isinstance(space, spaces.Box):
            raise AttachError(f"{self.owner} needs continuous actions, but this model acts in {space}.")
        if self._each is not None and self._each.shape != space.shape:
            raise AttachError(f"{self.owner} has {self._each.size} limits, but an action here has shape {space.shape}.")

    def project(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Array:
        """Return ``actions`` cut to within the largest change of those before."""
        change = widths["max_change"] if self._each is None else self._each.astype(actions.dtype)
        limited: Array = np.minimum(np.maximum(actions, situation.previous - change), situation.previous + change)
        if np.count_nonzero(situation.fresh):  # several times faster than any()
            limited = np.where(columns(situation.fresh, actions), actions, limited)
        return limited

    def held(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Held | None:
        """Return ``actions`` if none is found to have changed by more, which a first action may as well."""
        if not few(actions):
            return None
        limits = self._limits(actions, widths)
        for row, before in zip(actions.tolist(), situation.previous.tolist(), strict=True):
            for value, last, limit in zip(row, before, limits, strict=True):
                if not -limit <= value - last <= limit:  # NaN is not, either
                    return None
        return actions, None

    def _limits(self, actions: Array, widths: Mapping[str, float]) -> list[float]:
        """Return the limit of each dimension, as ``actions`` round it, kept from the last call."""
        width, n_dimensions = widths["max_change"] if self._each is None else None, actions.shape[1]
        if self._kept is None or self._kept[:3] != (width, actions.dtype, n_dimensions):
            each = np.full(n_dimensions, width) if self._each is None else self._each
            self._kept = width, actions.dtype, n_dimensions, each.astype(actions.dtype).tolist()
        return self._kept[3]
