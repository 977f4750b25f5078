"""The saved state of a guard, read back: all of it is checked before any of it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from guardrails.constraint import Constraint
from guardrails.errors import StateError

SCHEMA = 1
"""Version of what `Guard.state_dict` writes."""


def parse(
    constraints: Mapping[str, Constraint], data: Mapping[str, Any]
) -> tuple[int, dict[str, float], dict[str, Any]]:
    """Return step, strengths and scheduler states that `Guard.state_dict` wrote for ``constraints``.

    Raises:
        StateError: if the state is newer than this package, belongs to other constraints or schedulers,
            or is damaged.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise StateError("This is not the state of a Guard: it has no schema version. Pass what state_dict() returned.")
    if schema > SCHEMA:
        raise StateError(
            f"This state has schema {schema}; this version of training-guardrails reads up to {SCHEMA}. "
            "Upgrade training-guardrails to load it."
        )
    step, saved = data.get("step"), data.get("constraints")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(saved, Mapping):
        raise StateError("This Guard state is damaged: 'step' or 'constraints' is missing or not valid.")
    _same_names(constraints, saved)
    strengths: dict[str, float] = {}
    states: dict[str, Any] = {}
    for name, part in constraints.items():
        entry, expected = saved[name], type(part.controller).__name__
        if not isinstance(entry, Mapping) or not {"scheduler", "multiplier", "state"} <= set(entry):
            raise StateError(
                f"The saved entry of constraint '{name}' is damaged: {json.dumps(entry, default=str)[:200]}"
            )
        if entry["scheduler"] != expected:
            raise StateError(
                f"Constraint '{name}' was saved with {entry['scheduler']}, but this guard uses {expected}. "
                f"Give the constraint scheduler={entry['scheduler']}(...) to resume that run."
            )
        multiplier = entry["multiplier"]
        number = isinstance(multiplier, (int, float)) and not isinstance(multiplier, bool)
        if not number or not 0.0 <= multiplier <= sys.float_info.max:
            raise StateError(
                f"The saved multiplier of constraint '{name}' is {multiplier!r:.60}; it must be finite and ≥ 0."
            )
        strengths[name] = float(multiplier)
        states[name] = part.controller.load(entry["state"])
    return step, strengths, states


def _same_names(own: Iterable[str], saved: Iterable[str]) -> None:
    missing, foreign = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or foreign:
        raise StateError(
            f"The saved state is of another guard: constraints not in it: {missing or 'none'}; constraints only in it: "
            f"{foreign or 'none'}. Build the guard with the constraints the run was saved with."
        )
