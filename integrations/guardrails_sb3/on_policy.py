"""On-policy hosts (PPO, A2C, TRPO, RecurrentPPO, MaskablePPO): cost advantages mixed in at rollout end.

Stable-Baselines3 calls ``on_rollout_end`` after it has computed advantages and before ``train``; what
stands in ``rollout_buffer.advantages`` then is what it trains on. Returns, and so the host's own value
function, are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from guardrails import Guard, Rollout, StateError
from guardrails_sb3 import seams
from guardrails_sb3.advantages import FloatArray, gae, measurable, mix
from guardrails_sb3.cost_value import CostValue, Observations
from guardrails_sb3.costs import Episodes, Info, cost_reader
from guardrails_sb3.endless import Endless
from guardrails_sb3.rollout_critic import RolloutCritic
from guardrails_sb3.telemetry import record
from guardrails_sb3.trajectories import TRAJECTORY_COLUMNS, Trajectories

logger = logging.getLogger(__name__)


class OnPolicyGuard(BaseCallback):
    """Measures costs step by step, asks the guard once per rollout, and mixes the advantages.

    Per rollout: one row for each episode that ended in it, with the undiscounted sums of costs and of
    the rewards as the environment gave them (before ``VecNormalize``), goes to ``guard.step``; where a metric
    reads them, with the actions as the host hands them to its environments (the policy's own, before an
    ``action_scale``: steadiness that the guard itself enforces earns nothing) and the observations they answer.
    Cost advantages come from GAE with the host's γ and λ; then
    A = (A_r - Σ λ_i A_{c_i}) / (1 + Σ λ_i) replaces ``rollout_buffer.advantages``, with the sign of A_c
    turned for a lower limit.

    Args:
        model: the host.
        guard: decides the multipliers.
        cost_critic: estimate A_c with a learned cost value function, which bootstraps at time limits
            and at the rollout's end. Without it A_c is the discounted cost-to-go within the rollout
            less its mean: cheaper, noisier, and blind to costs beyond the rollout's end.
        critic: a safety critic that learns from the rollouts besides, for those who ask it; no advantage is
            taken from it.
    """

    model: OnPolicyAlgorithm

    def __init__(
        self, model: OnPolicyAlgorithm, guard: Guard, *, cost_critic: bool = True, critic: RolloutCritic | None = None
    ) -> None:
        super().__init__()
        self.critic = critic
        constraints = guard.constraints
        self.guard = guard
        self._names = [part.name for part in constraints]
        self._readers = [cost_reader(part) for part in constraints]
        self._signs = [-1.0 if part.sense == ">=" else 1.0 for part in constraints]
        self._scales = [part.violation_scale for part in constraints]
        self._episodes = Episodes(model.n_envs, self._names, seams.underway(model))
        self._trajectories = Trajectories(model.n_envs, guard.requires & TRAJECTORY_COLUMNS)
        self._endless = Endless(self._names)
        self._follows: tuple[npt.NDArray[np.bool_], ...] = (seams.episode_starts(model),)
        self._critic = CostValue(model, self._scales) if cost_critic and constraints else None
        self.looks = bool(constraints or guard.gates)  # else nothing is measured: action sets of fixed width, say
        self._allocate(0)
        self._released = False

    def _allocate(self, n_steps: int) -> None:
        n_envs = self._episodes.costs.shape[0]
        self._costs: FloatArray = np.zeros((n_steps, n_envs, len(self._names)))
        self._rewards: FloatArray = np.zeros((n_steps, n_envs))
        self._dones: npt.NDArray[np.bool_] = np.zeros((n_steps, n_envs), dtype=bool)
        self._steps: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._trajectories.columns}
        self._final_infos: dict[tuple[int, int], Info] = {}
        self._position = self._summed = 0

    def overlays(self) -> dict[str, Callable[..., Any]]:
        """Return the methods of the model that have to be replaced: none, all is done by callbacks."""
        return {}

    def install(self) -> None:
        """Do nothing: the host's networks and buffer are left alone."""

    def check(self) -> None:
        """Do nothing: there is nothing that could have been replaced."""

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context in which nothing of this is in the model, which is always so."""
        return nullcontext()

    def release(self) -> None:
        """Do nothing from now on, also inside a ``learn`` call that still holds this callback."""
        self._released = True

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """Take up the host's variables as they are; a copy at every step would take longer than what is read of it."""
        self.locals = locals_

    def _on_rollout_start(self) -> None:
        if self._released or not self.looks:
            return
        self._sum_episodes()
        self._allocate(self.model.rollout_buffer.buffer_size)
        self._take()  # episodes of a rollout that was cut off
        if self.critic is not None and len(self._follows) > 1:  # it has seen nothing of that one
            self.critic.begin(np.ones(self._dones.shape[1], dtype=bool))
        starts = seams.episode_starts(self.model)
        if not any(np.shares_memory(starts, known) for known in self._follows):  # the host has reset its environments
            self._episodes.begin(starts)
            self._trajectories.begin(starts)
            if self.critic is not None:
                self.critic.begin(starts)
        self._follows = (starts,)

    def _on_step(self) -> bool:
        if self._released:
            return True
        step, infos = self._position, self.locals["infos"]
        row = self._costs[step]
        for index, read in enumerate(self._readers):
            for env, info in enumerate(infos):
                row[env, index] = read(info)
        normalizer = self.model.get_vec_normalize_env()
        self._rewards[step] = self.locals["rewards"] if normalizer is None else normalizer.get_original_reward()
        for name, steps in self._steps.items():
            steps.append(self._actions() if name == "actions" else np.array(seams.last_observations(self.model)))
        self._dones[step] = dones = self.locals["dones"]
        for env, done in enumerate(dones.tolist()):
            if done:
                self._final_infos[step, env] = infos[env]
        self._position += 1
        # A callback that stops ``learn`` here leaves the host with the earlier of these.
        self._follows = (self._follows[-1], dones)
        return True

    def _actions(self) -> npt.NDArray[Any]:
        """Return the actions of this step as the host hands them to its environments, ``(n_envs, action_dim)``."""
        actions = np.array(self.locals.get("clipped_actions", self.locals["actions"]))
        return actions.reshape(len(actions), -1)

    def _take(self, missed: Sequence[FloatArray] | None = None) -> Rollout:
        return self._episodes.take(missed, **self._trajectories.take())

    def _truncated(self) -> npt.NDArray[np.bool_]:
        """Return which steps were the last of an episode that a time limit cut short, ``(n_steps, n_envs)``."""
        truncated = np.zeros_like(self._dones)
        for place, info in self._final_infos.items():
            truncated[place] = info.get("TimeLimit.truncated", False)
        return truncated

    def _sum_episodes(self) -> None:
        """Add the steps since the last call to their episodes."""
        steps = slice(self._summed, self._position)
        finals = {(step - self._summed, env): info for (step, env), info in self._final_infos.items()}
        self._episodes.add(self._costs[steps], self._rewards[steps], self._dones[steps], finals)
        kept = {name: np.stack(rows) for name, rows in self._steps.items() if rows}
        self._trajectories.add(kept, self._dones[steps])
        self._steps = {name: [] for name in self._steps}
        self._summed = self._position

    def _on_rollout_end(self) -> None:
        if self._released:
            return
        self._follows = self._follows[-1:]
        if not self.looks:
            starts = np.append(self.model.rollout_buffer.episode_starts[1:], seams.episode_starts(self.model))
            record(self.logger, self.guard.step(Rollout(lengths=np.full(np.count_nonzero(starts), np.nan))), {})
            return
        self._sum_episodes()
        self._endless.look(self._episodes.lengths)
        costs = measurable(self._costs, self._scales, self._signs)
        judged: dict[str, float] = {}
        if self.critic is None:
            decision = self.guard.step(self._take())
        else:
            buffer, truncated = self.model.rollout_buffer, self._truncated()
            observations = _flatten(buffer.observations, buffer.obs_shape)
            missed, judged = self.critic.foresee(observations, buffer.actions, costs, self._dones, truncated)
            decision = self.guard.step(self._take(missed))
            judged |= self.critic.fit(observations, buffer.actions, costs, self._dones, truncated, decision.step)
        losses = np.empty(0)
        if self._critic is None:
            advantages = self._costs_to_go(costs)
        else:
            advantages, losses = self._judge(self._critic, costs, decision.step)
        buffer = self.model.rollout_buffer
        lam = [decision.multipliers[name] for name in self._names]
        buffer.advantages[:] = mix(buffer.advantages, advantages, lam, self._signs)
        further = {f"{name}/value_loss": float(loss) for name, loss in zip(self._names, losses, strict=False)}
        record(self.logger, decision, further | judged)

    def _judge(self, critic: CostValue, costs: FloatArray, step: int) -> tuple[FloatArray, FloatArray]:
        """Return A_c by the cost value function as it is, and its losses while it learns from this rollout."""
        buffer, n_steps, n_envs = self.model.rollout_buffer, *costs.shape[:2]
        steps = _flatten(buffer.observations, buffer.obs_shape)
        timeouts = self._timeouts()
        beyond = [seams.last_observations(self.model), *timeouts.values()]
        everything = _concatenate([steps, *(_flatten(rows, buffer.obs_shape) for rows in beyond)])
        values, last, terminal = np.split(critic.predict(everything), [n_steps * n_envs, (n_steps + 1) * n_envs])
        values = values.reshape(costs.shape)
        for place, value in zip(timeouts, terminal, strict=True):
            costs[place] += self.model.gamma * value
        advantages = self._gae(costs, values, last, self.model.gae_lambda)
        return advantages, critic.fit(steps, (advantages + values).reshape(-1, costs.shape[2]), step)

    def _costs_to_go(self, costs: FloatArray) -> FloatArray:
        """Return the discounted cost-to-go within the rollout, less its mean over the rollout."""
        togo = self._gae(costs, np.zeros_like(costs), np.zeros(costs.shape[1:]), 1.0)
        centred: FloatArray = togo - togo.mean(axis=(0, 1))
        return centred

    def _gae(self, costs: FloatArray, values: FloatArray, last: FloatArray, gae_lambda: float) -> FloatArray:
        return gae(costs, values, last, self._dones, gamma=self.model.gamma, gae_lambda=gae_lambda)

    def _timeouts(self) -> dict[tuple[int, int], Any]:
        """Return the last observation of each episode that a time limit cut short, by step and environment."""
        terminal = {place: info.get("terminal_observation") for place, info in self._final_infos.items()}
        return {
            place: observation
            for place, observation in terminal.items()
            if observation is not None and self._final_infos[place].get("TimeLimit.truncated", False)
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs besides the guard's state."""
        self._sum_episodes()
        named = {f"episodes.{name}": sums for name, sums in self._episodes.tensors().items()}
        named |= {f"trajectories.{name}": steps for name, steps in self._trajectories.tensors().items()}
        if self.critic is not None:
            named |= {f"safety.{name}": tensor for name, tensor in self.critic.tensors().items()}
        return named | ({} if self._critic is None else self._critic.tensors())

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        """Restore what `tensors` returned.

        Args:
            tensors: what `tensors` returned.
            names: the constraints of the saved guard, in its order, which is that of the tensors' columns.

        Raises:
            StateError: if the run was saved with another setting of ``cost_critic``, other constraints or
                another policy architecture.
        """
        if sorted(names) == sorted(self._names) and list(names) != self._names:
            raise StateError(
                f"The run was saved with its constraints in the order {', '.join(names)}. Give the guard its "
                "constraints in that order to resume it."
            )
        saved = any(name.startswith("network.") for name in tensors)
        if saved != (self._critic is not None):
            raise StateError(
                f"The run was saved with cost_critic={saved}. Give wrap(..., cost_critic={saved}) to resume it."
            )
        if self._critic is not None:
            self._critic.load_tensors(tensors)
        judged = _part(tensors, "safety.")
        if self.critic is not None:
            self.critic.load_tensors(judged)
        elif judged:
            logger.warning(
                "The run was saved with a safety critic, which is dropped here. Give wrap(..., "
                "cost_critic=Ensemble(...)) to resume with it."
            )
        if self._episodes.load_tensors(_part(tensors, "episodes.")):
            self._trajectories.load_tensors(_part(tensors, "trajectories."))


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _flatten(observations: Any, shape: Any) -> Observations:
    """Return observations as rows of ``shape``, whatever leading axes they have."""
    if isinstance(shape, dict):
        return {key: np.asarray(observations[key]).reshape(-1, *shape[key]) for key in shape}
    return np.asarray(observations).reshape(-1, *shape)


def _concatenate(parts: list[Any]) -> Observations:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)
