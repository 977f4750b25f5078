"""Transitions: what a safety critic learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Observations = Any
"""A batch of observations as the host's own networks take them: a tensor, or tensors by key."""


@dataclass(frozen=True)
class Transitions:
    """A batch of steps.

    Args:
        observations: n_rows of them.
        actions: ``(n_rows, n_actions)``; indices, ``(n_rows, 1)``, where actions are discrete.
        costs: ``(n_rows, n_costs)`` in the costs' units, discounted sums over n steps where the host takes n;
            NaN for a row whose cost is not known, which teaches nothing.
        next_observations: those that follow.
        next_actions: the actions that the policy takes there, like ``actions``.
        dones: ``(n_rows, 1)``, 1 where the episode ended and nothing follows.
        discounts: γ, or ``(n_rows, 1)`` where it differs by row.
        complete: whether every cost is known to be known, which spares looking for those that are not.
    """

    observations: Observations
    actions: torch.Tensor
    costs: torch.Tensor
    next_observations: Observations
    next_actions: torch.Tensor
    dones: torch.Tensor
    discounts: torch.Tensor | float
    complete: bool = False
