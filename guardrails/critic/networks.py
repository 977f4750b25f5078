"""A whole ensemble of multilayer perceptrons, evaluated as one, and behind an encoder of observations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from guardrails.critic.ensemble import Ensemble
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


class Members(nn.Module):
    """Encoder and perceptrons; ``(members, n_rows, n_actions, n_costs)``, with one action where actions are inputs.

    Args:
        encoder: makes ``(n_rows, n_features)`` of a batch of observations.
        n_features: what it makes of one.
        n_actions: dimensions of an action, or their number where they are discrete.
        n_costs: outputs for each action.
        settings: size and activation.
        discrete: actions are indices.
    """

    def __init__(
        self, encoder: nn.Module, n_features: int, n_actions: int, n_costs: int, settings: Ensemble, *, discrete: bool
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.discrete, self.n_outputs, self.n_costs = discrete, (n_actions if discrete else 1), n_costs
        n_inputs = n_features if discrete else n_features + n_actions
        self.perceptrons = EnsembleMLP(
            settings.members, n_inputs, self.n_outputs * n_costs, settings.hidden, settings.activation
        )

    def forward(self, features: torch.Tensor, actions: torch.Tensor | None, frozen: bool = False) -> torch.Tensor:
        """Return the outputs of every member.

        Args:
            features: of the encoder.
            actions: ``(n_rows, n_actions)``, None where they are indices.
            frozen: let gradients pass to features and actions only.
        """
        inputs = features if actions is None else torch.cat([features, actions], dim=1)
        outputs: torch.Tensor = self.perceptrons(inputs, frozen=frozen)
        return outputs.view(len(outputs), len(features), self.n_outputs, self.n_costs)

    def chosen(self, outputs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the actions taken, ``(members, n_rows, n_costs)``.

        Args:
            outputs: of every action.
            actions: as `forward` was given them, or indices, ``(n_rows, 1)``.
        """
        if not self.discrete:
            return outputs[:, :, 0]
        index = actions.long().view(1, -1, 1, 1).expand(len(outputs), -1, -1, outputs.shape[-1])
        return outputs.gather(2, index)[:, :, 0]
