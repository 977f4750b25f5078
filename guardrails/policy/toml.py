"""Policy files: TOML read with errors that point at line and key, and written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from guardrails.errors import ConfigurationError
from guardrails.policy.build import Builder
from guardrails.policy.checks import Place, PolicyError
from guardrails.policy.describe import describe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from guardrails.guard import Guard


def load(path: str | Path, *, allow_imports: bool = False) -> Guard:
    """Return the guard that a policy file describes; see `Guard.from_toml`."""
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8-sig")
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigurationError(f"The policy {source} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{source} is no TOML: {error}.") from error
    try:
        return Builder(imports=allow_imports).guard(data)
    except PolicyError as error:
        line = line_of(text, error.place)
        where = f"{source}, line {line}" if line else str(source)
        raise ConfigurationError(f"{where}: {error}") from error


def dump(guard: Guard) -> str:
    """Return the policy file of ``guard``; see `Guard.to_toml`."""
    return tomli_w.dumps(describe(guard))


def line_of(text: str, place: Place) -> int:
    """Return the number of the line that sets the key at ``place``, or the nearest table around it; 0 if none.

    Args:
        text: a TOML document.
        place: keys from the outermost; an element of a list is its index as text.
    """
    best, line = 0, 0
    table: Place = ()
    counts: dict[Place, int] = {}
    for number, statement in _statements(text):
        if statement.lstrip().startswith("["):
            table = _header(statement, counts)
            keys = [(number, table)]
        else:
            keys = [(number + below, (*table, *path)) for below, path in _keys(statement)]
        for at, key in keys:
            shared = min(len(key), len(place))
            if shared > best and key[:shared] == place[:shared]:
                best, line = shared, at
    return line


def _statements(text: str) -> list[tuple[int, str]]:
    """Return each table header and each key with its value, with the number of its first line."""
    found: list[tuple[int, str]] = []
    waiting: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        waiting.append(line)
        statement = "\n".join(waiting)
        try:
            empty = not tomllib.loads(statement) and not statement.lstrip().startswith("[")
        except tomllib.TOMLDecodeError:
            continue  # a value that goes on in the next line
        if not empty:
            found.append((number - len(waiting) + 1, statement))
        waiting = []
    return found


def _header(statement: str, counts: dict[Place, int]) -> Place:
    """Return the table that a header opens; tables of a list are counted in ``counts``."""
    data: Any = tomllib.loads(statement)
    is_list = statement.lstrip().startswith("[[")
    place: Place = ()
    while isinstance(data, dict) and data:
        ((name, data),) = data.items()
        place = (*place, name)
        if not (is_list and isinstance(data, list)) and place in counts:
            place = (*place, str(counts[place] - 1))  # a table inside the last of a list
    if is_list:
        counts[place] = counts.get(place, 0) + 1
        place = (*place, str(counts[place] - 1))
    return place


def _keys(statement: str) -> list[tuple[int, Place]]:
    """Return the path of each key in a statement, and how many lines below its first line it stands."""
    found: dict[Place, int] = {}
    rows = statement.split("\n")
    for count in range(1, len(rows) + 1):
        try:
            data = tomllib.loads("\n".join(rows[:count]) + ("" if count == len(rows) else "\n]"))
        except tomllib.TOMLDecodeError:
            continue  # not between two elements of a list
        below = count - 1 if found else 0  # a list inside a table cannot be read before its last line
        for path in _paths(data):
            found.setdefault(path, below)
    return [(below, path) for path, below in found.items()]


def _paths(data: dict[str, Any]) -> list[Place]:
    """Return the path of every key in ``data``, those inside of values as well."""
    paths: list[Place] = []
    items: Any = enumerate(data) if isinstance(data, list) else data.items()
    for name, value in items:
        paths.append((str(name),))
        if isinstance(value, (dict, list)):
            paths += [(str(name), *path) for path in _paths(value)]  # type: ignore[arg-type]
    return paths
