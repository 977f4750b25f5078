"""The callbacks of one ``learn`` call: the guard's own ahead of the user's."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback


class Callbacks(CallbackList):
    """Calls the guard's callbacks before the user's, and at steps those alone that look at steps.

    Args:
        ahead: the guard's; one whose ``looks`` is False is called where rollouts and trainings begin and end.
        callback: what the user passed to ``learn``: None, a callback, a list of them, or a function.
    """

    def __init__(self, ahead: list[BaseCallback], callback: Any) -> None:
        users = _listed(callback)
        super().__init__([*ahead, *users])
        self._looking = [*(each for each in ahead if getattr(each, "looks", True)), *users]

    def _on_step(self) -> bool:
        go_on = True
        for callback in self._looking:
            go_on = callback.on_step() and go_on
        return go_on

    def update_child_locals(self, locals_: dict[str, Any]) -> None:
        """Hand the host's variables on to those that look at steps."""
        for callback in self._looking:
            callback.update_locals(locals_)


def _listed(callback: Any) -> list[BaseCallback]:
    if callback is None:
        return []
    if isinstance(callback, list):
        return callback
    return [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]
