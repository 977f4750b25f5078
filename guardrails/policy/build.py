"""A guard from data: the way back from `describe`, with every problem named by its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from guardrails import plugins
from guardrails.action_set import ActionSet
from guardrails.competence.gate import Gate
from guardrails.competence.metric import CompetenceMetric
from guardrails.competence.require import Require
from guardrails.constraint import Constraint, Dial
from guardrails.guard import Guard
from guardrails.policy.checks import (
    FLAG,
    NUMBER,
    TEXT,
    WHOLE,
    Place,
    as_table,
    as_type,
    entries,
    fail,
    fields,
    found,
    made,
    near,
    only_keys,
)
from guardrails.policy.describe import SCHEMA
from guardrails.policy.maker import Maker
from guardrails.refine import Acceptance, Refiner, Text
from guardrails.refinement import Refinement
from guardrails.rollout import FloatArray, Rollout

T = TypeVar("T")

_BETWEEN = {"gate": TEXT, "tight": NUMBER, "loose": NUMBER, "scale": TEXT}
_GATE = {
    "confidence": NUMBER,
    "rungs": WHOLE,
    "dwell": WHOLE,
    "interval": WHOLE,
    "fall": TEXT,
    "run_length": NUMBER,
    "window": WHOLE,
    "budget_seconds": NUMBER,
}


class Recorded(CompetenceMetric):
    """Stands for a metric whose evidence was recorded; it measures nothing itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def measure(self, rollout: Rollout) -> FloatArray:
        """Refuse: a replay decides on what was measured then."""
        raise TypeError(f"the metric '{self.name}' is only a record of what was measured")


class RecordedSet(ActionSet):
    """Stands for an action set that was in force; what turned with it is among the dials."""

    @property
    def widths(self) -> Mapping[str, float]:
        """None."""
        return {}


class RecordedRefiner(Refiner):
    """Stands for a refiner whose work was recorded; it corrects nothing itself."""

    def refine(self, prompts: Sequence[Text], completions: Sequence[str]) -> list[str | None]:
        """Refuse: a replay decides on what was measured then."""
        raise TypeError("this refiner is only a record of what was done")


