"""What a guard decided, in the host's own logger."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stable_baselines3.common.logger import Logger

from guardrails import Decision

_CONSOLE_KEY = 33
"""Longest key below ``guardrails/`` that the host's console writer prints whole. It cuts longer ones, and fails
where two become the same; they are left to its other writers."""


def record(logger: Logger, decision: Decision, further: Mapping[str, float]) -> None:
    """Record the metrics of ``decision`` and ``further`` ones, see `record_all`."""
    record_all(logger, {**decision.metrics(), **further})


def record_all(logger: Logger, metrics: Mapping[str, float]) -> None:
    """Record ``metrics`` below ``guardrails/``; what is not finite is left out."""
    for key, value in metrics.items():
        if math.isfinite(value):
            hidden = ("stdout", "log") if len(key) > _CONSOLE_KEY else None
            logger.record(f"guardrails/{key}", value, exclude=hidden)
