"""The saved state of a guard, read back: all of it is checked before any of it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from guardrails.constraint import Constraint
from guardrails.errors import StateError

SCHEMA = 1
"""Version of what `Guard.state_dict` writes."""


class Controlled(NamedTuple):
    """What was saved of a constraint.

    Args:
        strength: λ in force.
        raised: what of λ was added in the stead of a scheduler that failed.
        state: of the scheduler.
    """

    strength: float
    raised: float
    state: Any


def parse(constraints: Mapping[str, Constraint], data: Mapping[str, Any]) -> tuple[int, dict[str, Controlled]]:
    """Return the step, and by constraint what `Guard.state_dict` wrote.

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
    found: dict[str, Controlled] = {}
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
        strength = _number(name, "multiplier", entry["multiplier"])
        raised = _number(name, "raised", entry.get("raised", 0.0))
        found[name] = Controlled(strength, raised, part.controller.load(entry["state"]))
    return step, found


def _number(name: str, key: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= sys.float_info.max:
        raise StateError(f"The saved {key} of constraint '{name}' is {value!r:.60}; it must be finite and ≥ 0.")
    return float(value)


def _same_names(own: Iterable[str], saved: Iterable[str]) -> None:
    missing, foreign = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or foreign:
        raise StateError(
            f"The saved state is of another guard: constraints not in it: {missing or 'none'}; constraints only in it: "
            f"{foreign or 'none'}. Build the guard with the constraints the run was saved with."
        )
