"""What a policy names, made: schedulers, refiners, detectors, functions."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from guardrails import plugins
from guardrails.errors import told
from guardrails.policy.checks import TEXT, Place, as_table, as_type, fail, found, made, only_keys
from guardrails.policy.describe import SCHEDULERS, takes_table
from guardrails.refine import AllOf, AnyOf, Detector, FunctionRefiner, Not, Predicate, Refiner
from guardrails.schedulers.base import ConstraintScheduler


@dataclass(frozen=True)
class Maker:
    """Makes the things that stand in a policy by name, with the arguments beside it.

    Args:
        imports: whether functions and classes may be imported that the data names as ``module:name``.
    """

    imports: bool = False

    def _named(
        self, place: Place, entry: Any, find: Callable[[str], Any], base: Any, wrap: Callable[[Any], Any]
    ) -> Any:
        """Return the instance of ``base`` of a name, or of a table with ``name`` and its arguments."""
        table = {"name": entry} if isinstance(entry, str) else as_table(place, entry)
        if "name" not in table:
            fail(place, f"a {base.__name__.lower()} needs a name.")
        where = place if isinstance(entry, str) else (*place, "name")
        name = as_type(where, table["name"], TEXT)
        kind = self.imported(where, name) if ":" in name else found(where, find, name)
        arguments = {key: value for key, value in table.items() if key != "name"}
        if not isinstance(kind, type):
            only_keys(place, arguments, ())
            return made(where, {}, lambda: wrap(kind))
        result = self.call(place, where, kind, arguments)
        if not isinstance(result, base):
            fail(where, f"{name} is no {base.__name__.lower()}.")
        return result

    def refiner(self, place: Place, entry: Any) -> Refiner:
        """Return the refiner of a name, or of a table with its name and arguments."""
        refiner: Refiner = self._named(place, entry, plugins.refiner, Refiner, FunctionRefiner)
        return refiner

    def detector(self, place: Place, entry: Any) -> Detector:
        """Return the detector of a name, of a table with its name and arguments, or of ``any``, ``all``, ``not``."""
        combined: dict[str, Callable[..., Detector]] = {"any": AnyOf, "all": AllOf}
        table = entry if isinstance(entry, Mapping) else {}
        for key, kind in combined.items():
            if key in table:
                only_keys(place, table, (key,))
                listed = table[key]
                if not isinstance(listed, list):
                    fail((*place, key), f"it is {listed!r}; a list of detectors is needed.")
                parts = [self.detector((*place, key, str(i)), each) for i, each in enumerate(listed)]
                return made((*place, key), {}, partial(kind, *parts))
        if "not" in table:
            only_keys(place, table, ("not",))
            return Not(self.detector((*place, "not"), table["not"]))
        detector: Detector = self._named(place, entry, plugins.detector, Detector, Predicate)
        return detector

    def scheduler(self, place: Place, entry: Any) -> ConstraintScheduler[Any]:
        """Return the scheduler of a name, or of a table with its name and arguments."""
        table = {"name": entry} if isinstance(entry, str) else as_table(place, entry)
        if "name" not in table:
            fail(place, "a scheduler needs a name, such as name = 'pid'.")
        where = place if isinstance(entry, str) else (*place, "name")
        name = as_type(where, table["name"], TEXT)
        kind: Any = SCHEDULERS.get(name)
        if kind is None:
            kind = self.imported(where, name) if ":" in name else found(where, plugins.scheduler, name)
        arguments = {key: value for key, value in table.items() if key != "name"}
        scheduler = self.call(place, where, kind, arguments)
        if not isinstance(scheduler, ConstraintScheduler):
            fail(where, f"{name} is no scheduler.")
        return scheduler

    def call(self, place: Place, where: Place, kind: Any, table: Mapping[str, Any]) -> Any:
        """Return ``kind(**table)``; a missing argument is of ``place``, a problem without any of ``where``."""
        if not callable(kind):
            fail(where, f"{kind!r} is no class.")
        parameters = made(where, {}, lambda: inspect.signature(kind)).parameters.values()
        named = {each.name: each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            only_keys(place, table, named)
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in table:
                fail(place, f"{kind.__name__} needs {name} = ....")
        plain = {name for name, each in named.items() if takes_table(each)}
        arguments = {
            name: value if name in plain and isinstance(value, Mapping) else self.value((*place, name), value)
            for name, value in table.items()
        }
        return made(place if table else where, table, lambda: kind(**arguments))

    def value(self, place: Place, value: Any) -> Any:
        """Return a value as an argument: tables with a ``function``, ``detector`` or scheduler's ``name`` are those."""
        if isinstance(value, list):
            return [self.value((*place, str(i)), item) for i, item in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        if "function" in value:
            only_keys(place, value, ("function",))
            return self.imported((*place, "function"), as_type((*place, "function"), value["function"], TEXT))
        if "detector" in value:
            only_keys(place, value, ("detector",))
            return self.detector((*place, "detector"), value["detector"])
        return self.scheduler(place, value)

    def imported(self, place: Place, address: str) -> Any:
        """Return what stands at ``module:name``, if importing is allowed."""
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", address):
            fail(place, f"{address!r} is no address of the form 'module:name' of something at the top of a module.")
        if not self.imports:
            fail(
                place, f"'{address}' is to be imported, which runs the code of that module. Pass allow_imports=True, "
                "or on the command line --allow-imports, if you trust this file.",
            )  # fmt: skip
        module, _, path = address.partition(":")
        try:
            thing: Any = importlib.import_module(module)
            for name in path.split("."):
                thing = getattr(thing, name)
        except Exception as error:
            fail(place, f"'{address}' cannot be imported: {told(error)}.")
        return thing
