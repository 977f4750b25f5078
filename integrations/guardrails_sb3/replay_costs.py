"""Costs of the transitions in a replay buffer: a column of their own beside it, read by the rows the host samples.

Costs are never mixed into rewards, so a multiplier that moves leaves nothing stale behind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from guardrails import AttachError
from guardrails_sb3 import seams
from guardrails_sb3.overlay import Overlay

Costs = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class ReplayCosts:
    """The costs of each transition that a replay buffer holds; NaN where the cost is not known.

    Rows are those of the buffer, so the column wraps around when it does; all rows that one call of its ``add`` stores
    have the costs of that step. With an `NStepReplayBuffer` a row's cost
    is the discounted sum over the steps that its reward sums. A relabelled goal (hindsight experience replay)
    changes the reward of a transition and not its cost.

    Args:
        buffer: of the host.
        n_costs: constraints.
        read: returns the costs of a step, ``(n_envs, n_costs)`` and finite, of its infos.
        deliver: is given each batch that the host samples, with its costs, ``(n_rows, n_costs)``.
        label: returns the actions that ``deliver`` is to see, given rows, environments and the actions stored.

    Attributes:
        complete: whether the costs of the batch that was sampled last are all known.

    Raises:
        AttachError: if the buffer draws its rows in a way of its own.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        n_costs: int,
        read: Callable[[Any], npt.NDArray[np.float64]],
        deliver: Callable[[Any, torch.Tensor], None],
        label: Callable[[Indices, Indices, torch.Tensor], torch.Tensor],
    ) -> None:
        self.buffer = buffer
        self.values: Costs = np.full((buffer.buffer_size, buffer.n_envs, n_costs), np.nan, dtype=np.float32)
        self._read, self._deliver, self._label = read, deliver, label
        self.complete = False
        self._rows: list[tuple[Indices, Indices]] = []
        drawing = seams.drawing(buffer)
        methods = {name: self._drawn(getattr(buffer, name), known=known) for name, known in drawing.items()}
        methods |= {"add": self._adding(buffer.add), "sample": self._sampling(buffer.sample)}
        self._overlay = Overlay(buffer, methods)

    def install(self) -> None:
        """Follow the buffer from now on."""
        self._overlay.install()

    def remove(self) -> None:
        """Leave the buffer as it was."""
        self._overlay.remove()

    def check(self) -> None:
        """Raise AttachError if something else has replaced one of the buffer's methods since."""
        self._overlay.check()

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context in which the buffer is the host's own, to be pickled."""
        return self._overlay.lifted()

    @property
    def unknown(self) -> int:
        """How many transitions in the buffer have a cost that is not known."""
        filled = self.buffer.buffer_size if self.buffer.full else self.buffer.pos
        return int(np.isnan(self.values[:filled]).any(axis=2).sum())

    def _adding(self, original: Callable[..., None]) -> Callable[..., None]:
        def add(obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
            position, size = self.buffer.pos, self.buffer.buffer_size
            costs = self._read(infos)
            original(obs, next_obs, action, reward, done, infos)
            stored = 1 if size == 1 else (self.buffer.pos - position) % size  # a subclass may store several, or none
            self.values[(position + np.arange(stored)) % size] = costs

        return add

    def _drawn(self, original: Callable[..., Any], *, known: bool) -> Callable[..., Any]:
        """Note the rows that a method of the buffer is asked for; environments it draws itself are drawn again.

        Args:
            original: the buffer's method.
            known: whether it is told the environments of its rows.
        """

        def draw(batch_inds: Any, *args: Any, **kwargs: Any) -> Any:
            if known:
                envs = args[0] if args else kwargs["env_indices"]
            elif self.buffer.n_envs == 1:
                envs = np.zeros(len(batch_inds), dtype=np.int64)
            else:
                envs = seams.next_environments(len(batch_inds), self.buffer.n_envs)
            self._rows.append((np.asarray(batch_inds), np.asarray(envs)))
            return original(batch_inds, *args, **kwargs)

        return draw

    def _sampling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def sample(*args: Any, **kwargs: Any) -> Any:
            self._rows = []
            samples = original(*args, **kwargs)
            if sum(len(rows) for rows, _ in self._rows) != len(samples.actions):
                raise seams.foreign_drawing(self.buffer)
            rows, envs = (np.concatenate(part) for part in zip(*self._rows, strict=True))
            taken = torch.as_tensor(self.buffer.actions[rows, envs], device=samples.actions.device)
            if not torch.equal(taken.view_as(samples.actions), samples.actions):
                raise AttachError(
                    f"{type(self.buffer).__name__} returned other rows than it drew: its internals have moved. "
                    "Upgrade training-guardrails."
                )
            costs = self._costs(rows, envs, samples)
            self.complete = not np.isnan(costs).any()
            judged = samples._replace(actions=self._label(rows, envs, samples.actions))
            self._deliver(judged, torch.as_tensor(costs, device=samples.actions.device))
            return samples

        return sample

    def _costs(self, rows: Indices, envs: Indices, samples: Any) -> Costs:
        if not isinstance(self.buffer, NStepReplayBuffer):
            return self.values[rows, envs]
        buffer = self.buffer
        indices = (rows[:, None] + np.arange(buffer.n_steps)) % buffer.buffer_size
        ends = (buffer.dones[indices, envs[:, None]] + buffer.timeouts[indices, envs[:, None]]) > 0
        newest = (buffer.pos - 1) % buffer.buffer_size
        ends |= indices == newest  # what stands behind it is older, not what followed
        runs = np.cumsum(np.pad(ends, ((0, 0), (1, 0)))[:, :-1], axis=1) == 0
        discounts = (buffer.gamma ** np.arange(buffer.n_steps, dtype=np.float32)) * runs
        expected = buffer.gamma ** runs.sum(axis=1, keepdims=True).astype(np.float32)
        if not np.allclose(samples.discounts.cpu().numpy(), expected, rtol=1e-5):  # float32 powers
            raise AttachError(
                f"{type(buffer).__name__} sums its n steps in another way than version 2.9 does. Upgrade "
                "training-guardrails, or use n_steps=1."
            )
        steps = np.where(runs[..., None], self.values[indices, envs[:, None]], np.float32(0.0))
        summed: Costs = (steps * discounts[..., None]).sum(axis=1, dtype=np.float32)
        return summed
