"""A whole ensemble of multilayer perceptrons, evaluated as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from guardrails.critic.held import ACTIVATIONS, HeldEnsemble, affine


class EnsembleMLP(nn.Module):
    """M perceptrons of one shape; each layer of all of them is a single batched product.

    Weights are ``(members, n_in, n_out)``, drawn for each member as `torch.nn.Linear` draws its own.

    Args:
        members: M ≥ 1.
        n_inputs: width of the input.
        n_outputs: width of the output.
        hidden: widths of the hidden layers, at least one.
        activation: what stands between layers, ``"relu"`` or ``"silu"``.
    """

    def __init__(
        self, members: int, n_inputs: int, n_outputs: int, hidden: Sequence[int], activation: str = "relu"
    ) -> None:
        super().__init__()
        sizes = [n_inputs, *hidden, n_outputs]
        self.members = members
        self.activation = activation
        self.weights = nn.ParameterList(
            torch.empty(members, n_in, n_out).uniform_(-(n_in**-0.5), n_in**-0.5) for n_in, n_out in pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.empty(members, 1, n_out).uniform_(-(n_in**-0.5), n_in**-0.5) for n_in, n_out in pairwise(sizes)
        )

    def forward(self, inputs: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        """Return the outputs of every member, ``(members, n_rows, n_outputs)``.

        Args:
            inputs: ``(n_rows, n_inputs)``, the same for all members.
            frozen: let gradients pass to the inputs only, at half the work of the backward pass.
        """
        hidden = inputs.unsqueeze(0).expand(self.members, -1, -1)
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            hidden = affine(hidden, weight, bias)
            if index < last:
                hidden = ACTIVATIONS[self.activation].smooth(hidden)
        return hidden

    def at(self, leading: torch.Tensor) -> HeldEnsemble:
        """Return the frozen ensemble as a function of its last inputs, with the first ones held at ``leading``.

        Args:
            leading: ``(n_rows, n_leading)``; no gradient reaches them.
        """
        return HeldEnsemble(list(self.weights), list(self.biases), self.activation, leading)
