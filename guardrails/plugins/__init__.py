"""Third-party metrics, schedulers, refiners and detectors, found by name.

A plug-in is an installed package with an entry point in the group ``guardrails``, or an object given
to `register`. Nothing is imported before the first name is looked up, and nothing that a plug-in
lists is called before the user's code names it.

Example:
    >>> from guardrails import plugins
    >>> plugins.scheduler("pid").__name__
    'PID'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from guardrails.errors import PluginError
from guardrails.plugins.found import Found
from guardrails.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from guardrails.competence import CompetenceMetric
    from guardrails.plugins.registry import Registry
    from guardrails.schedulers import ConstraintScheduler

__all__ = [
    "Found",
    "detector",
    "found",
    "hookimpl",
    "metric",
    "metric_type",
    "refiner",
    "refresh",
    "register",
    "scheduler",
    "unregister",
]

_registry: Registry | None = None


def _shared() -> Registry:
    """Return the registry of this process; made late, since most programs never ask for a plug-in."""
    global _registry
    if _registry is None:
        from guardrails.plugins.registry import Registry

        _registry = Registry()
    return _registry


def metric_type(name: str) -> Callable[..., CompetenceMetric]:
    """Return the metric class of this name: a built-in such as ``failure_avoidance``, or a plug-in's.

    Raises:
        PluginError: if the name is unknown or refused.
    """
    return cast("Callable[..., CompetenceMetric]", _shared().find("metric", name))


def metric(name: str) -> CompetenceMetric:
    """Return a new metric of this name: a built-in such as ``failure_avoidance``, or a plug-in's.

    Raises:
        PluginError: if the name is unknown or refused, or the metric cannot be built without arguments.
    """
    factory = metric_type(name)
    try:
        return factory()
    except Exception as error:
        raise PluginError(
            f"The metric '{name}' cannot be built without arguments: {type(error).__name__}: {error}. "
            "Import its class and pass an instance instead of the name."
        ) from error


def scheduler(name: str) -> type[ConstraintScheduler[Any]]:
    """Return the scheduler class of this name: a built-in such as ``pid``, or a plug-in's.

    Raises:
        PluginError: if the name is unknown or refused.
    """
    return cast("type[ConstraintScheduler[Any]]", _shared().find("scheduler", name))


def refiner(name: str) -> Callable[..., Any]:
    """Return the refiner, a class or function, of this name: a built-in such as ``model``, or a plug-in's.

    Raises:
        PluginError: if the name is unknown or refused.
    """
    return cast("Callable[..., Any]", _shared().find("refiner", name))


def detector(name: str) -> Callable[..., Any]:
    """Return the detector, a class or function, of this name: a built-in such as ``degenerate``, or a plug-in's.

    Raises:
        PluginError: if the name is unknown or refused.
    """
    return cast("Callable[..., Any]", _shared().find("detector", name))


def found() -> tuple[Found, ...]:
    """Return what discovery found: a record per plug-in and kind, and one per failure."""
    return _shared().found()


def register(plugin: object, *, name: str | None = None) -> str:
    """Add a plug-in by code: a module, class or object whose functions are marked with `hookimpl`.

    Args:
        plugin: what implements the hooks.
        name: what listings and `unregister` call it. Default: the module's or class's own name.

    Returns:
        The name.

    Raises:
        PluginError: if the name is taken or anything the plug-in lists is refused; nothing is added then.
    """
    label = name or str(getattr(plugin, "__name__", type(plugin).__name__))
    _shared().register(plugin, label)
    return label


def unregister(name: str) -> None:
    """Remove a plug-in that `register` added.

    Raises:
        PluginError: if there is none of that name.
    """
    _shared().unregister(name)


def refresh() -> None:
    """Look for installed plug-ins anew at the next question, after the environment has changed."""
    _shared().refresh()
