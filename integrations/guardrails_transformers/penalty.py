"""What a differentiable cost adds to a host's loss: ψ(v) of its scaled violation v, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guardrails import Constraint, Guard
from guardrails.schedulers import ConstraintScheduler, Margin, Smooth, Warmup
from guardrails_transformers.rows import Rows
from guardrails_transformers.seams import Host

_PASSING_ON = (Margin, Smooth, Warmup)
"""Wrappers whose penalty has the slope of that of the scheduler inside."""


def is_linear(scheduler: ConstraintScheduler[Any]) -> bool:
    """Whether the derivative of a scheduler's penalty is its multiplier, whatever the violation.

    False of every penalty that is not known here, such as that of a third party's wrapper: its own slope is taken.
    """
    penalty = type(scheduler).penalty
    if isinstance(scheduler, _PASSING_ON) and penalty in [kind.penalty for kind in _PASSING_ON]:
        return is_linear(scheduler.scheduler)
    return penalty is ConstraintScheduler.penalty


class Penalty:
    """ψ of every constraint in force: λ v for most schedulers, ([λ + ρ v]₊² - λ²) / 2ρ for the augmented Lagrangian.

    v is the violation of the mean cost, in the constraint's scale. Its gradient is that of this batch; where ψ bends,
    its slope is taken at the mean of all rows of the step that are known, of all processes, so that one process and
    several, with one batch or many, do the same as far as they can know it.

    Args:
        guard: decides the multipliers.
        names: the constraints that act on the loss.
    """

    def __init__(self, guard: Guard, names: frozenset[str]) -> None:
        parts = [part for part in guard.constraints if part.name in names]
        self._guard = guard
        self._linear = [part.name for part in parts if is_linear(part.controller)]
        self._bent = [part.name for part in parts if not is_linear(part.controller)]

    def __call__(self, costs: dict[str, Tensor], rows: Rows, host: Host) -> Tensor | None:
        """Return the sum of all penalties of one batch, or None where nothing is to be added.

        Args:
            costs: a number or ``(n_rows,)`` each, with gradients.
            rows: the step that the batch belongs to.
            host: the trainer.
        """
        multipliers = self._guard.multipliers
        parts = {part.name: part for part in self._guard.constraints}
        terms = []
        for name in self._linear:
            if multipliers[name] > 0.0 and costs[name].requires_grad and costs[name].numel():
                terms.append(multipliers[name] * _scaled(parts[name], _mean(costs[name])[0]))
        if self._bent:
            found = [_mean(costs[name]) for name in self._bent]
            means, counts = (torch.stack(column) for column in zip(*found, strict=True))
            known = rows.running_mean(host, means.detach(), counts)
            current = known + (means - means.detach())
            graded = [name for name in self._bent if costs[name].requires_grad and costs[name].numel()]
            terms += [self._guard.penalty(name, current[self._bent.index(name)]) for name in graded]
        return torch.stack(terms).sum() if terms else None


def _scaled(part: Constraint, cost: Any) -> Any:
    return part.violation(cost) / part.violation_scale


def _mean(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of the finite rows, 0 with none, and how many there are."""
    finite = cost.isfinite()
    count = finite.sum().to(cost.dtype)
    return torch.where(finite, cost, 0.0).sum() / count.clamp(min=1.0), count
