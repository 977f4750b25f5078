"""Ensemble: how large a safety critic is, how fast it learns, and how much its doubt counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guardrails.errors import ConfigurationError
from guardrails.schedulers.base import check_number, whole_number


@dataclass(frozen=True)
class Ensemble:
    """Settings of a `SafetyCritic`.

    Args:
        members: networks M ≥ 1 that start from weights of their own and learn from the same batches.
        kappa: κ ≥ 0, standard deviations of the members that are added to their mean: the margin that doubt costs.
        hidden: width of each hidden layer, at least one.
        learning_rate: of Adam, > 0.
        tau: share in (0, 1] by which the target network follows.
        target_interval: updates from one following to the next, at least 1.
        activation: what stands between layers, ``"relu"`` or ``"silu"``.

    Raises:
        ConfigurationError: if an argument is out of range, or ``kappa`` is above 0 with a single member.

    Example:
        >>> Ensemble(members=4).kappa
        1.0
    """

    members: int = 4
    kappa: float = 1.0
    hidden: tuple[int, ...] = (128, 128)
    learning_rate: float = 1e-3
    tau: float = 0.005
    target_interval: int = 1
    activation: Literal["relu", "silu"] = "relu"

    def __post_init__(self) -> None:
        owner = "Ensemble"
        object.__setattr__(self, "members", whole_number(owner, "members", self.members))
        object.__setattr__(self, "kappa", check_number(owner, "kappa", self.kappa, low=0.0, high=1e3))
        if self.members == 1 and self.kappa > 0.0:
            raise ConfigurationError(
                f"{owner}: one member has no spread for kappa={self.kappa:g} to count. Give kappa=0, or more members."
            )
        if not isinstance(self.hidden, (tuple, list)) or not self.hidden:
            raise ConfigurationError(f"{owner}: hidden is {self.hidden!r}; give each layer's width, as (256, 256).")
        object.__setattr__(self, "hidden", tuple(whole_number(owner, "hidden", width) for width in self.hidden))
        check_number(owner, "learning_rate", self.learning_rate, low=0.0, high=1.0, open_low=True)
        check_number(owner, "tau", self.tau, low=0.0, high=1.0, open_low=True)
        object.__setattr__(self, "target_interval", whole_number(owner, "target_interval", self.target_interval))
        if self.activation not in ("relu", "silu"):
            raise ConfigurationError(f"{owner}: activation is {self.activation!r}; give 'relu' or 'silu'.")
