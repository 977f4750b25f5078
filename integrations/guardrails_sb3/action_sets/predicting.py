"""``predict`` of a guarded model: what it returns is what its sets allow."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from guardrails_sb3.action_sets import pictures, situations
from guardrails_sb3.action_sets.acting import Acting, Predict
from guardrails_sb3.action_sets.base import Array, batched
from guardrails_sb3.action_sets.enforcement import Memory

logger = logging.getLogger(__name__)


class Carried(NamedTuple):
    """The state that ``predict`` returns where a set has to remember the action before.

    Args:
        host: the state of the host's own policy.
        previous: the actions that were returned with it.
    """

    host: Any
    previous: Array | None


class Predicting:
    """Holds what ``predict`` returns to the sets.

    A set that remembers the action before is handed it in the state that ``predict`` returns and takes, as
    Stable-Baselines3's ``evaluate_policy`` and the loops of its documentation pass it on.

    Args:
        acting: model and sets.
        propose: the model's ``predict`` without the sets.
    """

    def __init__(self, acting: Acting, propose: Predict) -> None:
        self._acting, self._propose = acting, propose
        self._forgetful = False
        self._said: set[str] = set()

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        **more: Any,
    ) -> tuple[Array, Any]:
        """Return the action or actions to execute, and the state to hand on; arguments are those of the host."""
        acting, model = self._acting, self._acting.model
        acting.enforcement.refresh()
        carried = state if isinstance(state, Carried) else Carried(state, None)
        more |= {"state": carried.host, "episode_start": episode_start, "deterministic": deterministic}
        try:
            given = _arrays(observation)
            vectorised = bool(model.policy.is_vectorized_observation(given))
        except Exception:
            self._propose(observation, **more)  # raises too, and says what the host has to say of it
            raise
        self._warn(carried, episode_start)
        perceived = pictures.as_fed(model.observation_space, given if vectorised else batched(given))
        memory = self._memory(perceived, carried.previous, episode_start)
        situation = acting.situation(memory, lambda: situations.as_given(model, perceived), lambda: perceived)
        actions, following = acting.act(self._propose, perceived, situation, memory, **more)
        if acting.enforcement.remembers:
            following = Carried(following, memory.previous)
        return (actions if vectorised else actions[0]), following

    def _memory(self, perceived: Any, previous: Array | None, episode_start: Any) -> Memory:
        n_rows = len(next(iter(perceived.values())) if isinstance(perceived, Mapping) else perceived)
        memory = self._acting.enforcement.memory(n_rows)
        if previous is not None and len(previous) == n_rows:
            memory.previous = previous
            starts = np.zeros(n_rows) if episode_start is None else np.asarray(episode_start)
            memory.fresh = starts.astype(bool).reshape(n_rows)
        return memory

    def _warn(self, carried: Carried, episode_start: Any) -> None:
        """Say once what cannot be enforced as it is called."""
        sets = self._acting.enforcement.sets
        forgets = carried.previous is None and episode_start is None and self._acting.enforcement.remembers
        if forgets and self._forgetful:
            self._say_once(
                "predict is called without the state it returned last, so each action counts as the first of its "
                "episode and '%s' limits none. Pass it on: action, state = model.predict(observation, state).",
                next(part.name for part in sets if part.remembers),
            )
        self._forgetful = forgets
        asking = [part.name for part in sets if part.needs_environment]
        if asking:
            self._say_once(
                "predict has no environment to ask, so '%s' is not enforced in what it returns. Step "
                "SafeActions(env, guard, model=model), which has.",
                asking[0],
            )

    def _say_once(self, message: str, name: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, name)


def _arrays(observation: Any) -> Any:
    """Return an observation in arrays, as the host makes them of lists and numbers; TypeError if it is none."""
    if isinstance(observation, Mapping):
        return {key: _arrays(value) for key, value in observation.items()}
    array = np.asarray(observation)
    if array.dtype == object:
        raise TypeError(f"An observation is made of numbers, not {observation!r}.")
    return array