@dataclass(frozen=True)
class Builder(Maker):
    """Builds a guard from what `describe` returned, or what a file like it holds.

    Args:
        imports: whether functions and classes may be imported that the data names as ``module:name``.
        replay: build only what decides on recorded evidence: no costs, no metrics, no refiner.
    """

    replay: bool = False

    def guard(self, data: Any) -> Guard:
        """Return the guard.

        Raises:
            PolicyError: naming the first place at which something cannot be used.
        """
        table = as_table((), data)
        if self.replay and table.get("incomplete"):
            fail(("incomplete",), f"what the schedulers were made with is not known: {table['incomplete']}.")
        only_keys((), table, ("schema", "constraints", "dials", "gates", "action_sets", "refinement"))
        schema = table.get("schema", SCHEMA)
        if type(schema) is not int or schema < 1:
            fail(("schema",), f"it is {schema!r}; give a whole number, {SCHEMA}.")
        if schema > SCHEMA:
            fail(("schema",), f"this version reads up to {SCHEMA}, not {schema}. Upgrade training-guardrails.")
        gates = {name: self._gate(("gates", name), entry) for name, entry in entries(table, "gates")}
        used: set[str] = set()
        constraints = {
            name: self._constraint(("constraints", name), name, entry, gates, used)
            for name, entry in entries(table, "constraints")
        }
        refinement = None
        if "refinement" in table:
            refinement = self._refinement(("refinement",), table["refinement"], constraints, gates, used)
        if "action_sets" in table and not self.replay:
            fail(("action_sets",), "action sets belong to a host's adapter; give them to the guard in code.")
        parts: list[Constraint | Dial | Refinement | ActionSet] = [
            part for part in constraints.values() if refinement is None or part is not refinement.weight
        ]
        for name, entry in entries(table, "dials"):
            place = ("dials", name)
            value = self._between(place, entry, gates, used)
            parts.append(made(place, entry, partial(Dial, name, value)))
        parts += [
            made(("action_sets", name), {}, partial(RecordedSet, name)) for name, _ in entries(table, "action_sets")
        ]
        if refinement is not None:
            parts.append(refinement)
        for name in gates:
            if name not in used:
                fail(("gates", name), "no limit and no dial follows this gate. Let one name it, or remove the gate.")
        return made((), {}, lambda: Guard(*parts))

    def _constraint(self, place: Place, name: str, entry: Any, gates: Mapping[str, Gate], used: set[str]) -> Constraint:
        table = as_table(place, entry)
        only_keys(place, table, ("limit", "sense", "scale", "cost", "scheduler"))
        if "limit" not in table:
            fail(place, "a constraint needs a limit.")
        arguments: dict[str, Any] = {}
        for key, types in (("sense", TEXT), ("scale", NUMBER)):
            if key in table:
                arguments[key] = as_type((*place, key), table[key], types)
        limit, where = table["limit"], (*place, "limit")
        arguments["limit"] = (
            self._between(where, limit, gates, used) if isinstance(limit, Mapping) else as_type(where, limit, NUMBER)
        )
        if "cost" in table and not self.replay:
            arguments["cost"] = self.value((*place, "cost"), table["cost"])
        if "scheduler" in table:
            arguments["scheduler"] = self.scheduler((*place, "scheduler"), table["scheduler"])
        return made(place, table, lambda: Constraint(name, **arguments))

    def _refinement(
        self,
        place: Place,
        entry: Any,
        constraints: Mapping[str, Constraint],
        gates: Mapping[str, Gate],
        used: set[str],
    ) -> Refinement:
        table = as_table(place, entry)
        only_keys(place, table, ("name", "refiner", "weight", "when", "accept", "changed_only"))
        if "refiner" not in table:
            fail(place, "a refinement needs a refiner, such as refiner = 'model'.")
        arguments: dict[str, Any] = {}
        for key, types in (("name", TEXT), ("changed_only", FLAG)):
            if key in table:
                arguments[key] = as_type((*place, key), table[key], types)
        if "weight" in table:
            arguments["weight"] = self._weight((*place, "weight"), table["weight"], constraints, gates, used)
        if self.replay:
            return made(place, table, lambda: Refinement(RecordedRefiner(), **arguments))
        where = (*place, "refiner")
        arguments["refiner"] = self.refiner(where, table["refiner"])
        if "when" in table:
            arguments["when"] = self.detector((*place, "when"), table["when"])
        if "accept" in table:
            arguments["accept"] = self._acceptance((*place, "accept"), table["accept"])
        return made(place, table, lambda: Refinement(**arguments))

    def _weight(
        self,
        place: Place,
        entry: Any,
        constraints: Mapping[str, Constraint],
        gates: Mapping[str, Gate],
        used: set[str],
    ) -> Any:
        if not isinstance(entry, Mapping):
            return as_type(place, entry, NUMBER)
        if "constraint" not in entry:
            return self._between(place, entry, gates, used)
        name = fields(place, entry, {"constraint": TEXT})["constraint"]
        if name not in constraints:
            where = (*place, "constraint")
            fail(where, f"there is no constraint '{name}'.{near(name, constraints)} Define [constraints.{name}].")
        return constraints[name]

    def _acceptance(self, place: Place, entry: Any) -> Acceptance:
        table = as_table(place, entry)
        only_keys(place, table, ("similarity", "sound", "reward", "check"))
        arguments: dict[str, Any] = {}
        for key, types in (("similarity", NUMBER), ("reward", FLAG)):
            if key in table:
                arguments[key] = as_type((*place, key), table[key], types)
        if "sound" in table:  # TOML has no null; false is no detector at all
            sound = table["sound"]
            arguments["sound"] = None if sound is False else self.detector((*place, "sound"), sound)
        if "check" in table:
            arguments["check"] = self.value((*place, "check"), table["check"])
        return made(place, table, lambda: Acceptance(**arguments))

    def _between(self, place: Place, entry: Any, gates: Mapping[str, Gate], used: set[str]) -> Any:
        table = fields(place, entry, _BETWEEN, needed=("gate", "tight", "loose"))
        name = table["gate"]
        if name not in gates:
            fail((*place, "gate"), f"there is no gate '{name}'.{near(name, gates)} Define [gates.{name}].")
        used.add(name)
        arguments = {key: value for key, value in table.items() if key != "gate"}
        return made(place, table, lambda: gates[name].between(**arguments))

    def _gate(self, place: Place, entry: Any) -> Gate:
        table = as_table(place, entry)
        given = {key: value for key, value in table.items() if key != "requires"}
        only_keys(place, table, (*_GATE, "requires"))
        arguments = fields(place, given, _GATE)
        entries = table.get("requires")
        if not isinstance(entries, list) or not entries:
            fail((*place, "requires"), f"give [[{'.'.join(place)}.requires]] with a metric and at_least.")
        requires = [self._require((*place, "requires", str(i)), each) for i, each in enumerate(entries)]
        return made(place, table, lambda: Gate(*requires, name=place[-1], **arguments))

    def _require(self, place: Place, entry: Any) -> Require:
        table = as_table(place, entry)
        only_keys(place, table, ("metric", "at_least", "audit", "name", "parameters"))
        types = {"metric": TEXT, "at_least": NUMBER, "audit": FLAG, "name": TEXT}
        flat = {key: value for key, value in table.items() if key != "parameters"}
        checked = fields(place, flat, types, needed=("metric", "at_least"))
        named = checked["metric"]
        metric: CompetenceMetric
        if self.replay:
            metric = Recorded(checked.get("name", named))
        else:
            parameters = as_table((*place, "parameters"), table.get("parameters", {}))
            where = (*place, "metric")
            kind = self.imported(where, named) if ":" in named else found(where, plugins.metric_type, named)
            metric = self.call((*place, "parameters"), where, kind, parameters)
            if metric.name != checked.get("name", metric.name):
                fail((*place, "name"), f"the metric calls itself '{metric.name}', not '{checked['name']}'.")
        at_least, audit = checked["at_least"], checked.get("audit", False)
        return made(place, table, lambda: Require(metric, at_least=at_least, audit=audit))
