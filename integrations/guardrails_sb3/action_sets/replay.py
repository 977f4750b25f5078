"""Sets that move under a replay buffer: which action a stored transition is learned from.

An off-policy host stores the action that its policy proposed, and learns what proposing it leads to; its target
asks the policy for its next proposal, so proposals are what the values must be of. While the sets stand still
that is one environment. When they move, a stored transition would speak of one that is no more: the proposal would
now be executed as another action. What stays true of it is the action that was *executed*. So when a width moves,
every stored transition is relabelled with its executed action, which a wider set executes as it is.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from guardrails_sb3.action_sets.base import Array, BoolArray

logger = logging.getLogger(__name__)


class ReplayedActions:
    """The executed action of each transition in a model's replay buffer, as far as they were seen.

    Args:
        model: the host, which may change its buffer for another.
    """

    def __init__(self, model: OffPolicyAlgorithm) -> None:
        self._model: Any = model  # its buffer may be exchanged at any time
        self._buffer: Any = None
        self._executed: Array = np.empty(0)
        self._known: BoolArray = np.empty(0, dtype=bool)
        self._pending: tuple[int, Array] | None = None

    def execute(self, actions: Array) -> None:
        """Note what is executed in the step that begins, ``(n_envs, ...)`` in the units of the action space."""
        self.settle()
        buffer: Any = self._model.replay_buffer
        if buffer is None:
            return
        if buffer is not self._buffer:
            self._follow(buffer)
        scaled = actions
        if isinstance(self._model.action_space, spaces.Box):
            scaled = self._model.policy.scale_action(actions)
        self._pending = buffer.pos, scaled.reshape(self._executed.shape[1:])

    def _follow(self, buffer: Any) -> None:
        self._buffer, self._pending = buffer, None
        self._executed = np.zeros_like(buffer.actions)
        self._known = np.zeros(len(buffer.actions), dtype=bool)

    def settle(self) -> None:
        """File what was executed last, if the host has stored that step since; else forget it."""
        self._file()
        self._pending = None

    def _file(self) -> None:
        buffer: Any = self._buffer
        if self._pending is None or buffer is not self._model.replay_buffer:
            return
        position, actions = self._pending
        if buffer.pos != position or len(self._known) == 1:
            self._executed[position] = actions
            self._known[position] = True
            self._pending = None

    def kept(self) -> tuple[Array, BoolArray]:
        """Return the executed actions of the model's buffer as it is, and which of its rows they are known of."""
        self._file()
        if self._buffer is not self._model.replay_buffer:
            self._follow(self._model.replay_buffer)
        return self._executed, self._known

    def adopt(self, executed: Array | None, known: BoolArray | None) -> None:
        """Follow the buffer that the model has loaded, with the executed actions that were saved beside it, if any."""
        self._follow(self._model.replay_buffer)
        if executed is not None and known is not None and executed.shape == self._executed.shape:
            self._executed[:], self._known[:] = executed, known
        filled = len(self._known) if self._buffer.full else self._buffer.pos
        unknown = int(np.count_nonzero(~self._known[:filled])) * self._buffer.n_envs
        if unknown:
            logger.warning(
                "The executed actions of %d transitions in the replay buffer are not known: they were collected or "
                "saved without these action sets. Those transitions keep the actions that the policy proposed, also "
                "when a width moves, and so they teach a safety critic that a shield relies on.",
                unknown,
            )

    def label(self, rows: Any, envs: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return the executed actions of stored steps, or ``actions`` as they are stored where they were not seen.

        Args:
            rows: ``(n_rows,)`` of the buffer.
            envs: ``(n_rows,)``, environments.
            actions: ``(n_rows, ...)``.
        """
        if self._buffer is None or self._buffer is not self._model.replay_buffer:
            return actions
        executed = torch.as_tensor(self._executed[rows, envs], device=actions.device).view_as(actions)
        known = torch.as_tensor(self._known[rows], device=actions.device)
        return torch.where(known.view(-1, *[1] * (actions.dim() - 1)), executed.to(actions.dtype), actions)

    def current(self, actions: Any) -> Any:
        """Return what is executed in the step under way as it would be stored; ``actions`` where it was not seen."""
        return actions if self._pending is None else self._pending[1]

    def relabel(self) -> None:
        """Let the host learn from the executed action of every transition that is stored by now."""
        self.settle()
        buffer: Any = self._buffer
        if buffer is not None and buffer is self._model.replay_buffer:
            buffer.actions[self._known] = self._executed[self._known]
