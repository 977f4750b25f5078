"""Advantages of a cost, by the estimator the host applies to the reward, and their mixture.

A = (A_r - Σ λᵢ A_cᵢ) / (1 + Σ λᵢ), with A_r the host's own advantages and A_cᵢ those of cost i alone:
components are standardised first and scalarised second (Constrained GRPO, arXiv:2602.05863). Adding λ·cost to
the reward instead would rescale every term by the spread of the sum, and λ would lose its meaning.

The operations follow TRL's one by one, in its order and precision, so that a cost is treated exactly as it
would be if it were the only reward. TRL's skip NaN, which costs never are here: a guard has replaced them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPS = 1e-4
"""What TRL adds to a standard deviation before dividing by it."""


def grpo(values: Tensor, num_generations: int, *, scale_rewards: str, aggregation: str) -> Tensor:
    """Return GRPO's advantages of one column of values.

    Sum then normalise: v - mean(group), divided by the standard deviation of its group, of the batch, or by
    nothing. Normalise then sum: standardised in the group, then standardised in the batch.

    Args:
        values: ``(n_rows,)`` finite, groups of ``num_generations`` consecutive rows.
        num_generations: completions per prompt, ≥ 2.
        scale_rewards: ``"group"``, ``"batch"`` or ``"none"``, as in ``GRPOConfig``.
        aggregation: ``"sum_then_normalize"`` or ``"normalize_then_sum"``, as in ``GRPOConfig``.

    Example:
        >>> grpo(torch.tensor([0.0, 2.0]), 2, scale_rewards="none", aggregation="sum_then_normalize")
        tensor([-1.,  1.])
    """
    grouped = values.view(-1, num_generations)
    if aggregation == "normalize_then_sum":
        within = (grouped - grouped.mean(dim=1, keepdim=True)) / (_std(grouped, dim=1) + _EPS)
        within = within.view(-1)
        return (within - within.mean()) / (_std(within).squeeze() + _EPS)
    advantages = values - grouped.mean(dim=1).repeat_interleave(num_generations)
    if scale_rewards == "none":
        return advantages
    if scale_rewards == "batch":
        return advantages / (_std(values).squeeze() + _EPS)
    return advantages / (_std(grouped, dim=1).view(-1).repeat_interleave(num_generations) + _EPS)


def rloo(values: Tensor, num_generations: int, *, normalize: bool) -> Tensor:
    """Return RLOO's advantages of one column: v minus the mean of its group's other rows.

    Args:
        values: ``(n_rows,)`` finite, groups of ``num_generations`` consecutive rows.
        num_generations: completions per prompt, ≥ 2.
        normalize: whether to standardise over the batch, as ``RLOOConfig.normalize_advantages``.

    Example:
        >>> rloo(torch.tensor([0.0, 2.0]), 2, normalize=False)
        tensor([-2.,  2.])
    """
    grouped = values.view(-1, num_generations)
    # Divided by a tensor, as the host does: a GPU multiplies by the reciprocal of a number, which rounds otherwise.
    siblings = torch.full_like(grouped[:, :1], num_generations - 1)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / siblings
    advantages = values - others.view(-1)
    if normalize:
        advantages = (advantages - advantages.mean()) / (_std(advantages).squeeze() + _EPS)
    return advantages


def mix(reward_advantages: Tensor, penalties: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return A = (A_r - Σ λᵢ A_cᵢ) / (1 + Σ λᵢ).

    Args:
        reward_advantages: A_r, ``(n_rows,)``.
        penalties: pairs of a multiplier λᵢ ≥ 0 and its cost's advantages A_cᵢ, ``(n_rows,)``.

    Example:
        >>> mix(torch.tensor([1.0]), [(1.0, torch.tensor([2.0]))])
        tensor([-0.5000])
    """
    mixed = reward_advantages
    for multiplier, cost_advantages in penalties:
        mixed = mixed - multiplier * cost_advantages
    return mixed / (1.0 + sum(multiplier for multiplier, _ in penalties))


def _std(values: Tensor, dim: int | None = None) -> Tensor:
    """Unbiased standard deviation with kept dimensions, in the operations of TRL's ``nanstd``."""
    count = values.numel() if dim is None else values.shape[dim]
    variance = ((values - values.mean(dim=dim, keepdim=True)) ** 2).mean(dim=dim, keepdim=True)
    return torch.sqrt(variance * (count / (count - 1)))
