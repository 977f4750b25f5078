"""Require: a metric, and the mean score it must show."""

from __future__ import annotations

from dataclasses import dataclass

from guardrails.competence.metric import CompetenceMetric
from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_number


@dataclass(frozen=True)
class Require:
    """mean score of ``metric`` ≥ at_least.

    Args:
        metric: a metric, or the name of a built-in or of an installed plug-in's metric, which is then
            built without arguments.
        at_least: threshold on the mean score, in (0, 1): no finite sample can show a mean of 1.
        audit: True for a quantity that nothing trains on. It counts as any other requirement, and when
            it fails while all others hold, with confidence, the gate freezes.

    Raises:
        ConfigurationError: if the threshold or the metric cannot be used.
        PluginError: if no metric has that name.

    Example:
        >>> Require("reward_level", at_least=0.9).name
        'reward_level'
    """

    metric: CompetenceMetric | str
    at_least: float
    audit: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.metric, str):
            from guardrails import plugins  # above this module; loaded only when a name is looked up

            object.__setattr__(self, "metric", plugins.metric(self.metric))
        if not isinstance(self.metric, CompetenceMetric):
            raise ConfigurationError(
                f"Require takes a CompetenceMetric or the name of one, not {self.metric!r}. Wrap a function: "
                "FromFunction(function, name=...)."
            )
        name = getattr(self.metric, "name", None)
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise ConfigurationError(
                f"{type(self.metric).__name__}.name is {name!r}; give a non-empty string without '/': "
                "loggers group by '/'."
            )
        if isinstance(self.metric.requires, str):
            raise ConfigurationError(
                f"Metric '{name}': requires is the string {self.metric.requires!r}; give a set of columns, "
                f"{{{self.metric.requires!r}}}."
            )
        owner = f"Require('{name}')"
        at_least = check_number(owner, "at_least", self.at_least, low=0.0, high=1.0, open_low=True)
        if at_least == 1.0:
            raise ConfigurationError(f"{owner}: at_least is 1; no finite sample can show that. Give 0.999, say.")
        object.__setattr__(self, "at_least", at_least)

    @property
    def measured(self) -> CompetenceMetric:
        """The metric itself, names resolved."""
        if isinstance(self.metric, str):
            raise TypeError("a Require holds a metric once it is built")
        return self.metric

    @property
    def name(self) -> str:
        """The metric's name."""
        return self.measured.name
