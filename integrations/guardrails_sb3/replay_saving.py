"""The methods by which an off-policy model saves and loads its replay buffer, with what its guard keeps beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from guardrails_sb3 import replay_file
from guardrails_sb3.action_sets.replay import ReplayedActions
from guardrails_sb3.replay_critic import ReplayCritic


class ReplaySaving:
    """Costs and executed actions, saved and loaded with the replay buffer whose transitions they are of.

    Args:
        model: the host.
        critic: has the costs; any other kind of critic has none.
        replayed: has the executed actions; None where no set needs them.
    """

    def __init__(self, model: BaseAlgorithm, critic: object, replayed: ReplayedActions | None) -> None:
        self._model: Any = model
        self._critic = critic if isinstance(critic, ReplayCritic) else None
        self._replayed = replayed

    def overlays(self) -> dict[str, Callable[..., Any]]:
        """Return the methods of the model that have to be replaced, and by what; none where nothing is kept."""
        if self._critic is None and self._replayed is None:
            return {}
        return {
            "save_replay_buffer": self._saving(self._model.save_replay_buffer),
            "load_replay_buffer": self._loading(self._model.load_replay_buffer),
        }

    def _saving(self, save: Callable[..., None]) -> Callable[..., None]:
        def save_replay_buffer(path: Any) -> None:
            with nullcontext() if self._critic is None else self._critic.lifted():
                replay_file.save(path, save, self._beside())

        return save_replay_buffer

    def _loading(self, load: Callable[..., None]) -> Callable[..., None]:
        def load_replay_buffer(path: Any, truncate_last_traj: bool = True) -> None:
            beside = replay_file.load(path, lambda file: load(file, truncate_last_traj))
            if self._critic is not None:
                self._critic.adopt(beside.costs, beside.names)
            if self._replayed is not None:
                self._replayed.adopt(beside.executed, beside.known)

        return load_replay_buffer

    def _beside(self) -> replay_file.Beside:
        costs, names = (None, None) if self._critic is None else self._critic.kept()
        executed, known = (None, None) if self._replayed is None else self._replayed.kept()
        return replay_file.Beside(costs, names, executed, known)
