"""A guard from data: the way back from `describe`, with every problem named by its place."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from guardrails import plugins
from guardrails.competence.gate import Gate
from guardrails.competence.metric import CompetenceMetric
from guardrails.competence.require import Require
from guardrails.constraint import Constraint, Dial
from guardrails.errors import ConfigurationError, GuardrailsError
from guardrails.guard import Guard
from guardrails.policy.describe import SCHEDULERS, SCHEMA
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers.base import ConstraintScheduler

Place = tuple[str, ...]
T = TypeVar("T")

_NUMBER, _WHOLE, _TEXT, _FLAG = (int, float), (int,), (str,), (bool,)
_WORDS: dict[tuple[type, ...], str] = {
    _NUMBER: "a number",
    _WHOLE: "a whole number",
    _TEXT: "a text in quotes",
    _FLAG: "true or false",
}
_BETWEEN = {"gate": _TEXT, "tight": _NUMBER, "loose": _NUMBER, "scale": _TEXT}
_GATE = {
    "confidence": _NUMBER,
    "rungs": _WHOLE,
    "dwell": _WHOLE,
    "interval": _WHOLE,
    "fall": _TEXT,
    "run_length": _NUMBER,
    "window": _WHOLE,
    "budget_seconds": _NUMBER,
}


class PolicyError(ConfigurationError):
    """Something in a policy cannot be used.

    Args:
        place: the keys that lead to it.
        problem: cause and cure.
    """

    def __init__(self, place: Place, problem: str) -> None:
        super().__init__(f"{'.'.join(place)}: {problem}" if place else problem)
        self.place, self.problem = place, problem


class Recorded(CompetenceMetric):
    """Stands for a metric whose evidence was recorded; it measures nothing itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def measure(self, rollout: Rollout) -> FloatArray:
        """Refuse: a replay decides on what was measured then."""
        raise TypeError(f"the metric '{self.name}' is only a record of what was measured")


