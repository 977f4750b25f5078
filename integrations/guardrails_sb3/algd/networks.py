"""The networks of a diffusion policy: a score network that knows its step, and twin critics evaluated as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from guardrails.critic.held import HeldEnsemble
from guardrails.critic.networks import EnsembleMLP

EMBEDDED = 16
"""Width of the learned embedding of a step."""


class ScoreNetwork(nn.Module):
    """A perceptron of state, action and an embedding of the step; ``heads`` outputs, the score φ(s, a, t) first.

    What the state and the step add to the first layer is computed once for all K steps.

    Args:
        n_features: width of the state.
        n_actions: dimensions of an action.
        steps: K.
        heads: outputs, each as wide as the action.
        hidden: widths of the hidden layers, at least one.
        activation: class of what stands between layers.
    """

    def __init__(
        self,
        n_features: int,
        n_actions: int,
        steps: int,
        heads: int,
        hidden: Sequence[int],
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.n_features, self.n_actions, self.heads = n_features, n_actions, heads
        self.embedding = nn.Embedding(steps, EMBEDDED)
        sizes = [n_features + n_actions + EMBEDDED, *hidden]
        self.layers: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]
            nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, hidden, strict=False)
        )
        self.activation = activation()
        self.head = nn.Linear(sizes[-1], heads * n_actions)

    def at(self, features: torch.Tensor) -> Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]:
        """Return the network as a function of action and step, with the state held at ``features``.

        Args:
            features: ``(n_rows, n_features)``.

        Returns:
            A function of ``(n_rows, n_actions)`` and a step, or ``(n_rows,)`` steps; its outputs are
            ``(n_rows, heads, n_actions)``.
        """
        of_features, of_actions, of_steps = torch.split(
            self.layers[0].weight, [self.n_features, self.n_actions, EMBEDDED], dim=1
        )
        states = nn.functional.linear(features, of_features, self.layers[0].bias)
        steps = nn.functional.linear(self.embedding.weight, of_steps)
        turned, activation, head = of_actions.t(), self.activation, self.head
        above = [(layer.weight, layer.bias) for layer in self.layers[1:]]

        def outputs(actions: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
            hidden = activation(torch.addmm(states + steps[t], actions, turned))
            for weight, bias in above:
                hidden = activation(nn.functional.linear(hidden, weight, bias))
            scores = nn.functional.linear(hidden, head.weight, head.bias)
            return scores.view(-1, self.heads, self.n_actions)

        return outputs


class TwinCritic(BaseModel):
    """Q_1, ..., Q_n of the reward, as SAC's own critic is called, but all evaluated as one.

    For actions that require a gradient, which is the actor's loss, the weights are held constant: SAC discards
    that gradient, and it would be half the work of the backward pass.

    Args:
        observation_space: of the environment.
        action_space: of the environment.
        net_arch: widths of the hidden layers.
        features_extractor: of the observations.
        features_dim: what it makes of one.
        normalize_images: whether images are divided by 255.
        n_critics: n ≥ 1.
        share_features_extractor: whether the extractor is the actor's, and not trained here.
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor, self.n_critics = share_features_extractor, n_critics
        n_inputs = features_dim + int(torch.Size(action_space.shape).numel())
        self.q_networks = EnsembleMLP(n_critics, n_inputs, 1, net_arch)

    def forward(self, obs: Any, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return Q_j(s, a), ``(n_rows, 1)`` each."""
        if torch.is_grad_enabled() and actions.requires_grad:
            return self.at(obs)(actions).unbind(0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        values: torch.Tensor = self.q_networks(torch.cat([features, actions], dim=1))
        return values.unbind(0)

    def q1_forward(self, obs: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return Q_1(s, a), ``(n_rows, 1)``."""
        return self.forward(obs, actions)[0]

    def at(self, obs: Any) -> HeldEnsemble:
        """Return Q, ``(n_critics, n_rows, 1)``, as a function of the actions alone; gradients reach nothing else."""
        with torch.no_grad():
            features = self.extract_features(obs, self.features_extractor)
        return self.q_networks.at(features)
