"""The parts of a guard, sorted by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guardrails.action_set import ActionSet
from guardrails.competence import gates as gating
from guardrails.competence.between import Between
from guardrails.competence.gate import Gate
from guardrails.constraint import Constraint, Dial
from guardrails.errors import ConfigurationError
from guardrails.refinement import Refinement

Part = Constraint | Dial | Refinement | ActionSet


@dataclass(frozen=True)
class Parts:
    """What a guard was given, and what follows from it; see `sort`.

    Args:
        constraints: all of them, by name, with limits that move as `Between`.
        dials: the values of all dials, by name.
        action_sets: in the order given.
        refinement: the only one, or None.
        steering: names of what turns the refinement's weight.
        widths: names of the dials that are widths of action sets.
        gates: all that something follows, by name.
    """

    constraints: Mapping[str, Constraint]
    dials: Mapping[str, Between]
    action_sets: tuple[ActionSet, ...]
    refinement: Refinement | None
    steering: frozenset[str]
    widths: frozenset[str]
    gates: Mapping[str, Gate]


def sort(parts: Sequence[Part]) -> Parts:
    """Return the parts by kind, with those that others bring along.

    Raises:
        ConfigurationError: if there is no part, a part of an unknown kind, two of one name, or two refinements.
    """
    if not parts:
        raise ConfigurationError("Guard() guards nothing. Give at least one Constraint.")
    for part in parts:
        if not isinstance(part, (Constraint, Dial, Refinement, ActionSet)):
            raise ConfigurationError(f"Guard takes Constraint, Dial, Refinement and ActionSet objects, not {part!r}.")
    refinement = _only([part for part in parts if isinstance(part, Refinement)])
    action_sets = tuple(part for part in parts if isinstance(part, ActionSet))
    steering = [] if refinement is None else refinement.turned
    widths = [dial for part in action_sets for dial in part.turned]
    everything = [*parts, *steering, *widths]
    constraints = {part.name: part for part in everything if isinstance(part, Constraint)}
    dials = {part.name: part.value for part in everything if isinstance(part, Dial)}
    gates = gating.collect([*(part.limit for part in constraints.values()), *dials.values()])
    _all_differ([*(part.name for part in everything), *gates])
    steered, wide = frozenset(part.name for part in steering), frozenset(part.name for part in widths)
    return Parts(constraints, dials, action_sets, refinement, steered, wide, gates)


def _only(refinements: list[Refinement]) -> Refinement | None:
    if len(refinements) > 1:
        raise ConfigurationError(
            f"This guard has {len(refinements)} refinements; a completion has one correction. Give one Refinement, "
            "whose refiner does all there is to do."
        )
    return refinements[0] if refinements else None


def _all_differ(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"Two parts of the guard are named '{name}'. Give each constraint, dial, gate and refinement a name of "
                "its own."
            )
