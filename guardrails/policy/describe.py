"""A guard's configuration as data: names, numbers and lists, of which TOML and JSON can be made."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from guardrails import plugins
from guardrails.action_set import ActionSet
from guardrails.competence import BUILTIN as METRICS
from guardrails.competence.between import Between
from guardrails.competence.gate import Gate
from guardrails.constraint import Constraint, Dial
from guardrails.errors import ConfigurationError, PluginError
from guardrails.plugins.hookspecs import Kind
from guardrails.refine import Acceptance, AllOf, AnyOf, Detector, FunctionRefiner, Not, Predicate, Refiner
from guardrails.refinement import Refinement
from guardrails.schedulers import BUILTIN, WRAPPERS
from guardrails.schedulers.base import ConstraintScheduler

if TYPE_CHECKING:
    from guardrails.guard import Guard

SCHEMA = 1
"""Version of the layout that `describe` returns."""

SCHEDULERS = {**BUILTIN, **WRAPPERS}

_FIND: dict[Kind, Callable[[str], Any]] = {
    "metric": plugins.metric_type,
    "scheduler": plugins.scheduler,
    "refiner": plugins.refiner,
    "detector": plugins.detector,
}


def describe(guard: Guard, *, strict: bool = True) -> dict[str, Any]:
    """Return the configuration of ``guard``; what it lacks of an argument's default is left out.

    Args:
        guard: the guard.
        strict: raise for what cannot be written; else write it in words, and list under ``"incomplete"`` what
            is missing of the schedulers, which decide.

    Raises:
        ConfigurationError: if ``strict`` and a function, a scheduler or a metric cannot be written as data.
    """
    problems: list[str] = []
    missing: list[str] = []
    refinement = guard.refinement
    turned = [] if refinement is None else refinement.turned
    constraints = [part for part in (*guard.parts, *turned) if isinstance(part, Constraint)]
    dials = [part for part in guard.parts if isinstance(part, Dial)]
    for part in guard.action_sets:  # a replay needs what turns with them; what they do is the host's
        dials += part.turned
        problems.append(f"action set '{part.name}' belongs to a host's adapter; give it to the guard in code")
    weights = [part.value for part in turned if isinstance(part, Dial)]
    moving = [part.limit for part in constraints] + [part.value for part in dials] + weights
    gates = {value.gate.name: value.gate for value in moving if isinstance(value, Between)}
    data = {
        "schema": SCHEMA,
        "constraints": {part.name: _constraint(part, problems, missing) for part in constraints},
        "dials": {part.name: _between(part.value) for part in dials},
        "gates": {name: _gate(gate, problems) for name, gate in gates.items()},
        "action_sets": {part.name: _action_set(part) for part in guard.action_sets},
        "refinement": {} if refinement is None else _refinement(refinement, problems),
    }
    if strict and (problems or missing):
        raise ConfigurationError(f"This guard cannot be written as a file: {'; '.join(problems + missing)}.")
    data = {name: value for name, value in data.items() if value != {}}
    return data | ({"incomplete": missing} if missing else {})


def _constraint(part: Constraint, problems: list[str], missing: list[str]) -> dict[str, Any]:
    owner = f"constraint '{part.name}'"
    data: dict[str, Any] = {"limit": _between(part.limit) if isinstance(part.limit, Between) else part.limit}
    if part.sense != "<=":
        data["sense"] = part.sense
    if part.scale is not None:
        data["scale"] = part.scale
    if part.cost is not None:
        data["cost"] = _value(owner, part.cost, problems)
    return data | {"scheduler": _scheduler(owner, part.controller, missing)}


def _action_set(part: ActionSet) -> dict[str, Any]:
    """Return what a record says of a set: its class, and widths."""
    widths = part.widths.items()
    given = {name: _between(value) if isinstance(value, Between) else value for name, value in widths}
    return {"set": address(type(part)), **given}


def _refinement(part: Refinement, problems: list[str]) -> dict[str, Any]:
    owner = f"refinement '{part.name}'"
    data: dict[str, Any] = {"name": part.name} if part.name != "refinement" else {}
    data["refiner"] = _named(owner, part.corrects, plugins.refiner, problems)
    if isinstance(part.weight, Constraint):
        data["weight"] = {"constraint": part.weight.name}
    else:
        data["weight"] = _between(part.weight) if isinstance(part.weight, Between) else part.weight
    data["when"] = _detector(owner, part.detects, problems)
    data["accept"] = _acceptance(owner, part.accept, problems)
    return data | ({"changed_only": True} if part.changed_only else {})


def _acceptance(owner: str, accept: Acceptance, problems: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {"similarity": accept.similarity}
    data["sound"] = False if accept.sound is None else _detector(owner, accept.sound, problems)
    if accept.reward:
        data["reward"] = True
    return data | ({} if accept.check is None else {"check": _value(f"{owner}.check", accept.check, problems)})


def _detector(owner: str, detector: Detector, problems: list[str]) -> Any:
    if isinstance(detector, (AnyOf, AllOf)):
        return {detector.name: [_detector(owner, part, problems) for part in detector.parts]}
    if isinstance(detector, Not):
        return {"not": _detector(owner, detector.part, problems)}
    return _named(owner, detector, plugins.detector, problems)


def _named(owner: str, thing: Refiner | Detector, find: Callable[[str], Any], problems: list[str]) -> Any:
    """Return the name of a refiner or detector, with its arguments if it has any."""
    if isinstance(thing, (FunctionRefiner, Predicate)):
        listed = _registered(thing.function, find, {})
        if ":" not in listed:
            return listed
    kind = type(thing)
    name, arguments = _class(owner, kind, find, {}, problems), _arguments(f"{owner}: {kind.__name__}", thing, problems)
    return arguments | {"name": name} if arguments else name


def _between(value: Between) -> dict[str, Any]:
    data: dict[str, Any] = {"gate": value.gate.name, "tight": value.tight, "loose": value.loose}
    return data | ({"scale": value.scale} if value.scale != "linear" else {})


def _gate(gate: Gate, problems: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "confidence": gate.confidence,
        "rungs": gate.rungs,
        "dwell": gate.dwell,
        "interval": gate.interval,
        "fall": gate.fall,
        "run_length": gate.breaks.run_length,
        "window": gate.breaks.window,
    }
    if gate.budget_seconds is not None:
        data["budget_seconds"] = gate.budget_seconds
    requires = []
    for each in gate.requires:
        owner = f"metric '{each.name}'"
        named = _class(owner, type(each.measured), plugins.metric_type, METRICS, problems)
        entry: dict[str, Any] = {"metric": named, "at_least": each.at_least}
        if each.audit:
            entry["audit"] = True
        if named != each.name:
            entry["name"] = each.name
        parameters = _arguments(owner, each.measured, problems)
        requires.append(entry | ({"parameters": parameters} if parameters else {}))
    return data | {"requires": requires}


def _scheduler(owner: str, scheduler: ConstraintScheduler[Any], problems: list[str]) -> dict[str, Any]:
    kind = type(scheduler)
    arguments = _arguments(f"{owner}: {kind.__name__}", scheduler, problems)
    if "name" in arguments:
        problems.append(f"{owner}: {kind.__name__} has an argument called 'name', which here is the scheduler's own")
    return arguments | {"name": _class(owner, kind, plugins.scheduler, SCHEDULERS, problems)}


def _class(owner: str, kind: type[Any], find: Callable[[str], Any], builtin: Any, problems: list[str]) -> str:
    """Return what `_registered` returns; a class of no registered name must stand at the top of a module."""
    named = _registered(kind, find, builtin)
    if "<" in named:
        problems.append(f"{owner} is of the class {named}, which cannot be imported; define it at the top of a module")
    return named


def _registered(kind: Any, find: Callable[[str], Any], builtin: Any) -> str:
    """Return the name under which ``kind`` is looked up, or ``module:class`` where it has none."""
    for name, own in builtin.items():
        if own is kind:
            return str(name)
    return str(kind.name) if _listed(kind, find) else address(kind)


def _listed(thing: Any, find: Callable[[str], Any]) -> bool:
    """Whether a class or function is what is looked up by the name that it bears."""
    name = getattr(thing, "name", None)
    try:
        return isinstance(name, str) and find(name) is thing
    except PluginError:
        return False  # it is used without being listed by a plug-in


def address(thing: Any) -> str:
    """Return ``module:name`` of a class or function."""
    owner = getattr(thing, "__objclass__", None)  # a method of a built-in type, such as str.islower, has no module
    module = getattr(thing, "__module__", None) or getattr(owner, "__module__", "?")
    return f"{module}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _stands_at(named: str, thing: Any) -> bool:
    """Whether an address leads to ``thing`` itself: that of an object's method leads to the function in its class."""
    module, _, path = named.partition(":")
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is thing or (inspect.ismethod(thing) and found == thing)


