"""SafeActions: an environment whose actions are held to the sets of a guard, with or without a wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from guardrails import AttachError, Guard
from guardrails_sb3 import checkpoint
from guardrails_sb3.action_sets import situations
from guardrails_sb3.action_sets.acting import Acting
from guardrails_sb3.action_sets.base import Situation, batched
from guardrails_sb3.action_sets.enforcement import Enforcement
from guardrails_sb3.dials import ACTION_SCALE, Dials, scales_actions


class SafeActions(gym.Wrapper[Any, Any, Any, Any]):
    """Executes of each action what the sets of a guard make of it, and says in ``info`` what was changed.

    For deployment: a zip loads without this package, and knows nothing of the sets; this keeps them. Also for
    training where the sets stand still, and for any loop that steps an environment. ``info`` carries
    ``interventions`` at each step, and ``episode_interventions`` at the last one of an episode. A dial ``action_scale``
    of the guard scales each action before the sets, as in training, unless ``model`` is wrapped: its ``predict`` has
    done so then.

    Args:
        env: the environment.
        guard: has the sets, with the widths in force. It stays as it is.
        resume: the file that a guarded model was saved to: the guard, which must belong to no host, then
            takes up the state that it was saved with, and so the widths that had been earned.
        model: the model that acts, for sets that ask what it prefers or perceives, and for a dial ``action_scale``.
        normalizer: the ``VecNormalize`` that the model was trained under, for sets that ask what it prefers or
            perceives: ``env`` is below any ``VecNormalize`` and gives its own observations. It is read, not changed.
            None takes the one of the model's environments, if it was loaded with some.
        critic: ``(observations, actions, constraint) -> risks`` for a `CriticShield` without a ``risk`` of its own,
            such as ``safety_critic(model).risk``.

    Raises:
        AttachError: if the guard has no set, one of them means nothing here or asks for a model, ``resume`` is
            given with a guard that belongs to a host, or it says that the model was trained under a ``VecNormalize``
            that a set needs and that is not given; if the guard has a dial ``action_scale`` and it is not known whose
            actions these are, or they are those of a model that is wrapped with another guard.
        StateError: if ``resume`` is a file of another guard, or damaged.

    Example:
        >>> model = PPO.load("model.zip")  # doctest: +SKIP
        >>> env = SafeActions(gym.make("HalfCheetah-v5"), guard, resume="model.zip", model=model)  # doctest: +SKIP
        >>> action, _ = model.predict(observation)  # doctest: +SKIP
        >>> observation, reward, terminated, truncated, info = env.step(action)  # doctest: +SKIP
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        guard: Guard,
        *,
        resume: checkpoint.Target | None = None,
        model: BaseAlgorithm | None = None,
        normalizer: VecNormalize | None = None,
        critic: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(env)
        if not guard.action_sets:
            raise AttachError("SafeActions holds actions to sets, and this Guard has none. Give it an ActionBox, say.")
        if model is not None and model.action_space != env.action_space:
            raise AttachError(f"The model acts in {model.action_space}, but this environment in {env.action_space}.")
        if resume is not None and guard.host is not None:
            raise AttachError(f"This Guard belongs to {guard.host} and has its state. Leave out resume=.")
        self._model, self._normalizer = model, normalizer
        self._dials = _scaling(model, guard)
        self._acting = None if model is None else Acting(model, guard, critic)
        self._enforcement = Enforcement(guard, env.action_space, "this environment")
        if self._acting is None:
            situations.check_alone(self._enforcement.sets, critic)
        if resume is not None:
            saved = checkpoint.read(resume)
            if saved.normalised and normalizer is None:
                situations.check_normalised(model, self._enforcement.sets)
            guard.load_state_dict(saved.guard)
        self._critic = critic
        self._memory = self._enforcement.memory(1)
        self._observation: Any = None
        self._info: Mapping[str, Any] = {}

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset the environment, and what is remembered of its episode."""
        self._memory.begin()
        self._observation, info = self.env.reset(**kwargs)
        self._info = info
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment with what the sets make of ``action``."""
        self._enforcement.refresh()
        proposed = np.asarray(action, dtype=self.action_space.dtype)[None]
        if self._enforcement.bounds is not None:
            proposed = np.clip(proposed, self._enforcement.bounds.low, self._enforcement.bounds.high)
        if self._dials is not None and _guard_of(self._model) is None:
            proposed = self._dials.scaled(proposed)
        executed = self._enforcement.execute(proposed, self._situation(), self._memory)[0]
        observation, reward, terminated, truncated, info = self.env.step(executed)
        self._enforcement.report(self._memory, np.array([terminated or truncated]), [info])
        self._observation, self._info = observation, info
        return observation, reward, terminated, truncated, info

    def _situation(self) -> Situation:
        observations = batched(self._observation)
        inform, call = lambda: [self._info], lambda name: [self.env.get_wrapper_attr(name)()]
        perceive = lambda: situations.as_perceived(self._model, observations, self._normalizer)  # noqa: E731
        if self._acting is not None:
            return self._acting.situation(self._memory, lambda: observations, perceive, inform, call)
        return Situation(
            space=self.action_space,
            bounds=self._enforcement.bounds,
            n_rows=1,
            fresh=self._memory.fresh,
            previous=self._memory.previous,
            observe=lambda: observations,
            perceive=perceive,
            inform=inform,
            call=call,
            critic=self._critic,
            senses=self._enforcement.senses,
        )


def _scaling(model: BaseAlgorithm | None, guard: Guard) -> Dials | None:
    """Return what scales the actions of ``model`` while it is not wrapped; None for a guard that scales none."""
    if not scales_actions(guard):
        return None
    if model is None:
        raise AttachError(
            f"This Guard's dial '{ACTION_SCALE}' scales actions, which predict does while a model is wrapped, and "
            "nothing tells here whether they come from one. Give model=, the model that acts."
        )
    if _guard_of(model) not in (None, guard):
        raise AttachError(
            f"This Guard's dial '{ACTION_SCALE}' scales actions, and so may predict of this {type(model).__name__}, "
            "which is wrapped with another guard. Give that guard, or unwrap(model) first."
        )
    return Dials(model, guard)


def _guard_of(model: BaseAlgorithm | None) -> Guard | None:
    """Return the guard that ``model`` is wrapped with."""
    from guardrails_sb3.wrap import attachment_of  # built upon this module

    attachment = None if model is None else attachment_of(model)
    return None if attachment is None else attachment.callback.guard
