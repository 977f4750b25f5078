"""What a ledger's header says of a run: versions, plug-ins, configuration and the state it starts from."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import guardrails
from guardrails import policy
from guardrails.ledger.lines import SCHEMA

if TYPE_CHECKING:
    from guardrails.guard import Guard

_PACKAGES = {
    "numpy": "numpy",
    "torch": "torch",
    "transformers": "transformers",
    "trl": "trl",
    "peft": "peft",
    "stable_baselines3": "stable-baselines3",
    "sb3_contrib": "sb3-contrib",
    "gymnasium": "gymnasium",
    "rapidfuzz": "rapidfuzz",
    "openai": "openai",
}
"""Module to distribution of what may shape a run; only those that the process has loaded are listed."""


def start(guard: Guard, seed: int | None) -> dict[str, Any]:
    """Return the fields of a header of ``guard`` as it is now."""
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "host": guard.host,
        "seed": seed,
        "plugins": policy.foreign_parts(guard),
        "policy": policy.describe(guard, strict=False),
        "state": guard.state_dict(),
    }


def environment() -> dict[str, str]:
    """Return name to version of Python, the machine and the packages in use."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.node(),
        "training-guardrails": guardrails.__version__,
    }
    for module, distribution in _PACKAGES.items():
        if module in sys.modules:
            try:
                found[distribution] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                found[distribution] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found
