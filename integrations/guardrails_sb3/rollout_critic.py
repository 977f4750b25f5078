"""A safety critic that learns from the rollouts of an on-policy host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from guardrails import Guard
from guardrails.critic import Ensemble, Transitions
from guardrails_sb3.predictions import Predictions
from guardrails_sb3.safety_critic import HostCritic

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_BATCH = 256
_FORWARD_ROWS = 8192
"""Rows of one forward pass: bounds the memory that image observations take."""


class RolloutCritic:
    """Q_c of the policy, from consecutive steps of each rollout: the next action is the one then taken.

    A step whose episode a time limit cut short, and the last one of a rollout, have no next action and teach
    nothing. Each rollout is gone through as often as the host goes through it, in batches of 256.

    Args:
        model: the host; read, not changed.
        guard: has the constraints.
        settings: of the ensemble.
        horizon: steps of an episode.
    """

    def __init__(self, model: OnPolicyAlgorithm, guard: Guard, settings: Ensemble, horizon: int) -> None:
        self.host = HostCritic(model, guard, settings, horizon)
        self._names = [part.name for part in guard.constraints]
        self._scales = np.array([part.violation_scale for part in guard.constraints])
        signs = [-1.0 if part.sense == ">=" else 1.0 for part in guard.constraints]
        self._predictions = Predictions(model.n_envs, self.host.units, signs, horizon, self.host.gamma)
        self._device, self._seed = model.device, int(model.seed or 0)
        policy: Any = model.policy
        self._squashed = bool(getattr(policy, "squash_output", False)) and not self.host.critic.discrete
        self._epochs = int(getattr(model, "n_epochs", getattr(model, "n_critic_updates", 1)))
        self.executed: Callable[[], npt.NDArray[Any]] | None = None
        """Returns the actions that are to be judged of this rollout, where they are not those in the host's buffer.

        ``(n_steps, n_envs, ...)`` in the units of the action space.
        """

    def begin(self, starts: BoolArray) -> None:
        """Forget the environments in ``starts``: they begin an episode."""
        self._predictions.begin(starts)

    def foresee(
        self, observations: Any, actions: npt.NDArray[Any], costs: FloatArray, dones: BoolArray, truncated: BoolArray
    ) -> tuple[list[FloatArray], dict[str, float]]:
        """Hold the critic, as it is, against the costs of a rollout.

        Args:
            observations: n_steps * n_envs rows, step by step.
            actions: ``(n_steps, n_envs, ...)``.
            costs: ``(n_steps, n_envs, n_constraints)``, finite.
            dones: ``(n_steps, n_envs)``, whether a step ended its episode.
            truncated: ``(n_steps, n_envs)``, whether by a time limit.

        Returns:
            What was missed of each episode that ended, in the costs' units, and metrics for the log.
        """
        rows, chosen = self._torch(observations), self._actions(actions)
        means, risks = (part.reshape(costs.shape) for part in self._judged(rows, chosen))
        for step in range(len(costs)):
            if self._predictions.due:
                self._predictions.predict(means[step], risks[step])
            self._predictions.step(costs[step], dones[step], truncated[step])
        judged, sizes, covered = self._predictions.take()
        missed = [each * self._scales for each in judged]
        if sizes is None or covered is None:
            return missed, {}
        metrics = {f"{name}/critic_error": float(sizes[index]) for index, name in enumerate(self._names)}
        return missed, metrics | {f"{name}/critic_coverage": float(covered[i]) for i, name in enumerate(self._names)}

    def _judged(self, rows: Any, actions: torch.Tensor) -> tuple[FloatArray, FloatArray]:
        parts = []
        with torch.no_grad():
            for start in range(0, len(actions), _FORWARD_ROWS):
                chunk = slice(start, start + _FORWARD_ROWS)
                values = self.host.critic.values(_chosen(rows, chunk), actions[chunk])
                parts.append(torch.stack([values.mean(dim=0), self.host.critic.combine(values)]))
        means, risks = torch.cat(parts, dim=1).cpu().double().numpy()
        return means, risks

    def fit(
        self,
        observations: Any,
        actions: npt.NDArray[Any],
        costs: FloatArray,
        dones: BoolArray,
        truncated: BoolArray,
        step: int,
    ) -> dict[str, float]:
        """Learn from a rollout; arguments as for `foresee`.

        Args:
            observations: see `foresee`.
            actions: see `foresee`.
            costs: see `foresee`.
            dones: see `foresee`.
            truncated: see `foresee`.
            step: number of the rollout; with the model's seed it fixes the shuffle.

        Returns:
            Metrics for the log.
        """
        n_steps, n_envs = dones.shape
        self.host.observe(costs.reshape(n_steps * n_envs, -1))
        followed = ~truncated
        followed[-1] &= dones[-1]
        places = np.flatnonzero(followed.ravel())
        following = np.minimum(places + n_envs, n_steps * n_envs - 1)
        rows, chosen = self._torch(observations), self._actions(actions)
        per_row = torch.as_tensor(costs.reshape(n_steps * n_envs, -1), dtype=torch.float32, device=self._device)
        ended = torch.as_tensor(dones.reshape(-1, 1), dtype=torch.float32, device=self._device)
        shuffle = np.random.default_rng((self._seed, step))
        for _ in range(self._epochs):
            order = shuffle.permutation(len(places))
            for start in range(0, len(order), _BATCH):
                picked = order[start : start + _BATCH]
                here, there = (torch.as_tensor(part[picked], device=self._device) for part in (places, following))
                now, after = _chosen(rows, here), _chosen(rows, there)
                self.host.critic.update(
                    Transitions(now, chosen[here], per_row[here], after, chosen[there], ended[here], self.host.gamma)
                )
        return {f"{self._names[0]}/critic_loss": self.host.critic.take_loss()}

    def _actions(self, actions: npt.NDArray[Any]) -> torch.Tensor:
        """Return the actions of a rollout in [-1, 1], as the critic learns them and a squashing policy has its own."""
        squashed = self._squashed and self.executed is None
        actions = actions if self.executed is None else self.executed()
        rows = actions.reshape(-1, *actions.shape[2:])
        if squashed:
            return torch.as_tensor(rows, dtype=torch.float32, device=self._device).reshape(len(rows), -1)
        return self.host.scale(rows)

    def _torch(self, observations: Any) -> Any:
        if isinstance(observations, dict):
            return {key: torch.as_tensor(values, device=self._device) for key, values in observations.items()}
        return torch.as_tensor(observations, device=self._device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs."""
        predictions = {f"predictions.{name}": tensor for name, tensor in self._predictions.tensors().items()}
        critic = {f"critic.{name}": tensor for name, tensor in self.host.critic.tensors().items()}
        return predictions | critic | {"costs.extremes": torch.from_numpy(self.host.extremes.copy())}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""
        parts: dict[str, dict[str, torch.Tensor]] = {"critic": {}, "predictions": {}, "costs": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        self.host.critic.load_tensors(parts["critic"])
        self.host.restore(parts["costs"]["extremes"].numpy())
        self._predictions.load_tensors(parts["predictions"])


def _chosen(observations: Any, rows: Any) -> Any:
    if isinstance(observations, dict):
        return {key: values[rows] for key, values in observations.items()}
    return observations[rows]
