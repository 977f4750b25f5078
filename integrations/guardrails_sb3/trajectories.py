"""Trajectories: the actions and observations of each episode, kept only where a metric reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

TRAJECTORY_COLUMNS = frozenset({"actions", "observations"})
"""Columns that are kept step by step, and only where a metric reads them."""


class Trajectories:
    """Steps of the episodes that run in each environment, and of those that have ended.

    Args:
        n_envs: environments of the host.
        columns: what to keep of each step, such as ``actions``; nothing is kept of others.
    """

    def __init__(self, n_envs: int, columns: Collection[str]) -> None:
        self.columns = tuple(sorted(columns))
        self._running: list[dict[str, list[Array]]] = [self._none() for _ in range(n_envs)]
        self._ended: dict[str, list[Array]] = self._none()

    def _none(self) -> dict[str, list[Array]]:
        return {name: [] for name in self.columns}

    def begin(self, starts: npt.NDArray[np.bool_]) -> None:
        """Forget the steps of the environments in ``starts``: they begin an episode."""
        for env in map(int, np.flatnonzero(starts)):
            self._running[env] = self._none()

    def add(self, steps: Mapping[str, Array], dones: npt.NDArray[np.bool_]) -> None:
        """Add consecutive steps of every environment, and file the episodes that they ended, in the order they did.

        Args:
            steps: name to ``(n_steps, n_envs, ...)``, an entry per column.
            dones: ``(n_steps, n_envs)``, whether a step ended its episode.
        """
        if not self.columns:
            return
        begun = [0] * dones.shape[1]
        for last, env in np.argwhere(dones).tolist():
            self._extend(env, steps, begun[env], last + 1)
            begun[env] = last + 1
            for name, parts in self._running[env].items():
                self._ended[name].append(np.concatenate(parts))
            self._running[env] = self._none()
        for env, begin in enumerate(begun):
            self._extend(env, steps, begin, len(dones))

    def _extend(self, env: int, steps: Mapping[str, Array], begin: int, end: int) -> None:
        if begin < end:
            for name, parts in self._running[env].items():
                parts.append(steps[name][begin:end, env].copy())

    def take(self) -> dict[str, list[Array]]:
        """Return the columns of the episodes that ended since the last call, ``(length, ...)`` each."""
        ended, self._ended = self._ended, self._none()
        return ended

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the steps of the running episodes, by column and environment."""
        return {
            f"{name}.{env}": torch.from_numpy(np.concatenate(parts))
            for env, columns in enumerate(self._running)
            for name, parts in columns.items()
            if parts
        }

    def pending(self) -> dict[str, torch.Tensor]:
        """Return the steps of the episodes that have ended since the last `take`, by column and episode."""
        return {
            f"ended.{name}.{place}": torch.from_numpy(steps)
            for name, episodes in self._ended.items()
            for place, steps in enumerate(episodes)
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], *, running: bool = True) -> None:
        """Restore what `tensors` and `pending` returned.

        Args:
            tensors: what they returned.
            running: whether the episodes that ran then go on.
        """
        for name, episodes in self._ended.items():
            n_ended = sum(each.startswith(f"ended.{name}.") for each in tensors)
            episodes[:] = [tensors[f"ended.{name}.{place}"].numpy() for place in range(n_ended)]
        if not running:
            return
        for env, columns in enumerate(self._running):
            for name in columns:
                steps = tensors.get(f"{name}.{env}")
                columns[name] = [] if steps is None else [steps.numpy()]
