"""Between: a number that moves from tight to loose with the level of a gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_number

if TYPE_CHECKING:
    from guardrails.competence.gate import Gate

Scale = Literal["linear", "geometric"]


@dataclass(frozen=True)
class Between:
    """tight + level · (loose - tight), or tight · (loose / tight)^level; made by `Gate.between`.

    Args:
        gate: whose level it follows.
        tight: value at level 0, finite and ≥ 0; in force until something has been earned.
        loose: value at level 1, finite, ≥ 0 and other than ``tight``.
        scale: ``"linear"``, or ``"geometric"`` for values that span orders of magnitude (both > 0).

    Raises:
        ConfigurationError: if a value is out of range.

    Example:
        >>> from guardrails import Gate, Require
        >>> limit = Gate(Require("reward_level", at_least=0.9)).between(5.0, 25.0)
        >>> limit.at(0.5)
        15.0
    """

    gate: Gate
    tight: float
    loose: float
    scale: Scale = "linear"

    def __post_init__(self) -> None:
        if self.scale not in ("linear", "geometric"):
            raise ConfigurationError(f"between: scale is {self.scale!r}; give 'linear' or 'geometric'.")
        for name in ("tight", "loose"):
            value = check_number("between", name, getattr(self, name), low=0.0, open_low=self.scale == "geometric")
            object.__setattr__(self, name, value)
        if self.tight == self.loose:
            raise ConfigurationError(
                f"between: tight and loose are both {self.tight:g}. Give two values, or one number."
            )

    def at(self, level: float) -> float:
        """Return the value at ``level`` in [0, 1]; exactly ``tight`` at 0 and ``loose`` at 1."""
        if level >= 1.0:
            return self.loose
        if self.scale == "linear":
            return self.tight + level * (self.loose - self.tight)
        return float(self.tight * (self.loose / self.tight) ** level)
