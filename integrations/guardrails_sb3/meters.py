"""CostMeters: on each rendered frame, what an episode has cost so far, and whether a set has changed the action."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from guardrails import AttachError, Constraint, Guard
from guardrails_sb3.action_sets.enforcement import INTERVENTIONS
from guardrails_sb3.costs import cost_reader
from guardrails_sb3.infos import of_vector

Frame = npt.NDArray[np.uint8]

BACKGROUND, WITHIN, BEYOND, LIMIT, CHANGED = (40, 40, 40), (60, 170, 90), (210, 60, 50), (255, 255, 255), (240, 170, 30)
"""Colours: of a bar's ground, of a cost within and beyond its limit, of the limit's mark, of a changed action."""


class CostMeters(gym.Wrapper[Any, Any, Any, Any]):
    """Draws a bar for each constraint at the lower edge of what ``render`` returns, for recorders of videos.

    A bar grows with the cost of the running episode; its mark is the limit in force, and its full width the limit and
    one violation scale, which by default is twice the limit. The frame of a step whose action a set has changed gets a
    border; put this around `SafeActions`, which says so in ``info``. Cost functions get each ``info`` as the vector
    environments of Stable-Baselines3 give it, for `terminated` to read.

    Args:
        env: rendered with ``render_mode="rgb_array"``.
        guard: has the constraints and the limits in force.

    Raises:
        AttachError: if the environment renders no arrays.

    Example:
        >>> env = CostMeters(gym.make("Hopper-v5", render_mode="rgb_array"), guard)  # doctest: +SKIP
        >>> env = gym.wrappers.RecordVideo(env, "videos")  # doctest: +SKIP
    """

    def __init__(self, env: gym.Env[Any, Any], guard: Guard) -> None:
        super().__init__(env)
        if env.render_mode != "rgb_array":
            raise AttachError(
                f"CostMeters draws onto frames, and this environment's render_mode is {env.render_mode!r}. Make it "
                "with render_mode='rgb_array'."
            )
        self._guard = guard
        self._readers = [cost_reader(part) for part in guard.constraints]
        self._costs = [0.0] * len(self._readers)
        self._changed = False

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset the environment and begin every bar anew."""
        self._costs, self._changed = [0.0] * len(self._readers), False
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment and add its costs."""
        outcome = self.env.step(action)
        info = of_vector(outcome)
        self._costs = [before + read(info) for before, read in zip(self._costs, self._readers, strict=True)]
        self._changed = bool(info.get(INTERVENTIONS, 0.0))
        return outcome

    def render(self) -> Any:
        """Return the environment's frame with the bars on it."""
        rendered: Any = self.env.render()
        frame: Frame = np.array(rendered, dtype=np.uint8)
        thickness = max(3, len(frame) // 40)
        if self._changed:
            for edge in (frame[:thickness], frame[-thickness:], frame[:, :thickness], frame[:, -thickness:]):
                edge[:] = CHANGED
        for place, (part, cost) in enumerate(zip(self._guard.constraints, self._costs, strict=True)):
            bottom = len(frame) - place * (thickness + 1)
            _draw(frame[bottom - thickness : bottom], part, cost)
        return frame


def _draw(bar: Frame, part: Constraint, cost: float) -> None:
    full, width = part.bound + part.violation_scale, bar.shape[1]
    share = min(max(cost / full, 0.0), 1.0) if np.isfinite(cost) else 1.0
    mark = round(part.bound / full * width)
    bar[:] = BACKGROUND
    bar[:, : round(share * width)] = WITHIN if part.violation(cost) <= 0.0 else BEYOND
    bar[:, max(mark - 1, 0) : mark + 1] = LIMIT