@dataclass(frozen=True)
class Builder:
    """Builds a guard from what `describe` returned, or what a file like it holds.

    Args:
        imports: whether functions and classes may be imported that the data names as ``module:name``.
        replay: build only what decides on recorded evidence: no costs and no metrics.
    """

    imports: bool = False
    replay: bool = False

    def guard(self, data: Any) -> Guard:
        """Return the guard.

        Raises:
            PolicyError: naming the first place at which something cannot be used.
        """
        table = _table((), data)
        if self.replay and table.get("incomplete"):
            _fail(("incomplete",), f"what the schedulers were made with is not known: {table['incomplete']}.")
        _known((), table, ("schema", "constraints", "dials", "gates"))
        schema = table.get("schema", SCHEMA)
        if type(schema) is not int or schema < 1:
            _fail(("schema",), f"it is {schema!r}; give a whole number, {SCHEMA}.")
        if schema > SCHEMA:
            _fail(("schema",), f"this version reads up to {SCHEMA}, not {schema}. Upgrade training-guardrails.")
        gates = {name: self._gate(("gates", name), entry) for name, entry in _named(table, "gates")}
        used: set[str] = set()
        parts: list[Constraint | Dial] = [
            self._constraint(("constraints", name), name, entry, gates, used)
            for name, entry in _named(table, "constraints")
        ]
        for name, entry in _named(table, "dials"):
            place = ("dials", name)
            value = self._between(place, entry, gates, used)
            parts.append(_made(place, entry, partial(Dial, name, value)))
        for name in gates:
            if name not in used:
                _fail(("gates", name), "no limit and no dial follows this gate. Let one name it, or remove the gate.")
        return _made((), {}, lambda: Guard(*parts))

    def _constraint(self, place: Place, name: str, entry: Any, gates: Mapping[str, Gate], used: set[str]) -> Constraint:
        table = _table(place, entry)
        _known(place, table, ("limit", "sense", "scale", "cost", "scheduler"))
        if "limit" not in table:
            _fail(place, "a constraint needs a limit.")
        arguments: dict[str, Any] = {}
        for key, types in (("sense", _TEXT), ("scale", _NUMBER)):
            if key in table:
                arguments[key] = _typed((*place, key), table[key], types)
        limit, where = table["limit"], (*place, "limit")
        arguments["limit"] = (
            self._between(where, limit, gates, used) if isinstance(limit, Mapping) else _typed(where, limit, _NUMBER)
        )
        if "cost" in table and not self.replay:
            arguments["cost"] = self._value((*place, "cost"), table["cost"])
        if "scheduler" in table:
            arguments["scheduler"] = self._scheduler((*place, "scheduler"), table["scheduler"])
        return _made(place, table, lambda: Constraint(name, **arguments))

    def _between(self, place: Place, entry: Any, gates: Mapping[str, Gate], used: set[str]) -> Any:
        table = _checked(place, entry, _BETWEEN, needed=("gate", "tight", "loose"))
        name = table["gate"]
        if name not in gates:
            _fail((*place, "gate"), f"there is no gate '{name}'.{_near(name, gates)} Define [gates.{name}].")
        used.add(name)
        arguments = {key: value for key, value in table.items() if key != "gate"}
        return _made(place, table, lambda: gates[name].between(**arguments))

    def _gate(self, place: Place, entry: Any) -> Gate:
        table = _table(place, entry)
        given = {key: value for key, value in table.items() if key != "requires"}
        _known(place, table, (*_GATE, "requires"))
        arguments = _checked(place, given, _GATE)
        entries = table.get("requires")
        if not isinstance(entries, list) or not entries:
            _fail((*place, "requires"), f"give [[{'.'.join(place)}.requires]] with a metric and at_least.")
        requires = [self._require((*place, "requires", str(i)), each) for i, each in enumerate(entries)]
        return _made(place, table, lambda: Gate(*requires, name=place[-1], **arguments))

    def _require(self, place: Place, entry: Any) -> Require:
        table = _table(place, entry)
        _known(place, table, ("metric", "at_least", "audit", "name", "parameters"))
        types = {"metric": _TEXT, "at_least": _NUMBER, "audit": _FLAG, "name": _TEXT}
        flat = {key: value for key, value in table.items() if key != "parameters"}
        checked = _checked(place, flat, types, needed=("metric", "at_least"))
        named = checked["metric"]
        metric: CompetenceMetric
        if self.replay:
            metric = Recorded(checked.get("name", named))
        else:
            parameters = _table((*place, "parameters"), table.get("parameters", {}))
            where = (*place, "metric")
            kind = self._imported(where, named) if ":" in named else _found(where, plugins.metric_type, named)
            metric = self._call((*place, "parameters"), where, kind, parameters)
            if metric.name != checked.get("name", metric.name):
                _fail((*place, "name"), f"the metric calls itself '{metric.name}', not '{checked['name']}'.")
        at_least, audit = checked["at_least"], checked.get("audit", False)
        return _made(place, table, lambda: Require(metric, at_least=at_least, audit=audit))

    def _scheduler(self, place: Place, entry: Any) -> ConstraintScheduler[Any]:
        table = {"name": entry} if isinstance(entry, str) else _table(place, entry)
        if "name" not in table:
            _fail(place, "a scheduler needs a name, such as name = 'pid'.")
        where = place if isinstance(entry, str) else (*place, "name")
        name = _typed(where, table["name"], _TEXT)
        kind: Any = SCHEDULERS.get(name)
        if kind is None:
            kind = self._imported(where, name) if ":" in name else _found(where, plugins.scheduler, name)
        arguments = {key: value for key, value in table.items() if key != "name"}
        made = self._call(place, where, kind, arguments)
        if not isinstance(made, ConstraintScheduler):
            _fail(where, f"{name} is no scheduler.")
        return made

    def _call(self, place: Place, where: Place, kind: Any, table: Mapping[str, Any]) -> Any:
        if not callable(kind):
            _fail(where, f"{kind!r} is no class.")
        parameters = inspect.signature(kind).parameters
        _known(place, table, parameters)
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in table:
                _fail(place, f"{kind.__name__} needs {name} = ....")
        arguments = {name: self._value((*place, name), value) for name, value in table.items()}
        return _made(place if table else where, table, lambda: kind(**arguments))

    def _value(self, place: Place, value: Any) -> Any:
        """Return a value as an argument: tables with a ``function`` or a scheduler's ``name`` are what they name."""
        if isinstance(value, list):
            return [self._value((*place, str(i)), item) for i, item in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if "function" in value:
            _known(place, value, ("function",))
            return self._imported((*place, "function"), _typed((*place, "function"), value["function"], _TEXT))
        return self._scheduler(place, value)

    def _imported(self, place: Place, address: str) -> Any:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", address):
            _fail(place, f"{address!r} is no address of the form 'module:name' of something at the top of a module.")
        if not self.imports:
            _fail(
                place, f"'{address}' is to be imported, which runs the code of that module. Pass allow_imports=True, "
                "or on the command line --allow-imports, if you trust this file.",
            )  # fmt: skip
        module, _, path = address.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for name in path.split("."):
                found = getattr(found, name)
        except Exception as error:
            _fail(place, f"'{address}' cannot be imported: {type(error).__name__}: {error}.")
        return found


def _found(place: Place, find: Callable[[str], T], name: str) -> T:
    return _made(place, {}, lambda: find(name))


def _made(place: Place, table: Mapping[str, Any], make: Callable[[], T]) -> T:
    """Return what ``make`` returns; an error is placed at the key that its message names, if it names one."""
    try:
        return make()
    except PolicyError:
        raise
    except (GuardrailsError, TypeError, ValueError) as error:
        named = [key for key in table if re.search(rf"\b{re.escape(key)}\b", str(error))]
        raise PolicyError((*place, *named[:1]), str(error)) from error


def _fail(place: Place, problem: str) -> NoReturn:
    raise PolicyError(place, problem)


def _table(place: Place, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _fail(place, f"it is {value!r}; a table is needed.")
    return value


def _named(table: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    return _table((key,), table.get(key, {})).items()


def _checked(
    place: Place, value: Any, types: Mapping[str, tuple[type, ...]], *, needed: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    table = _table(place, value)
    _known(place, table, types)
    for key in needed:
        if key not in table:
            _fail(place, f"{key} is missing.")
    for key, item in table.items():
        _typed((*place, key), item, types[key])
    return table


def _typed(place: Place, value: Any, types: tuple[type, ...]) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and types is not _FLAG):
        _fail(place, f"it is {value!r}; {_WORDS[types]} is needed.")
    return value


def _known(place: Place, table: Mapping[str, Any], known: Iterable[str]) -> None:
    names = list(known)
    for key in table:
        if key not in names:
            _fail((*place, key), f"there is no key '{key}' here.{_near(key, names)} Keys: {', '.join(names)}.")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
