"""What a policy's data must be like, said with the place where it is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

from guardrails.errors import ConfigurationError, GuardrailsError, told

Place = tuple[str, ...]
T = TypeVar("T")

NUMBER, WHOLE, TEXT, FLAG = (int, float), (int,), (str,), (bool,)
_WORDS: dict[tuple[type, ...], str] = {
    NUMBER: "a number",
    WHOLE: "a whole number",
    TEXT: "a text in quotes",
    FLAG: "true or false",
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


def found(place: Place, find: Callable[[str], T], name: str) -> T:
    """Return what ``find`` finds under ``name``."""
    return made(place, {}, lambda: find(name))


def made(place: Place, table: Mapping[str, Any], make: Callable[[], T]) -> T:
    """Return what ``make`` returns; an error is placed at the key that its message names, if it names one."""
    try:
        return make()
    except PolicyError:
        raise
    except (GuardrailsError, TypeError, ValueError) as error:
        named = [key for key in table if re.search(rf"\b{re.escape(key)}\b", str(error))]
        raise PolicyError((*place, *named[:1]), str(error)) from error
    except Exception as error:  # a third party's constructor may raise anything
        raise PolicyError(place, told(error)) from error


def fail(place: Place, problem: str) -> NoReturn:
    """Raise a `PolicyError`."""
    raise PolicyError(place, problem)


def as_table(place: Place, value: Any) -> Mapping[str, Any]:
    """Return ``value`` if it is a table."""
    if not isinstance(value, Mapping):
        fail(place, f"it is {value!r}; a table is needed.")
    return value


def entries(table: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    """Return names and values of the table under ``key``; nothing where there is none."""
    return as_table((key,), table.get(key, {})).items()


def fields(
    place: Place, value: Any, types: Mapping[str, tuple[type, ...]], *, needed: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """Return ``value`` if it is a table of the keys and ``types`` given, with all that is ``needed``."""
    table = as_table(place, value)
    only_keys(place, table, types)
    for key in needed:
        if key not in table:
            fail(place, f"{key} is missing.")
    for key, item in table.items():
        as_type((*place, key), item, types[key])
    return table


def as_type(place: Place, value: Any, types: tuple[type, ...]) -> Any:
    """Return ``value`` if it is of ``types``; true and false are no numbers."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not FLAG):
        fail(place, f"it is {value!r}; {_WORDS[types]} is needed.")
    return value


def only_keys(place: Place, table: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise if ``table`` has a key that is not known."""
    names = list(known)
    for key in table:
        if key not in names:
            fail((*place, key), f"there is no key '{key}' here.{near(key, names)} Keys: {', '.join(names)}.")


def near(name: str, known: Iterable[str]) -> str:
    """Return a question after the name that may have been meant, empty where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
