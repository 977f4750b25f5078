"""The safety critic: a learned cost-to-go of states and actions, with the doubt of an ensemble as a margin."""

from __future__ import annotations

import importlib
from typing import Any

from guardrails.critic.ensemble import Ensemble
from guardrails.critic.horizon import critic_limit, critic_unit

_LATE = {"SafetyCritic": "guardrails.critic.safety", "Transitions": "guardrails.critic.transitions"}
"""Names of modules that need torch, imported when the name is first used."""

__all__ = [
    "Ensemble",
    "SafetyCritic",
    "Transitions",
    "critic_limit",
    "critic_unit",
]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
