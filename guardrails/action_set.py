"""ActionSet: which actions may reach the environment, as a part of a guard that a gate can widen and narrow."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from guardrails.competence.between import Between
from guardrails.constraint import Dial
from guardrails.errors import ConfigurationError


class ActionSet(abc.ABC):
    """A(s) within the action space: an action outside it is replaced by one inside before it acts.

    A constraint bounds a mean and lets the policy find out; a set bounds each action, from the first step on.
    Adapters of hosts that act in environments say how a set is applied; ``guardrails_sb3`` has sets to use.

    Args:
        name: what logs and errors call it; unique in a guard, without ``/``.

    Raises:
        ConfigurationError: if the name cannot be used.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise ConfigurationError(
                f"An action set's name must be a non-empty string without '/', not {name!r}: loggers group by '/'."
            )
        self.name = name

    @property
    @abc.abstractmethod
    def widths(self) -> Mapping[str, float | Between]:
        """What says how wide the set is, by the argument's name: numbers, or ``gate.between(tight, loose)``."""

    @property
    def turned(self) -> list[Dial]:
        """The widths that move, as dials named ``<name>_<argument>``."""
        widths = self.widths.items()
        return [Dial(self.dial(argument), value) for argument, value in widths if isinstance(value, Between)]

    def in_force(self, dials: Mapping[str, float]) -> dict[str, float]:
        """Return each width as a number, given `Guard.dials`."""
        return {
            argument: dials[self.dial(argument)] if isinstance(value, Between) else value
            for argument, value in self.widths.items()
        }

    def dial(self, argument: str) -> str:
        """Return the name of the dial that turns the width ``argument``."""
        return f"{self.name}_{argument}"
