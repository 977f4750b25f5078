"""A whole ensemble of multilayer perceptrons, evaluated as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu, "silu": nn.functional.silu}
"""What may stand between layers, by name."""


class EnsembleMLP(nn.Module):
    """M perceptrons of one shape; each layer of all of them is a single batched product.

    Weights are ``(members, n_in, n_out)``, drawn for each member as `torch.nn.Linear` draws its own.

    Args:
        members: M ≥ 1.
        n_inputs: width of the input.
        n_outputs: width of the output.
        hidden: widths of the hidden layers, at least one.
        activation: what stands between layers, one of `ACTIVATIONS`.
    """

    def __init__(
        self, members: int, n_inputs: int, n_outputs: int, hidden: Sequence[int], activation: str = "relu"
    ) -> None:
        super().__init__()
        sizes = [n_inputs, *hidden, n_outputs]
        self.members = members
        self._activate = ACTIVATIONS[activation]
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
        weights, biases = self._layers(frozen)
        spread = inputs.unsqueeze(0).expand(self.members, -1, -1)
        return self._above(torch.baddbmm(biases[0], spread, weights[0]), weights, biases)

    def at(self, leading: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the frozen ensemble as a function of its last inputs, with the first ones held at ``leading``.

        What the held inputs add to the first layer is computed once, however often the function is called, and
        the backward pass stops at the others.

        Args:
            leading: ``(n_rows, n_leading)``; no gradient reaches them.

        Returns:
            A function from ``(n_rows, n_inputs - n_leading)`` to ``(members, n_rows, n_outputs)``.
        """
        weights, biases = self._layers(True)
        n_leading = leading.shape[1]
        spread = leading.detach().unsqueeze(0).expand(self.members, -1, -1)
        held = torch.baddbmm(biases[0], spread, weights[0][:, :n_leading])
        weight = weights[0][:, n_leading:]

        def outputs(inputs: torch.Tensor) -> torch.Tensor:
            first = torch.baddbmm(held, inputs.unsqueeze(0).expand(self.members, -1, -1), weight)
            return self._above(first, weights, biases)

        return outputs

    def _layers(self, frozen: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        weights, biases = list(self.weights), list(self.biases)
        return (
            ([each.detach() for each in weights], [each.detach() for each in biases]) if frozen else (weights, biases)
        )

    def _above(
        self, first: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return what the layers above the first one make of its output."""
        hidden = first
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            hidden = torch.baddbmm(bias, self._activate(hidden), weight)
        return hidden