def _arguments(owner: str, thing: Any, problems: list[str]) -> dict[str, Any]:
    """Return the constructor's arguments of ``thing``, read off its attributes of the same names."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(thing)).parameters.items():
        value = getattr(thing, name, parameter.empty)
        own_method = inspect.ismethod(value) and value.__self__ is thing
        if (
            parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            or value is parameter.empty
            or own_method
        ):
            problems.append(f"{owner} keeps no attribute '{name}', so its argument of that name is unknown")
            continue
        if value is None and parameter.default is None:
            continue
        write = _table if takes_table(parameter) and isinstance(value, Mapping) else _value
        arguments[name] = write(f"{owner}.{name}", value, problems)
    return arguments


def takes_table(parameter: inspect.Parameter) -> bool:
    """Whether an argument is declared as a mapping first of all, which stands in a file as a table of plain values."""
    return re.match(r"(?:typing\.|collections\.abc\.)?(?:Mapping|dict)\[", str(parameter.annotation)) is not None


def _table(owner: str, value: Any, problems: list[str]) -> Any:
    """Return plain values as data: texts, numbers, and lists and mappings of them."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _table(f"{owner}.{key}", item, problems) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_table(owner, item, problems) for item in value]
    if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    problems.append(f"{owner} is {value!r}, which is neither a number nor a text")
    return repr(value)


