"""The safety critic of a Stable-Baselines3 host: what it is built of, and its risks in the host's own terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import nn

from guardrails import AttachError, ConfigurationError, Guard
from guardrails.critic import Ensemble, SafetyCritic, critic_unit
from guardrails_sb3.cost_value import own_extractor, own_randomness

_EXTREME = 1e6
"""Violation, in scales, at which a constraint whose penalty is 0 has none anywhere."""


class _Encoder(nn.Module):
    """The policy's preprocessing and its kind of features extractor, built anew."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self._space, self._normalize_images = policy.observation_space, policy.normalize_images
        self.extractor = own_extractor(policy)

    def forward(self, observations: Any) -> torch.Tensor:
        rows = preprocess_obs(observations, self._space, normalize_images=self._normalize_images)
        features: torch.Tensor = self.extractor(rows)
        return features


class HostCritic:
    """A `SafetyCritic` of the host's observations and actions, and the penalty that its risks come to.

    It shares nothing with the networks of the host, computes on the host's device, and draws nothing from
    the host's random generators.

    Args:
        model: the host; read, not changed.
        guard: has the constraints.
        settings: of the ensemble.
        horizon: T, steps of an episode.

    Attributes:
        extremes: ``(2, n_constraints)``, the least and the greatest cost of a step so far, and 0.

    Raises:
        AttachError: if actions are neither continuous nor one choice of several.
    """

    def __init__(self, model: BaseAlgorithm, guard: Guard, settings: Ensemble, horizon: int) -> None:
        space = model.action_space
        if not isinstance(space, (spaces.Box, spaces.Discrete)):
            raise AttachError(
                f"A safety critic judges continuous actions or one choice of several, but this {type(model).__name__} "
                f"acts in {space}. Use Box or Discrete actions, or leave the critic out."
            )
        self._model, self._guard = model, guard
        self.horizon, self.gamma = horizon, float(getattr(model, "gamma", 1.0))
        self._names = [part.name for part in guard.constraints]
        self._signs = [-1.0 if part.sense == ">=" else 1.0 for part in guard.constraints]
        scales = [part.violation_scale for part in guard.constraints]
        self._per_episode = critic_unit(horizon, self.gamma)
        self.units = np.array([scale * self._per_episode for scale in scales])
        self._seed = int(model.seed or 0)
        self._bounds = _bounds(space, model.device)
        self.extremes = np.zeros((2, len(self._names)))
        with own_randomness(self._seed, model.device):
            encoder = _Encoder(model.policy)
            self.critic = SafetyCritic(
                encoder,
                encoder.extractor.features_dim,
                int(space.n) if isinstance(space, spaces.Discrete) else int(np.prod(space.shape)),
                costs=self._names,
                units=self.units.tolist(),
                signs=self._signs,
                discrete=isinstance(space, spaces.Discrete),
                settings=settings,
                device=model.device,
                encoding=self._encoding(any(True for _ in encoder.parameters())),
            )

    def observe(self, costs: npt.NDArray[np.floating[Any]]) -> None:
        """Bound what the critic can expect by the least and the greatest costs of a step so far.

        A step costs no more than the most that one did, an episode may end at any time, and beyond a time limit the
        host bootstraps: so a cost-to-go lies between [c_min]₋ / (1 - γ) and [c_max]₊ / (1 - γ).

        Args:
            costs: ``(n_steps, n_constraints)``, finite, at least one row.
        """
        low, high = np.minimum(self.extremes[0], costs.min(axis=0)), np.maximum(self.extremes[1], costs.max(axis=0))
        if (low < self.extremes[0]).any() or (high > self.extremes[1]).any():
            self.extremes[:] = low, high
            self.restore(self.extremes)

    def restore(self, extremes: npt.NDArray[np.floating[Any]]) -> None:
        """Take up `extremes` as another object had them."""
        self.extremes[:] = extremes
        if self.gamma < 1.0:
            low, high = self.extremes / (1.0 - self.gamma)
            self.critic.bound(low.tolist(), high.tolist())

    def _encoding(self, learned: bool) -> Callable[[], AbstractContextManager[Any]]:
        """Return the context of the encoder: a learned one may draw random numbers, as dropout does."""
        if not learned:
            return nullcontext
        return lambda: own_randomness(self._seed + self.critic.updates, self._model.device)

    def risk(self, observations: Any, actions: Any, constraint: str | None = None) -> torch.Tensor:
        """Return the risk Q̄_c + κ σ of each action, ``(n_rows,)``, a discounted cost-to-go in the cost's unit.

        Differentiable in ``actions`` where that is a tensor that requires a gradient. `limit` is what to
        hold it against.

        Args:
            observations: a batch of them as ``model.predict`` takes it, or as tensors.
            actions: ``(n_rows, action_dim)`` in the units of the action space, or ``(n_rows,)`` indices; array
                or tensor.
            constraint: its name; may be left out where there is one.

        Raises:
            ConfigurationError: if there is no such constraint, or several and none is named.
        """
        asked = self._named(constraint)
        risks: torch.Tensor = self.critic.risk(self._observations(observations), self.scale(actions), asked)
        return risks

    def limit(self, constraint: str | None = None) -> float:
        """Return the limit in force of a constraint in the unit of `risk`: h = d (1 - γᵀ) / ((1 - γ) T).

        Raises:
            ConfigurationError: see `risk`.
        """
        part = self._guard.constraints[self.critic.index(self._named(constraint))]
        return float(part.bound * self._per_episode)

    def _named(self, constraint: str | None) -> str:
        """Return the name of the constraint that is asked for; ConfigurationError if that is none."""
        if constraint is None and len(self._names) == 1:
            return self._names[0]
        if constraint is None or constraint not in self._names:
            named = "none was named" if constraint is None else f"'{constraint}' is none of them"
            raise ConfigurationError(
                f"This safety critic judges {', '.join(self._names)}; {named}. Give constraint=, one of these."
            )
        return constraint

    def per_episode(self, risks: Any) -> Any:
        """Return risks in the unit of a limit per episode, d = h (1 - γ) T / (1 - γᵀ)."""
        return risks / self._per_episode

    def scale(self, actions: Any) -> torch.Tensor:
        """Return actions of the environment as the critic has learned them: cut to their bounds, in [-1, 1]."""
        kind = None if self.critic.discrete else torch.float32
        rows: torch.Tensor = torch.as_tensor(actions, dtype=kind, device=self._model.device)
        if self.critic.discrete:
            return rows.reshape(-1, 1)
        rows = rows.reshape(len(rows), -1)
        if self._bounds is None:
            return rows
        low, high = self._bounds
        cut = torch.minimum(torch.maximum(rows, low), high)
        scaled: torch.Tensor = 2.0 * (cut - low) / (high - low) - 1.0
        return scaled

    def _observations(self, observations: Any) -> Any:
        first = next(iter(observations.values())) if isinstance(observations, dict) else observations
        return observations if isinstance(first, torch.Tensor) else self._model.policy.obs_to_tensor(observations)[0]

    @property
    def acting(self) -> list[int]:
        """The constraints that have a penalty, now; the others need not be asked for."""
        return [
            index
            for index, part in enumerate(self._guard.constraints)
            if self._guard.penalty(part.name, part.bound + _EXTREME * part.violation_scale * self._signs[index])
        ]

    def penalty(self, risks: torch.Tensor, acting: Sequence[int] | None = None) -> torch.Tensor:
        """Return Σ ψ_i in the unit of the reward's Q, for risks ``(..., n_constraints)`` of actions.

        ψ_i = λ_i (Q_c - h_i) for most schedulers and ([λ + ρ (Q_c - h)]₊² - λ²) / 2ρ for the augmented
        Lagrangian, whose ρ counts per violation scale, as everywhere. Its derivative by Q_c is the multiplier in
        force, so λ weighs a unit of cost against a unit of reward on every host.

        Args:
            risks: of actions, in the costs' units.
            acting: what `acting` returned, for who has asked already; at least one constraint.
        """
        terms = []
        for index in self.acting if acting is None else acting:
            part = self._guard.constraints[index]
            unit = part.violation_scale * self._per_episode  # the limit and with it the scale may have moved
            terms.append(unit * self._guard.penalty(part.name, self.per_episode(risks[..., index])))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)


