"""DiffusionPolicy: a policy class for Stable-Baselines3's SAC whose actor is a diffusion."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import Schedule as LearningRate
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from guardrails import ConfigurationError
from guardrails_sb3.algd.actor import DiffusionActor
from guardrails_sb3.algd.networks import TwinCritic
from guardrails_sb3.algd.schedules import Schedule, named_schedule
from guardrails_sb3.algd.score import ScoreMatching


class DiffusionPolicy(SACPolicy):
    """A diffusion actor and twin critics, ``SAC(DiffusionPolicy, env, ent_coef=0.0, policy_kwargs=dict(sde="ve"))``.

    On its own it is a plain diffusion policy that climbs min_j Q_j. `guardrails_sb3.wrap` adds the penalty of a guard's
    constraints and the score-matching loss.

    Args:
        observation_space: of the environment.
        action_space: of the environment, a bounded Box.
        lr_schedule: learning rate, given by the host.
        net_arch: widths of the hidden layers, for actor and critic alike or ``{"pi": ..., "qf": ...}``. Default: 3
            of 128, and 2 of 256.
        activation_fn: of the actor; the critics have ReLU.
        use_sde: Stable-Baselines3's state-dependent exploration, which a diffusion has no use for.
        features_extractor_class: of the observations; ``CombinedExtractor`` for a dict of them.
        features_extractor_kwargs: its arguments.
        normalize_images: whether images are divided by 255.
        optimizer_class: of actor and critics.
        optimizer_kwargs: its arguments; an Adam is fused unless they say otherwise.
        n_critics: critics of the reward.
        share_features_extractor: whether the critics use the actor's extractor.
        sde: the diffusion: ``"ve"``, ``"ddpm"``, or a schedule such as ``ve_schedule(5, sigma_max=0.5)``.
        steps: K ≥ 1, of a diffusion that is given by name.
        score_matching: settings of the score loss that a guard adds.

    Raises:
        ConfigurationError: if the diffusion is not known, a network has no hidden layer, ``use_sde`` is asked for, or
            observations are a dict and the features extractor is not one for them.
    """

    actor: DiffusionActor  # type: ignore[assignment]  # it is called as SAC's own actor is
    critic: TwinCritic  # type: ignore[assignment]
    critic_target: TwinCritic  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: LearningRate,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        use_sde: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        *,
        sde: str | Schedule = "ve",
        steps: int = 5,
        score_matching: ScoreMatching | None = None,
    ) -> None:
        if use_sde:
            raise ConfigurationError(
                "DiffusionPolicy explores by the noise of its diffusion; use_sde explores for Gaussian ones. "
                "Leave use_sde out."
            )
        widths = {"pi": [128, 128, 128], "qf": [256, 256]} if net_arch is None else net_arch
        if not (all(widths.values()) if isinstance(widths, dict) else widths):
            raise ConfigurationError(
                f"DiffusionPolicy: net_arch is {net_arch!r}; give actor and critic at least one hidden layer each."
            )
        if isinstance(observation_space, spaces.Dict) and features_extractor_class is FlattenExtractor:
            raise ConfigurationError(
                "DiffusionPolicy: observations are a dict, which FlattenExtractor cannot take. Give "
                "policy_kwargs=dict(features_extractor_class=CombinedExtractor), which is in "
                "stable_baselines3.common.torch_layers."
            )
        # SACPolicy builds all networks in its constructor.
        self.diffusion = named_schedule(sde, steps)
        self.score_matching = ScoreMatching() if score_matching is None else score_matching
        if optimizer_class is torch.optim.Adam and not {"foreach", "differentiable"} & set(optimizer_kwargs or ()):
            optimizer_kwargs = {"fused": True} | (optimizer_kwargs or {})
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            widths,
            activation_fn,
            features_extractor_class=features_extractor_class,
            features_extractor_kwargs=features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            n_critics=n_critics,
            share_features_extractor=share_features_extractor,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        for name in ("use_sde", "log_std_init", "use_expln", "clip_mean"):
            del data[name]
        return data | {
            "share_features_extractor": self.share_features_extractor,
            "sde": self.diffusion,
            "score_matching": self.score_matching,
        }

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """Return a new actor."""
        kwargs = self._update_features_extractor(self.net_args, features_extractor)
        return DiffusionActor(**kwargs, schedule=self.diffusion).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """Return new critics."""
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        del kwargs["activation_fn"]
        return TwinCritic(**kwargs).to(self.device)
