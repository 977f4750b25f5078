"""Refinement: the online refiner as a constraint of a guard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from guardrails.competence.between import Between
from guardrails.constraint import Constraint, Dial
from guardrails.errors import ConfigurationError
from guardrails.refine.acceptance import Acceptance
from guardrails.refine.detectors import Always, Detector
from guardrails.refine.judges import Predicate
from guardrails.refine.refiner import FunctionRefiner, Refiner
from guardrails.schedulers.base import check_number

DEFAULT_WEIGHT = 3.0
"""Weight α where none is given."""


@dataclass(frozen=True)
class Refinement:
    """Loss = L_RL + α · (-log π(y⁺|x)): what the policy wrote is corrected, and the correction is learned.

    y⁺ = refine(x, y) is the completion with its faults corrected and all else kept. Where nothing was wrong
    y⁺ = y, and the term's gradient has mean zero: the constraint vanishes by itself as the policy behaves.

    Args:
        refiner: an instance, or the name of a built-in or plug-in refiner, made with its defaults.
        weight: α ≥ 0; or ``gate.between(tight, loose)``, which moves with competence and is logged as the dial
            ``<name>_weight``; or a `Constraint`, whose multiplier is α: any scheduler then holds its cost, for
            example the degenerate rate, at its limit. Without a ``cost`` it holds the rows' edit ratio.
        when: which rows are refined; a detector, or the name of one. By default all, as in the paper: faultless
            rows pull back as well. A detector is an economy.
        accept: which refinements count.
        name: what logs and errors call it; without ``/``.
        changed_only: learn only the tokens that the refiner changed, not those it kept.

    Raises:
        ConfigurationError: if a value cannot be used.
        PluginError: if no refiner or detector has the name given.

    Example:
        >>> from guardrails.refine import Degenerate, FunctionRefiner
        >>> refinement = Refinement(FunctionRefiner(lambda prompt, text: text.strip()), weight=0.5, when=Degenerate())
        >>> Guard(refinement).refinement_weight
        0.5
    """

    refiner: Refiner | str
    weight: float | Between | Constraint = DEFAULT_WEIGHT
    when: Detector | str = field(default_factory=Always)
    accept: Acceptance = field(default_factory=Acceptance, kw_only=True)
    name: str = field(default="refinement", kw_only=True)
    changed_only: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ConfigurationError(
                f"A refinement's name must be a non-empty string without '/', not {self.name!r}: loggers group by '/'."
            )
        owner = f"Refinement '{self.name}'"
        object.__setattr__(self, "refiner", _refiner(owner, self.refiner))
        object.__setattr__(self, "when", _detector(owner, self.when))
        if not isinstance(self.weight, (Between, Constraint)):
            object.__setattr__(self, "weight", check_number(owner, "weight", self.weight, low=0.0))
        if not isinstance(self.accept, Acceptance):
            raise ConfigurationError(f"{owner}: accept is {self.accept!r}; give Acceptance(...).")
        if not isinstance(self.changed_only, bool):
            raise ConfigurationError(f"{owner}: changed_only is {self.changed_only!r}; give True or False.")

    @property
    def corrects(self) -> Refiner:
        """The refiner as an instance, also where it was given by name."""
        return cast("Refiner", self.refiner)

    @property
    def detects(self) -> Detector:
        """The detector as an instance, also where it was given by name."""
        return cast("Detector", self.when)

    @property
    def turned(self) -> list[Constraint | Dial]:
        """What turns the weight: the constraint given, or a dial named ``<name>_weight``; nothing if it is fixed."""
        if isinstance(self.weight, Constraint):
            return [self.weight]
        return [Dial(f"{self.name}_weight", self.weight)] if isinstance(self.weight, Between) else []


def _refiner(owner: str, given: Any) -> Refiner:
    from guardrails import plugins

    made = _named(owner, "refiner", given, plugins.refiner, FunctionRefiner)
    if not isinstance(made, Refiner):
        raise ConfigurationError(
            f"{owner}: refiner is {given!r}; give an instance such as ModelRefiner(), or a name. "
            "FunctionRefiner(function) makes one of a function."
        )
    return made


def _detector(owner: str, given: Any) -> Detector:
    from guardrails import plugins

    made = _named(owner, "when", given, plugins.detector, Predicate)
    if not isinstance(made, Detector):
        raise ConfigurationError(
            f"{owner}: when is {given!r}; give a detector such as Degenerate(), or a name. Predicate(function) makes "
            "one of a function."
        )
    return made


def _named(owner: str, argument: str, given: Any, find: Any, wrap: Any) -> Any:
    """Return what ``given`` names, made without arguments; a function that a plug-in lists is wrapped."""
    if not isinstance(given, str):
        return given
    found = find(given)
    try:
        return found() if isinstance(found, type) else wrap(found)
    except TypeError as error:
        raise ConfigurationError(
            f"{owner}: {argument} '{given}' cannot be made without arguments ({error}). Give an instance instead."
        ) from error
