"""Off-policy hosts (SAC, TQC, CrossQ, TD3, DDPG, DQN, QR-DQN): measured step by step, guarded by a safety critic.

The guard decides whenever episodes have ended, or on what the safety critic expects; what it decides acts in the
host's networks, through `guardrails_sb3.replay_critic` and `guardrails_sb3.off_policy_seams`. The host's ``train`` is
its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from guardrails import Guard, Rollout, StateError
from guardrails_sb3 import seams
from guardrails_sb3.costs import Episodes, cost_reader
from guardrails_sb3.critic_dual import CriticDual
from guardrails_sb3.endless import Endless
from guardrails_sb3.replay_critic import ReplayCritic
from guardrails_sb3.telemetry import record, record_all
from guardrails_sb3.trajectories import TRAJECTORY_COLUMNS, Trajectories

logger = logging.getLogger(__name__)

_CRITIC, _DUAL = "safety.", "dual."


class OffPolicyGuard(BaseCallback):
    """Measures costs step by step and asks the guard whenever episodes have ended.

    Before ``train`` runs, one row for each episode that has ended since goes to ``guard.step``, with the
    undiscounted sums of costs and of the rewards as the environment gave them. Episodes that ended before
    ``learning_starts`` were acted at random: they say nothing of the policy and are left out.

    Args:
        model: the host.
        guard: decides the multipliers.
        critic: learns the costs; None for a guard without constraints.
        dual_interval: None, or gradient steps between decisions on what the critic itself expects; see `CriticDual`.
    """

    model: OffPolicyAlgorithm

    def __init__(
        self, model: OffPolicyAlgorithm, guard: Guard, critic: ReplayCritic | None, dual_interval: int | None = None
    ) -> None:
        super().__init__()
        self._dual = None
        if critic is not None and dual_interval is not None:
            self._dual = CriticDual(guard, critic.host, int(dual_interval))
        self.guard, self.critic = guard, critic
        self._host = model
        self._names = [part.name for part in guard.constraints]
        self._readers = [cost_reader(part) for part in guard.constraints]
        self._episodes = Episodes(model.n_envs, self._names, seams.underway(model))
        self._trajectories = Trajectories(model.n_envs, guard.requires & TRAJECTORY_COLUMNS)
        self._endless = Endless(self._names if dual_interval is None else ())
        self._follows: tuple[Any, ...] = (seams.last_observations(model),)
        self._released = self._told = False

    def overlays(self) -> dict[str, Callable[..., Any]]:
        """Return the methods of the model that have to be replaced: ``train``, since no hook tells when it ends."""
        return {} if self.critic is None else {"train": self._within(self.critic, self._host.train)}

    def _within(self, critic: ReplayCritic, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> None:
            with critic.training():
                original(*args, **kwargs)

        return train

    def install(self) -> None:
        """Put hooks into the host's networks and follow its replay buffer."""
        if self.critic is not None:
            self.critic.install()

    def check(self) -> None:
        """Raise AttachError if something else has replaced one of the methods since."""
        if self.critic is not None:
            self.critic.check()

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the host's own, to be saved."""
        if self.critic is None:
            return nullcontext()
        if self.critic.host.critic.discrete and self.critic.host.acting and not self._told:
            self._told = True
            logger.warning(
                "The Q-network of this %s holds the reward alone, and the constraints act where its actions are "
                "chosen: what is saved acts without its constraints unless it is wrapped again, by wrap(..., "
                "resume=path).",
                type(self._host).__name__,
            )
        return self.critic.lifted()

    def release(self) -> None:
        """Take everything out, and do nothing from now on, also inside a ``learn`` that still holds this callback."""
        self._released = True
        if self.critic is not None:
            self.critic.release()

    def _on_training_start(self) -> None:
        if self._released:
            return
        if self.critic is not None:
            self.critic.start()
        if self._episodes.ended:  # in a collection that was cut off, here or before the run was saved
            self._judge_episodes()
        last = seams.last_observations(self._host)
        if any(last is known for known in self._follows):
            return
        everywhere = np.ones(self._host.n_envs, dtype=bool)
        self._episodes.begin(everywhere)
        self._trajectories.begin(everywhere)
        if self.critic is not None:
            self.critic.begin(everywhere)

    def _on_rollout_start(self) -> None:
        if not self._released and self.critic is not None:
            self.critic.collecting()

    def _on_step(self) -> bool:
        if self._released:
            return True
        infos, dones = self.locals["infos"], np.asarray(self.locals["dones"], dtype=bool)
        costs = np.array([[read(info) for read in self._readers] for info in infos], dtype=np.float64)
        normalizer = self._host.get_vec_normalize_env()
        rewards = self.locals["rewards"] if normalizer is None else normalizer.get_original_reward()
        ends = {(0, env): infos[env] for env in np.flatnonzero(dones).tolist()}
        self._episodes.add(costs[None], np.asarray(rewards)[None], dones[None], ends)
        if self._trajectories.columns:
            steps = {name: self._of_step(name)[None] for name in self._trajectories.columns}
            self._trajectories.add(steps, dones[None])
        if self.critic is not None:
            self.critic.step(infos, costs, dones, self.locals["buffer_actions"])
        if self._host.num_timesteps <= self._host.learning_starts and dones.any():
            self._take()  # acted at random
        # A callback that stops ``learn`` here leaves the host with the earlier of these.
        self._follows = (seams.last_observations(self._host), self.locals["new_obs"])
        return True

    def _of_step(self, name: str) -> npt.NDArray[Any]:
        if name == "observations":
            return np.array(seams.last_observations(self._host))
        actions = np.array(self.locals["actions"])
        return actions.reshape(len(actions), -1)

    def _on_rollout_end(self) -> None:
        if self._released:
            return
        decision = None if self._dual is None else self._dual.decide()
        if decision is not None:
            record(self.logger, decision, {})
        if self._episodes.ended:
            self._judge_episodes()
        self._endless.look(self._episodes.lengths)

    def _take(self) -> tuple[Rollout, dict[str, float]]:
        """Return the episodes that have ended since the last call, and metrics of the critic."""
        missed, metrics = (None, {}) if self.critic is None else self.critic.take()
        return self._episodes.take(missed, **self._trajectories.take()), metrics

    def _judge_episodes(self) -> None:
        rollout, metrics = self._take()
        if self._dual is None:
            record(self.logger, self.guard.step(rollout), metrics)
            return
        metrics |= {f"{name}/episode_cost": float(np.mean(rollout.cost(name))) for name in self._names}
        judged = self._dual.judge(rollout)
        if judged is None:
            record_all(self.logger, metrics)
        else:
            record(self.logger, judged, metrics)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs besides the guard's state and the replay buffer."""
        named = {f"episodes.{name}": sums for name, sums in self._episodes.tensors().items()}
        named |= {f"trajectories.{name}": steps for name, steps in self._trajectories.tensors().items()}
        ended = self._episodes.pending(infos="infos" in self.guard.requires)
        named |= {f"episodes.{name}": each for name, each in ended.items()}
        named |= {f"trajectories.{name}": steps for name, steps in self._trajectories.pending().items()}
        if self.critic is not None:
            named |= {f"{_CRITIC}{name}": tensor for name, tensor in self.critic.tensors().items()}
        if self._dual is not None:
            named |= {f"{_DUAL}{name}": tensor for name, tensor in self._dual.tensors().items()}
        return named

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        """Restore what `tensors` returned.

        Args:
            tensors: what `tensors` returned.
            names: the constraints of the saved guard, in its order, which is that of the tensors' columns.

        Raises:
            StateError: if the run was saved with other constraints, another ensemble or another architecture.
        """
        if sorted(names) == sorted(self._names) and list(names) != self._names:
            raise StateError(
                f"The run was saved with its constraints in the order {', '.join(names)}. Give the guard its "
                "constraints in that order to resume it."
            )

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        lengths = tensors.get("episodes.lengths")
        if lengths is None:
            raise StateError(
                f"The state was not saved by an off-policy algorithm, as {type(self._host).__name__} is. Resume it "
                "with the algorithm it was saved with."
            )
        running = tuple(lengths.shape) == self._episodes.lengths.shape
        if self.critic is not None:
            self.critic.load_tensors(part(_CRITIC), running=running)
        if self._dual is not None:
            self._dual.load_tensors(part(_DUAL))
        self._trajectories.load_tensors(part("trajectories."), running=running)
        self._episodes.load_tensors(part("episodes."))
