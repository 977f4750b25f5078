"""Ask one plug-in what it lists, and keep what is sound.

Each plug-in gets a pluggy manager of its own: it can neither stop another plug-in nor wrap its hooks.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pluggy

from guardrails.plugins import hookspecs
from guardrails.plugins.found import Found, Offer, Source, describe
from guardrails.plugins.hookspecs import HOOKS, PROJECT, Kind
from guardrails.schedulers import ConstraintScheduler

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)+")


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what ``call`` returns and why it failed: one of the two is empty.

    Third-party code may raise more than `Exception` (``sys.exit`` at import, a panic of an extension
    module); only the user's Ctrl-C passes.
    """
    try:
        return call(), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, describe(error)


def load(source: Source, get: Callable[[], object]) -> tuple[list[Offer], list[Found]]:
    """Import a plug-in with ``get`` and return what it lists and what was wrong with it."""
    plugin, error = attempt(get)
    if error:
        return [], [source.failed(error)]
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    _, error = attempt(lambda: manager.register(plugin, source.plugin))
    error = error or _hook_problem(manager, plugin)
    if error:
        return [], [source.failed(error)]
    offers: list[Offer] = []
    failures: list[Found] = []
    for kind, hook in HOOKS.items():
        caller = getattr(manager.hook, hook)
        if not caller.get_hookimpls():
            continue
        results, error = attempt(caller)
        if error:
            failures.append(source.failed(f"{hook}() raised {error}", kind))
        elif not results or not isinstance(results[0], (list, tuple)):
            returned = type(results[0]).__name__ if results else "None"
            failures.append(source.failed(f"{hook}() returned {returned}; return a list of {kind}s", kind))
        else:
            for value in results[0]:
                _, error = attempt(partial(_add, source, kind, value, offers, failures))
                if error:  # what it lists cannot even be looked at
                    failures.append(source.failed(error, kind, type(value).__name__))
    return offers, failures


def _hook_problem(manager: pluggy.PluginManager, plugin: object) -> str:
    """Return what is wrong with the hooks that ``plugin`` implements, if anything."""
    callers = manager.get_hookcallers(plugin) or []
    known = sorted(HOOKS.values())
    for caller in callers:
        if caller.name not in known:
            close = difflib.get_close_matches(caller.name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Hooks: {', '.join(known)}."
            return f"it implements '{caller.name}', which is no hook. {hint}"
    if not callers:
        return f"it implements no hook. Mark its functions with @guardrails.hookimpl; hooks: {', '.join(known)}."
    return ""


def _add(source: Source, kind: Kind, value: object, offers: list[Offer], failures: list[Found]) -> None:
    name, error = attempt(lambda: getattr(value, "name", None))
    label = name if isinstance(name, str) else getattr(value, "__qualname__", type(value).__name__)
    error = error or _object_problem(kind, value) or _name_problem(name)
    if error:
        failures.append(source.failed(error, kind, str(label)))
    else:
        offers.append(Offer(source, kind, name, value))


def _object_problem(kind: Kind, value: object) -> str:
    base = _base(kind)
    if kind in ("refiner", "detector") and not isinstance(value, type):
        if isinstance(value, base):
            return f"it is an instance of {type(value).__name__}; list the class itself"
        return "" if callable(value) else f"it is {value!r}; list a class or a function"
    if not isinstance(value, type) or not issubclass(value, base):
        return f"it is no subclass of {base.__name__}; list the class itself"
    if inspect.isabstract(value):
        missing = ", ".join(sorted(getattr(value, "__abstractmethods__", ())))
        return f"it is abstract; write its methods {missing}"
    return ""


def _base(kind: Kind) -> type:
    if kind == "metric":
        from guardrails.competence import CompetenceMetric

        return CompetenceMetric
    if kind == "scheduler":
        return ConstraintScheduler
    from guardrails.refine import Detector, Refiner

    return Refiner if kind == "refiner" else Detector


def _name_problem(name: object) -> str:
    if not isinstance(name, str):
        return f"its name is {name!r}; set a class attribute name = '<vendor>.<name>'"
    if not _NAME.fullmatch(name):
        return (
            f"the name {name!r} is not of the form '<vendor>.<name>' in lower-case letters, digits, '_' and '-': "
            "names without a vendor are for what guardrails itself brings"
        )
    if name.startswith(f"{PROJECT}."):
        return f"the vendor '{PROJECT}' is for what guardrails itself brings; use your own"
    return ""