def _bounds(space: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the ends of a bounded continuous action space, flat."""
    if not isinstance(space, spaces.Box) or not space.is_bounded():
        return None
    low, high = (
        torch.as_tensor(end.reshape(1, -1), dtype=torch.float32, device=device) for end in (space.low, space.high)
    )
    return low, high


def horizon(model: BaseAlgorithm, given: int | None) -> int:
    """Return T, the steps of an episode: as given, or the time limit of the environments.

    Raises:
        AttachError: if it is given and no whole number of steps, or not given and the environments have none, or
            several.
    """
    if given is not None:
        if not isinstance(given, (int, np.integer)) or isinstance(given, bool) or given < 1:
            raise AttachError(f"wrap: horizon is {given!r}; give the steps of an episode, a whole number, at least 1.")
        return int(given)
    limits = set(_time_limits(model.env))
    if len(limits) != 1:
        found = f"their time limits are {sorted(limits)}" if limits else "they state no time limit"
        raise AttachError(
            "A limit per episode is converted into the unit of a discounted critic with the length of an episode, but "
            f"this {type(model).__name__}'s environments do not tell it: {found}. Give wrap(..., horizon=T), with T "
            "the steps of a typical episode."
        )
    return limits.pop()


def _time_limits(env: Any) -> list[int]:
    """Return the time limit of each environment, by its outermost wrapper or else its registration; empty without.

    What an environment in a process of its own does not have must not be asked for: that ends the process.
    """
    if env.has_attr("_max_episode_steps"):
        limits = list(env.get_attr("_max_episode_steps"))
    elif env.has_attr("spec"):
        limits = [getattr(spec, "max_episode_steps", None) for spec in env.get_attr("spec")]
    else:
        limits = []
    return [] if None in limits else [int(limit) for limit in limits]
