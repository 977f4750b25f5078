"""From limits per episode to the units of a discounted critic.

A cost of d per episode of T steps, spread evenly, is d / T per step, and its discounted sum over the
episode is h = d (1 - γᵀ) / ((1 - γ) T).
"""

from __future__ import annotations

import math

from guardrails.schedulers.base import check_number, whole_number


def critic_unit(horizon: int, gamma: float) -> float:
    """Return (1 - γᵀ) / ((1 - γ) T): the discounted cost-to-go that a cost of 1 per episode comes to; 1 for γ = 1.

    Args:
        horizon: T ≥ 1, steps of an episode.
        gamma: discount γ in (0, 1].

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> round(critic_unit(1000, 0.99), 6)
        0.099996
    """
    steps = whole_number("critic_unit", "horizon", horizon)
    gamma = check_number("critic_unit", "gamma", gamma, low=0.0, high=1.0, open_low=True)
    if gamma == 1.0:
        return 1.0
    return -math.expm1(steps * math.log(gamma)) / ((1.0 - gamma) * steps)


def critic_limit(limit: float, horizon: int, gamma: float) -> float:
    """Return h = d (1 - γᵀ) / ((1 - γ) T), a limit per episode in the units of a discounted critic.

    Args:
        limit: d, cost per episode.
        horizon: T ≥ 1, steps of an episode.
        gamma: discount γ in (0, 1].

    Example:
        >>> round(critic_limit(25.0, 1000, 0.99), 4)
        2.4999
    """
    return limit * critic_unit(horizon, gamma)
