"""A constraint's cost functions, checked against the host and wrapped so that their errors name the constraint."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from guardrails import AttachError, Constraint, RolloutError

PROVIDED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keywords TRL passes to every reward function, besides the columns of the data set."""

_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def cost_functions(constraint: Constraint, columns: Collection[str] | None, host: str) -> list[Callable[..., Any]]:
    """Return the wrapped cost functions of ``constraint``; their values are summed per completion.

    Args:
        constraint: a constraint whose ``cost`` is a function or several.
        columns: columns of the training data, or None where they are not known beforehand.
        host: the trainer's class, for messages.

    Raises:
        AttachError: if the cost is not a function TRL can call, or reads a column that is not there.
    """
    owner = f"Constraint '{constraint.name}'"
    cost = constraint.cost
    if cost is None or isinstance(cost, str):
        named = "has no cost function" if cost is None else f"names the cost '{cost}'"
        raise AttachError(
            f"{owner} {named}, but on {host} a cost is a function like a TRL reward function. "
            f"Give Constraint('{constraint.name}', ..., cost=function): function(prompts, completions, **kwargs) "
            "returns one number per completion; or cost='kl', the divergence from the reference, which turns beta."
        )
    functions = [cost] if callable(cost) else list(cost)
    for function in functions:
        _check(owner, function, columns, host)
    return [_async(owner, function) if is_async(function) else _sync(owner, function) for function in functions]


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling ``function`` returns a coroutine, as TRL decides it."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _check(owner: str, function: Callable[..., Any], columns: Collection[str] | None, host: str) -> None:
    if isinstance(function, nn.Module):
        raise AttachError(
            f"{owner}: the cost is a {type(function).__name__}, a module; {host} scores costs with functions only. "
            "Wrap it in a function that tokenizes the completions and returns one number for each."
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature to look at
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise AttachError(
            f"{owner}: the cost function '{_name(function)}' takes no **kwargs, but {host} passes it "
            f"{', '.join(PROVIDED)} and every column of the data set. Add **kwargs to its parameters."
        )
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise AttachError(f"{owner}: {host} passes keywords, so '{_name(function)}' cannot take {positional} by place.")
    if columns is None:
        return
    present = {*PROVIDED, *columns} - {"prompt", "completion"}
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind not in _VARIADIC
        if required and parameter.name not in present:
            raise AttachError(
                f"{owner} reads column '{parameter.name}', which this {host} does not provide. "
                f"Columns here: {', '.join(sorted(present))}."
            )


def _sync(owner: str, function: Callable[..., Any]) -> Callable[..., list[float]]:
    def cost(prompts: list[Any], **columns: Any) -> list[float]:
        with _named(owner, function):
            values = function(prompts=prompts, **columns)
        return _numbers(owner, function, values, len(prompts))

    return cost


def _async(owner: str, function: Callable[..., Any]) -> Callable[..., Any]:
    async def cost(prompts: list[Any], **columns: Any) -> list[float]:
        with _named(owner, function):
            values = await function(prompts=prompts, **columns)
        return _numbers(owner, function, values, len(prompts))

    return cost


@contextmanager
def _named(owner: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let what a cost function raises pass as it is, with a note that names the constraint."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{owner}: this was raised by its cost function '{_name(function)}'.")
        raise


def _numbers(owner: str, function: Callable[..., Any], values: Any, n_rows: int) -> list[float]:
    try:
        numbers = [float("nan") if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise RolloutError(
            f"{owner}: the cost function '{_name(function)}' must return one number per completion, or None where "
            f"there is none to give; it returned {type(values).__name__} ({error})."
        ) from error
    if len(numbers) != n_rows:
        raise RolloutError(
            f"{owner}: the cost function '{_name(function)}' returned {len(numbers)} values for {n_rows} completions. "
            "Return one number per completion, or None where there is none to give."
        )
    return numbers


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
