"""The hooks a plug-in may implement; each lists classes or callables, and calls none of them.

A plug-in is a module (or any object) whose functions bear the name of a hook and the `hookimpl` mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pluggy

if TYPE_CHECKING:
    from guardrails.competence import CompetenceMetric
    from guardrails.refine import Detector, Refiner
    from guardrails.schedulers import ConstraintScheduler

PROJECT = "guardrails"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Kind: TypeAlias = Literal["metric", "scheduler", "refiner", "detector"]


@hookspec
def guardrails_competence_metrics() -> Sequence[type[CompetenceMetric]]:  # type: ignore[empty-body]
    """List the competence metrics of a plug-in.

    Called once, when a plug-in's name is first looked up. A metric is instantiated, without
    arguments, only when the user's code names it: ``Require("acme.politeness", at_least=0.95)``.

    Returns:
        Concrete subclasses of `CompetenceMetric`, each with a ``name`` of the form ``<vendor>.<name>``.

    Example:
        >>> import guardrails
        >>> @guardrails.hookimpl
        ... def guardrails_competence_metrics():
        ...     return [Politeness]
    """


@hookspec
def guardrails_schedulers() -> Sequence[type[ConstraintScheduler[Any]]]:  # type: ignore[empty-body]
    """List the constraint schedulers of a plug-in.

    Called once, when a plug-in's name is first looked up. A scheduler is built only when the user's code
    names it: ``Constraint("cost", limit=25.0, scheduler="acme.mpc")``, or with arguments of its own,
    ``scheduler=plugins.scheduler("acme.mpc")(horizon=5)``.

    Returns:
        Concrete subclasses of `ConstraintScheduler`, each with a class attribute ``name`` of the form
        ``<vendor>.<name>``.

    Example:
        >>> import guardrails
        >>> @guardrails.hookimpl
        ... def guardrails_schedulers():
        ...     return [ModelPredictive]
    """


@hookspec
def guardrails_refiners() -> Sequence[type[Refiner] | Callable[..., Any]]:  # type: ignore[empty-body]
    """List the refiners of a plug-in: what turns a completion into its minimally corrected version.

    Called once, when a plug-in's name is first looked up. A refiner is made only when the user's code names
    it: ``Refinement("acme.proofreader")``.

    Returns:
        Concrete subclasses of `Refiner`, or functions ``(prompt, completion) -> text or None``, each with an
        attribute ``name`` of the form ``<vendor>.<name>``.

    Example:
        >>> import guardrails
        >>> @guardrails.hookimpl
        ... def guardrails_refiners():
        ...     return [Proofreader]
    """


@hookspec
def guardrails_detectors() -> Sequence[type[Detector] | Callable[..., Any]]:  # type: ignore[empty-body]
    """List the detectors of a plug-in: what tells which completions have degenerated.

    Called once, when a plug-in's name is first looked up. A detector is made only when the user's code names
    it: ``Refinement(..., when="acme.gibberish")``.

    Returns:
        Concrete subclasses of `Detector`, or functions ``(prompt, completion) -> bool``, each with an attribute
        ``name`` of the form ``<vendor>.<name>``.

    Example:
        >>> import guardrails
        >>> @guardrails.hookimpl
        ... def guardrails_detectors():
        ...     return [Gibberish]
    """


HOOKS: dict[Kind, str] = {
    "metric": guardrails_competence_metrics.__name__,
    "scheduler": guardrails_schedulers.__name__,
    "refiner": guardrails_refiners.__name__,
    "detector": guardrails_detectors.__name__,
}
"""Kind of object to the hook that lists it."""
