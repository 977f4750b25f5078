"""What a step of a plain environment says in the ``info`` that vectorised environments make of it."""

from __future__ import annotations

from typing import Any

Step = tuple[Any, Any, bool, bool, dict[str, Any]]


def of_vector(step: Step) -> dict[str, Any]:
    """Return the ``info`` of a step as the vector environments of Stable-Baselines3 give it to cost functions.

    It says at each step whether a time limit cut the episode off, and at the last one with which observation it ended.

    Args:
        step: what ``step`` of an environment returned; it stays as it is.
    """
    observation, _, terminated, truncated, info = step
    ending = {"terminal_observation": observation} if terminated or truncated else {}
    return {**info, "TimeLimit.truncated": bool(truncated and not terminated), **ending}
