"""Energy, score target and score loss: what the network of a diffusion policy is taught at the points it visits.

Source: arXiv 2602.02924 and its public code. The target is the gradient by the action, after tanh, that samples about a
visited action show, each weighted by how low its energy is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guardrails.schedulers.base import check_number, whole_number


@dataclass(frozen=True)
class ScoreMatching:
    """How a guarded `DiffusionPolicy` is taught the slope of its energy.

    Args:
        samples: N ≥ 1 actions about each visited one that make up its target.
        beta: temperature β > 0, in the unit of the energy, which is that of the reward's Q.
        weight: w ≥ 0 of the score loss beside the mean energy.

    Raises:
        ConfigurationError: if an argument is out of range.
    """

    samples: int = 4
    beta: float = 1.0
    weight: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", whole_number("ScoreMatching", "samples", self.samples))
        check_number("ScoreMatching", "beta", self.beta, low=0.0, high=1e9, open_low=True)
        check_number("ScoreMatching", "weight", self.weight, low=0.0, high=1e9)


def energy(q_values: torch.Tensor, penalties: torch.Tensor | None = None) -> torch.Tensor:
    """Return L_A(s, a) = -min_j Q_j(s, a) + Σ_i ψ_i(Q̄_i(s, a) - h_i), ``(n_rows,)``.

    Args:
        q_values: Q_j of the reward, ``(n_critics, n_rows)``.
        penalties: Σ_i ψ_i, ``(n_rows,)``, as `HostCritic.penalty` returns it; None where nothing is penalised.
    """
    lowest = q_values.amin(dim=0)
    return -lowest if penalties is None else penalties - lowest


def score_target(energies: torch.Tensor, gradients: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    """Return φ* = -(1/β) Σ_i w_i ∇_a L_A(a⁽ⁱ⁾), ``(n_rows, n_actions)``, with w = softmax(-L_A(a⁽ⁱ⁾) / β) over i.

    Args:
        energies: L_A(a⁽ⁱ⁾), ``(n_samples, n_rows)``.
        gradients: ∇_a L_A(a⁽ⁱ⁾), ``(n_samples, n_rows, n_actions)``.
        beta: temperature β > 0, in the unit of the energy.

    Example:
        >>> target = score_target(torch.tensor([[0.0], [50.0]]), torch.tensor([[[2.0]], [[9.0]]]))
        >>> target.tolist()
        [[-2.0]]
    """
    weights = torch.softmax(energies / -beta, dim=0)
    return (weights.unsqueeze(-1) * gradients).sum(dim=0) / -beta


def score_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean of (φ - φ*)² over rows and dimensions of the action, with φ* held constant.

    Args:
        scores: φ(s, a_τ, τ), ``(n_rows, n_actions)``.
        targets: φ*, alike.
    """
    return torch.nn.functional.mse_loss(scores, targets.detach())
