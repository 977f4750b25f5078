"""Records of discovery: which plug-in listed what, from which distribution, and what went wrong."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal, NamedTuple

from guardrails.plugins.hookspecs import Kind


@dataclass(frozen=True, slots=True)
class Found:
    """What discovery found of one plug-in, for one kind of object or one failure.

    Args:
        plugin: name of the plug-in: its entry point's, or the one it was registered under.
        distribution: the distribution that installed it; empty for a plug-in registered by code.
        version: that distribution's version; empty where there is none.
        kind: what ``names`` are; ``"plugin"`` when the record speaks of the plug-in as a whole.
        names: the objects that can be looked up or, with an ``error``, those that were refused.
        error: why it cannot be used, on one line; empty when it can.
        disabled: the user switched the plug-in off, so nothing of it was imported.
    """

    plugin: str
    distribution: str = ""
    version: str = ""
    kind: Kind | Literal["plugin"] = "plugin"
    names: tuple[str, ...] = ()
    error: str = ""
    disabled: bool = False

    @property
    def origin(self) -> str:
        """Distribution and version as a person writes them, or ``registered by code``."""
        return f"{self.distribution} {self.version}".strip() or "registered by code"


class Source(NamedTuple):
    """Where a plug-in comes from; the fields are those of `Found`."""

    plugin: str
    distribution: str = ""
    version: str = ""

    def found(self, kind: Kind, *names: str) -> Found:
        """Return a record of objects that can be used."""
        return Found(*self, kind=kind, names=names)

    def failed(self, error: str, kind: Kind | Literal["plugin"] = "plugin", *names: str) -> Found:
        """Return a record of what cannot be used, and why."""
        return Found(*self, kind=kind, names=names, error=one_line(error))

    def __str__(self) -> str:
        return f"'{self.plugin}' ({Found(*self).origin})"


class Offer(NamedTuple):
    """One object that a plug-in lists under a valid name."""

    source: Source
    kind: Kind
    name: str
    value: object


def one_line(text: str) -> str:
    """Return ``text`` on one line, without the control characters that could forge a listing."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def describe(error: BaseException) -> str:
    """Return type, message and place of ``error`` on one line."""
    told = traceback.TracebackException(type(error), error, None, compact=True)
    vars(told)["__notes__"] = None  # which would come last, in place of the message
    message = one_line([*told.format_exception_only()][-1])
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "?", error.lineno))
    written = [place for place in places if not place[0].startswith("<frozen")]
    return f"{message} ({written[-1][0]}:{written[-1][1]})" if written else message
