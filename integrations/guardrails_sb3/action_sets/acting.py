"""Acting: a model's proposals, held to the sets of a guard; the same in training, ``predict`` and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from guardrails import Guard, RolloutError
from guardrails_sb3.action_sets import situations
from guardrails_sb3.action_sets.base import Array, BoolArray, Observations, Situation
from guardrails_sb3.action_sets.enforcement import Enforcement, Memory
from guardrails_sb3.action_sets.mask import ActionMask

MASKS = "action_masks"
"""Method of an environment, and argument of ``predict``, by which MaskablePPO is told its masks."""

Predict = Callable[..., tuple[Array, Any]]


class Acting:
    """What a model and the sets of a guard do together.

    Args:
        model: the host; read, not changed.
        guard: has the sets and the widths in force.
        critic: the risk that the model's safety critic predicts, for sets that ask for it.

    Attributes:
        feeds: whether the masks are told to the model, which then chooses among what they allow.

    Raises:
        AttachError: if a set means nothing for this model.
    """

    def __init__(self, model: BaseAlgorithm, guard: Guard, critic: Callable[..., Any] | None = None) -> None:
        self.model, self._critic = model, critic
        self.enforcement = Enforcement(guard, model.action_space, type(model).__name__)
        situations.check(model, self.enforcement.sets, critic)
        self._rank = situations.ranker(model)
        self._masks = tuple(part for part in self.enforcement.sets if isinstance(part, ActionMask))
        self.feeds = bool(self._masks) and situations.takes_masks(model)

    def situation(
        self,
        memory: Memory,
        observe: Callable[[], Observations],
        perceive: Callable[[], Observations],
        inform: Callable[[], list[Mapping[str, Any]]] | None = None,
        call: Callable[[str], list[Any]] | None = None,
    ) -> Situation:
        """Return the situation of the rows of ``memory``; see there for the rest."""
        return Situation(
            space=self.enforcement.space,
            bounds=self.enforcement.bounds,
            n_rows=memory.n_rows,
            fresh=memory.fresh,
            previous=memory.previous,
            observe=observe,
            perceive=perceive,
            rank=self._rank,
            inform=inform,
            call=call,
            critic=self._critic,
            senses=self.enforcement.senses,
        )

    def allowed(self, situation: Situation) -> BoolArray:
        """Return which discrete actions all masks allow that can be known in ``situation``, ``(n_rows, n_actions)``."""
        dials = self.enforcement.guard.dials
        known = [part for part in self._masks if situation.call is not None or not part.needs_environment]
        masks = [part.masks(situation, part.in_force(dials)) for part in known]
        space: Any = situation.space
        everything = np.ones((situation.n_rows, int(space.n)), dtype=bool)
        return both(everything, *masks)

    def act(
        self, predict: Predict, observations: Observations, situation: Situation, memory: Memory, **arguments: Any
    ) -> tuple[Array, Any]:
        """Return the actions to execute and the state of the host's policy.

        Args:
            predict: the host's, which proposes.
            observations: rows of them, as the policy gets them.
            situation: of these rows.
            memory: is told what is executed.
            arguments: passed to ``predict``.
        """
        if self.feeds:
            allowed, given = self.allowed(situation), arguments.get(MASKS)
            arguments[MASKS] = allowed if given is None else both(allowed, np.atleast_2d(given))
        proposed, state = predict(observations, **arguments)
        return self.enforcement.execute(proposed, situation, memory), state


def both(*masks: Any) -> BoolArray:
    """Return which actions every one of ``masks`` allows; RolloutError if that is none."""
    allowed: BoolArray = np.logical_and.reduce([np.asarray(mask, dtype=bool) for mask in masks])
    if not allowed.any(axis=-1).all():
        raise RolloutError("The masks of several sources allow no action together. Let them keep one in common.")
    return allowed
