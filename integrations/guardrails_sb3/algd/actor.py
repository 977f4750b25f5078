"""The diffusion actor: K reverse steps from noise to an action, differentiable from the action back to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from guardrails_sb3.algd.networks import ScoreNetwork
from guardrails_sb3.algd.schedules import Schedule


@dataclass(frozen=True)
class Path:
    """Where a sampling led: what the score network was asked about on the way, without gradients.

    Args:
        observations: the batch it started from, as the actor was given it.
        actions: tanh(x_t) that step t was given, ``(K, n_rows, n_actions)``, t along the first axis.
    """

    observations: Any
    actions: torch.Tensor


class DiffusionActor(BasePolicy):
    """a = tanh(x), with x the end of K reverse steps that start from noise; in [-1, 1], as SAC's actors act.

    Its log-probability is not known in closed form and is given as 0, so SAC needs ``ent_coef=0.0``; the noise of the
    diffusion is what explores.

    Args:
        observation_space: of the environment.
        action_space: of the environment.
        net_arch: widths of the score network's hidden layers.
        features_extractor: of the observations.
        features_dim: what it makes of one.
        schedule: the diffusion.
        activation_fn: class of what stands between layers.
        normalize_images: whether images are divided by 255.

    Attributes:
        path: the last sampling that gradients can pass through, for losses that are taken along it.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        schedule: Schedule,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self.net_arch, self.features_dim = net_arch, features_dim
        self.schedule, self.activation_fn = schedule, activation_fn
        self.n_actions = int(torch.Size(action_space.shape).numel())
        self.network = ScoreNetwork(
            features_dim, self.n_actions, schedule.steps, schedule.heads, net_arch, activation_fn
        )
        self.path: Path | None = None

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "net_arch": self.net_arch,
            "features_extractor": self.features_extractor,
            "features_dim": self.features_dim,
            "schedule": self.schedule,
            "activation_fn": self.activation_fn,
        }

    def forward(self, obs: Any, deterministic: bool = False) -> torch.Tensor:
        """Return actions in [-1, 1], ``(n_rows, n_actions)``; the deterministic ones start from 0 and add no noise."""
        features = self.extract_features(obs, self.features_extractor)
        outputs_at, schedule = self.network.at(features), self.schedule
        steps, shape = schedule.steps, (len(features), self.n_actions)
        if deterministic:
            noises = None
            latents = features.new_zeros(shape)
        else:
            noises = torch.randn(steps, *shape, dtype=features.dtype, device=features.device)
            latents = noises[0] * schedule.start
        actions, visited = torch.tanh(latents), []
        for t in reversed(range(steps)):
            visited.append(actions)
            noise = None if noises is None or t == 0 else noises[steps - t]
            latents = schedule.reverse_step(latents, outputs_at(actions, t), t, noise)
            actions = torch.tanh(latents)
        if actions.requires_grad:
            self.path = Path(obs, torch.stack([each.detach() for each in reversed(visited)]))
        return actions

    def action_log_prob(self, obs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sampled actions and 0 for the logarithm of their probability, ``(n_rows,)``."""
        actions = self(obs)
        return actions, actions.new_zeros(len(actions))

    def scores(self, obs: Any, actions: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return φ(s, a, t), ``(n_rows, n_actions)``.

        Args:
            obs: as the host's networks take them.
            actions: in [-1, 1], ``(n_rows, n_actions)``.
            t: ``(n_rows,)`` steps.
        """
        features = self.extract_features(obs, self.features_extractor)
        return self.network.at(features)(actions, t)[:, 0]

    def _predict(self, observation: Any, deterministic: bool = False) -> torch.Tensor:
        actions: torch.Tensor = self(observation, deterministic)
        return actions