def _value(owner: str, value: Any, problems: list[str]) -> Any:
    """Return ``value`` as data; a function is a table with its address, a scheduler or detector one with its name."""
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, ConstraintScheduler):
        return _scheduler(owner, value, problems)
    if isinstance(value, Detector):
        return {"detector": _detector(owner, value, problems)}
    if isinstance(value, (list, tuple)):
        return [_value(owner, item, problems) for item in value]
    if isinstance(value, (set, frozenset)):
        items = [_value(owner, item, problems) for item in value]
        alike = all(isinstance(item, str) for item in items) or all(isinstance(item, (int, float)) for item in items)
        return sorted(items, key=None if alike else repr)  # functions have no order of their own
    if not callable(value):
        problems.append(f"{owner} is {value!r}, which is neither a number, a text nor a function")
        return repr(value)
    named = address(value)
    if not _stands_at(named, value):
        problems.append(f"{owner} is the function {named}, which cannot be imported; define it at the top of a module")
    return {"function": named}


def foreign_parts(guard: Guard) -> list[dict[str, str]]:
    """Return the parts of ``guard`` that others wrote, with the distribution that brought each."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for kind, thing, name in _things(guard):
        module = str(getattr(thing, "__module__", type(thing).__module__))
        if module.split(".")[0] != "guardrails":
            distribution, version = _origin(kind, thing, module)
            found[kind, name] = {"kind": kind, "name": name, "distribution": distribution, "version": version}
    return list(found.values())


def _things(guard: Guard) -> list[tuple[Kind, Any, str]]:
    """Return kind, class or function, and name of each part that somebody wrote."""
    things: list[tuple[Kind, Any, str]] = []
    gates: dict[str, Gate] = {}
    steering = [] if guard.refinement is None else guard.refinement.turned
    widths = [dial for each in guard.action_sets for dial in each.turned]
    for part in [part for part in (*guard.parts, *steering, *widths) if isinstance(part, (Constraint, Dial))]:
        value = part.limit if isinstance(part, Constraint) else part.value
        if isinstance(value, Between):
            gates[value.gate.name] = value.gate
        scheduler = part.controller if isinstance(part, Constraint) else None
        while scheduler is not None:
            own = type(scheduler)
            things.append(("scheduler", own, _registered(own, plugins.scheduler, SCHEDULERS)))
            scheduler = getattr(scheduler, "scheduler", None)
    metrics = [each.measured for gate in gates.values() for each in gate.requires]
    things += [("metric", type(metric), metric.name) for metric in metrics]
    if guard.refinement is not None:
        things.append(("refiner", *_written(guard.refinement.corrects, plugins.refiner)))
        things += _detectors(guard.refinement.detects) + _detectors(guard.refinement.accept.sound)
    return things


def _detectors(detector: Any) -> list[tuple[Kind, Any, str]]:
    """Return a detector, or those that it combines."""
    if isinstance(detector, (AnyOf, AllOf)):
        return [each for part in detector.parts for each in _detectors(part)]
    if isinstance(detector, Not):
        return _detectors(detector.part)
    return [] if detector is None else [("detector", *_written(detector, plugins.detector))]


def _written(thing: Any, find: Callable[[str], Any]) -> tuple[Any, str]:
    """Return what somebody wrote, a class or function, and its name."""
    own = thing.function if isinstance(thing, (FunctionRefiner, Predicate)) else type(thing)
    return own, _registered(own, find, {})


def _origin(kind: Kind, thing: Any, module: str) -> tuple[str, str]:
    """Return name and version of the distribution that lists a class or function, or else that has its module."""
    if _listed(thing, _FIND[kind]):
        for record in plugins.found():
            if record.kind == kind and thing.name in record.names and record.distribution:
                return record.distribution, record.version
    for distribution in metadata.packages_distributions().get(module.split(".")[0], []):
        return distribution, metadata.version(distribution)
    return "", ""
