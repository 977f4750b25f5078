"""Dials of a Stable-Baselines3 host: knobs that it reads while it collects rollouts and trains.

Nothing of the model is written to, so nothing has to be put back and nothing gets into its saves: while a
guard is attached, three methods look up the dial's value in force each time they run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from guardrails import AttachError, Dial, Guard
from guardrails.competence import Between

ACTION_SCALE = "action_scale"

_OF_TRAINING = ("ent_coef", "target_kl")
"""Attributes that the host's ``train`` reads anew each time, where its constructor takes them."""


class Dials:
    """What turns on a model, and the methods that do it.

    - ``action_scale`` s in (0, 1]: wherever the model acts, a becomes c + s (a - c), with c the centre of the
      action space: in the environments it learns in, and in what ``predict`` returns. The rollout buffer keeps the
      policy's own actions, so their log-probabilities stay true and the scale is part of the environment that the
      policy learns to act in. It changes between rollouts only.
    - ``ent_coef``, ``target_kl``: the host's coefficients, in force during ``train``.

    Args:
        model: the host.
        guard: has the values in force.

    Raises:
        AttachError: if a dial's range is not one that the host could use.
    """

    def __init__(self, model: BaseAlgorithm, guard: Guard) -> None:
        self._model, self._guard = model, guard
        self._released = self._noting = False
        self._rollout: list[Any] = []
        parts = {part.name: part.value for part in guard.parts if isinstance(part, Dial)}
        constructor = inspect.signature(type(model).__init__).parameters
        self._training = [name for name in _OF_TRAINING if name in constructor]
        self._turned = [name for name in self._training if name in parts]
        if "target_kl" in self._turned and 0.0 in _ends(parts["target_kl"]):
            raise AttachError("Dial 'target_kl' reaches 0, where the host cannot train. Give values above 0.")
        self._scales = scales_actions(guard)
        if self._scales:
            _check_actions(model, _ends(parts[ACTION_SCALE]))

    @property
    def available(self) -> list[str]:
        """Names of the dials that turn on this model."""
        if not isinstance(self._model, OnPolicyAlgorithm):
            return []  # none of these attributes is what its ``train`` reads, and its buffer outlives a scale
        continuous = isinstance(self._model.action_space, spaces.Box)
        return [*self._training, *([ACTION_SCALE] if continuous else [])]

    def inform(self, critic: Any) -> None:
        """Let a safety critic of the rollouts learn from scaled actions, for which it is asked."""
        if self._scales and critic is not None:
            self._noting = True
            critic.executed = lambda: np.stack(self._rollout)

    def release(self) -> None:
        """Turn nothing from now on, also inside a ``learn`` call that is under way."""
        self._released = True

    def overlays(self) -> dict[str, Callable[..., Any]]:
        """Return the methods of the model that have to be replaced, and by what; none where there is no dial."""
        overlays: dict[str, Callable[..., Any]] = {}
        model: Any = self._model
        if self._scales:
            overlays["collect_rollouts"] = self._collecting(model.collect_rollouts)
            overlays["predict"] = self._predicting(model.predict)
        if self._turned:
            overlays["train"] = self._during_training(model.train)
        return overlays

    def _collecting(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def collect_rollouts(env: Any, *args: Any, **kwargs: Any) -> bool:
            _check_environment(self._model)
            with self._acting(env.unwrapped):
                return original(env, *args, **kwargs)

        return collect_rollouts

    def _predicting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def predict(*args: Any, **kwargs: Any) -> Any:
            actions, state = original(*args, **kwargs)
            return self.scaled(actions), state

        return predict

    def _during_training(self, original: Callable[[], None]) -> Callable[[], None]:
        def train() -> None:
            before = {name: getattr(self._model, name) for name in self._turned}
            try:
                if not self._released:
                    for name in self._turned:
                        setattr(self._model, name, self._guard.dials[name])
                original()
            finally:
                for name, value in before.items():
                    setattr(self._model, name, value)

        return train

    @contextmanager
    def _acting(self, env: Any) -> Iterator[None]:
        """Scale the actions that reach ``env``, the innermost vector environment.

        The innermost one, since outer wrappers such as ``VecNormalize`` are pickled with all they hold, and since
        the host compares the chain of wrappers with that of an evaluation environment.
        """
        original, before = env.step_async, vars(env).get("step_async")
        self._rollout = []

        def step_async(actions: Any) -> None:
            scaled = self.scaled(actions)
            if self._noting:
                self._rollout.append(np.array(scaled))
            original(scaled)

        env.step_async = step_async
        try:
            yield
        finally:
            if before is None:
                del env.step_async
            else:
                env.step_async = before

    def scaled(self, actions: Any) -> Any:
        """Return actions as the dial ``action_scale`` makes them, c + s (a - c)."""
        scale = 1.0 if self._released else self._guard.dials[ACTION_SCALE]
        if scale == 1.0:
            return actions
        space: Any = self._model.action_space
        centre = (space.low.astype(np.float64) + space.high) / 2.0
        return (centre + scale * (actions - centre)).astype(space.dtype)


def scales_actions(guard: Guard) -> bool:
    """Return whether a guard has the dial ``action_scale``."""
    return any(isinstance(part, Dial) and part.name == ACTION_SCALE for part in guard.parts)


def _ends(value: Between) -> tuple[float, float]:
    return value.tight, value.loose


def _check_actions(model: BaseAlgorithm, ends: tuple[float, float]) -> None:
    name, space = type(model).__name__, model.action_space
    if not isinstance(space, spaces.Box):
        raise AttachError(f"Dial 'action_scale' scales continuous actions, but this {name} acts in {space}.")
    if min(ends) <= 0.0 or max(ends) > 1.0:
        raise AttachError(
            f"Dial 'action_scale' moves between {ends[0]:g} and {ends[1]:g}; give values in (0, 1], where 1 is the "
            "environment's own range and 0 would be no action at all."
        )
    _check_environment(model)


def _check_environment(model: BaseAlgorithm) -> None:
    inner = None if model.env is None else model.env.unwrapped.action_space
    if inner is not None and inner != model.action_space:
        raise AttachError(
            f"Dial 'action_scale' scales the actions that reach the environments, which act in {inner}, but the "
            f"policy acts in {model.action_space}: a wrapper in between changes them. Wrap each environment instead of "
            "their vector."
        )
