"""Functions of the user's that the refiner calls: they have to answer when they are called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from guardrails.errors import ConfigurationError


def check_plain(owner: str, function: Callable[..., Any]) -> None:
    """Raise if ``function`` is asynchronous: a coroutine is no answer, and as a truth it is true.

    Args:
        owner: what errors call the argument.
        function: any callable.

    Raises:
        ConfigurationError: if calling it returns a coroutine.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigurationError(
            f"{owner}: {function!r} is asynchronous, and nothing awaits it here. Give a plain function, such as one "
            "that runs it: lambda *arguments, **columns: asyncio.run(function(*arguments, **columns))."
        )
