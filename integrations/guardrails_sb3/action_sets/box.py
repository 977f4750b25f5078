"""ActionBox: a box about a centre, or about what a nominal controller would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from gymnasium import spaces

from guardrails import AttachError, ConfigurationError
from guardrails.competence import Between
from guardrails.schedulers.base import check_number
from guardrails_sb3.action_sets.base import Array, Bounds, Held, SafeSet, Situation, few, row

Nominal = Callable[[Any], Any]


class _Still(NamedTuple):
    """A box whose centre does not move: of which space and scale, and its ends, as arrays and as numbers."""

    bounds: Bounds
    scale: float
    low: Array
    high: Array
    lows: list[float]
    highs: list[float]


class ActionBox(SafeSet):
    """A(s) = {a in the action space: |a - c(s)| ≤ scale · (high - low) / 2, in each dimension}.

    An action outside is clipped to the nearest one inside. Unlike the dial ``action_scale``, which shrinks every
    action, what lies inside is left alone.

    Args:
        scale: share of the action space's half range, in [0, 1]; or ``gate.between(0.3, 1.0)``.
        centre: c: an action, or a function of one observation (as the environment gives it, before
            ``VecNormalize``) that returns the nominal action. Default: the centre of the action space.
        name: what logs and errors call it.

    Raises:
        ConfigurationError: if ``scale`` is out of range or narrows with competence, or ``centre`` holds no numbers.

    Example:
        >>> from guardrails import Guard
        >>> guard = Guard(ActionBox(0.3))
        >>> model = wrap(PPO("MlpPolicy", env), guard)  # doctest: +SKIP
    """

    def __init__(
        self,
        scale: float | Between,
        *,
        centre: Sequence[float] | Array | float | Nominal | None = None,
        name: str = "action_box",
    ) -> None:
        super().__init__(name)
        self.scale = self.opening(
            "scale", scale, lambda value: check_number(self.owner, "scale", value, low=0.0, high=1.0)
        )
        self.centre = centre
        self.observes = callable(centre)
        self._fixed: Array | None = None
        self._kept: _Still | None = None
        if centre is not None and not callable(centre):
            try:
                self._fixed = np.asarray(centre, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"{self.owner}: centre is {centre!r}; give an action or a function."
                ) from error

    @property
    def widths(self) -> Mapping[str, float | Between]:
        """The scale."""
        return {"scale": self.scale}

    def check(self, space: spaces.Space[Any]) -> None:
        """Raise AttachError unless the actions are bounded and the centre is one of them."""
        self.bounded(space)
        if self._fixed is not None:
            shape = space.shape or ()
            if self._fixed.shape not in ((), shape):
                raise AttachError(
                    f"{self.owner}: centre has shape {self._fixed.shape}, but an action here has shape {shape}."
                )
            if not space.contains(np.broadcast_to(self._fixed, shape).astype(space.dtype)):
                raise AttachError(f"{self.owner}: centre {self._fixed} is outside the action space {space}.")

    def project(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Array:
        """Return ``actions`` clipped to the box."""
        scale = widths["scale"]
        if scale == 1.0 and self.centre is None:
            return actions
        if self.observes:
            # Action and centre lie in the action space, so what lies between them does.
            reach, centre = scale * situation.box.half, self._centre(situation)
            low, high = centre - reach, centre + reach
        else:
            _, _, low, high, _, _ = self._still(situation, scale)
        projected: Array = np.minimum(np.maximum(actions, low), high)
        return projected

    def held(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Held | None:
        """Return ``actions`` clipped to a box that stands still."""
        if self.observes or not few(actions):
            return None
        box, rows = self._still(situation, widths["scale"]), actions.tolist()
        for action in rows:
            for value, low, high in zip(action, box.lows, box.highs, strict=True):
                if not low <= value <= high:
                    return _clipped(rows, box, actions.dtype)
        return actions, None

    def _still(self, situation: Situation, scale: float) -> _Still:
        """Return a box whose centre does not move, kept from the last call."""
        kept = self._kept
        if kept is None or kept.bounds is not situation.bounds or kept.scale != scale:
            bounds = situation.box
            centre = bounds.centre if self._fixed is None else self._fixed.astype(bounds.centre.dtype)
            reach = scale * bounds.half
            low, high = centre - reach, centre + reach
            self._kept = kept = _Still(bounds, scale, low, high, low.ravel().tolist(), high.ravel().tolist())
        return kept

    def _centre(self, situation: Situation) -> Array:
        bounds = situation.box
        function, observations = cast("Nominal", self.centre), situation.observations
        nominal = [self.answer(function, row(observations, index)) for index in range(situation.n_rows)]
        return np.clip(self.actions(nominal, bounds.centre), bounds.low, bounds.high)


def _clipped(rows: list[list[float]], box: _Still, dtype: Any) -> Held | None:
    """Return ``rows``, clipped in place, as an array, and whether each was changed; None if a number is not finite."""
    changed = []
    for action in rows:
        moved = False
        for at, (value, low, high) in enumerate(zip(action, box.lows, box.highs, strict=True)):
            if not low <= value <= high:
                if value - value != 0.0:  # infinite, or NaN
                    return None
                action[at], moved = low if value < low else high, True
        changed.append(moved)
    return np.array(rows, dtype=dtype), changed
