"""ActionMask: which of finitely many actions are allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from guardrails import AttachError, ConfigurationError, RolloutError
from guardrails.competence import Between
from guardrails_sb3.action_sets.base import Array, BoolArray, SafeSet, Situation, row


class ActionMask(SafeSet):
    """A(s) = {a: mask(s)[a]}, of a discrete action space; at least one action must stay allowed.

    MaskablePPO gets the masks as its own ``action_masks`` and chooses among what they allow, so that its
    probabilities are those of the masked policy. Of any other algorithm an action that is not allowed is replaced
    by the allowed one that the policy prefers most: the greatest Q-value or probability.

    Args:
        function: ``observation -> mask``, or ``(observation, width) -> mask`` where ``width`` is given: a truth value
            per action, of one observation as the environment gives it. A string is the key of a dict observation that
            holds the mask.
        info: instead: key of ``info`` that holds it, as some environments give ``"action_mask"``, also at reset.
        method: instead: name of a method of the environment that returns it, such as ``"action_masks"``. A mask of
            ``info`` or ``method`` is not known to ``predict``, which has no environment: see `SafeActions`.
        width: what the gate moves: a number ≥ 0, or ``gate.between(tight, loose)``.
        fallback: the action that replaces one that is not allowed, or the first allowed one where it is not allowed
            itself; needed where the policy's preferences are not at hand (RecurrentPPO).
        name: what logs and errors call it.

    Raises:
        ConfigurationError: unless there is one source of the mask, or if ``width`` has no function to read it.

    Example:
        >>> ActionMask(lambda observation: [True, observation[0] < 1.0]).name
        'action_mask'
    """

    def __init__(
        self,
        function: Callable[..., Any] | str | None = None,
        *,
        info: str | None = None,
        method: str | None = None,
        width: float | Between | None = None,
        fallback: int | None = None,
        name: str = "action_mask",
    ) -> None:
        super().__init__(name)
        if sum(source is not None for source in (function, info, method)) != 1:
            raise ConfigurationError(f"{self.owner}: give one source of the mask: a function, info= or method=.")
        if function is not None and not isinstance(function, str):
            self.must_call("function", function)
        if width is not None and (function is None or isinstance(function, str)):
            raise ConfigurationError(
                f"{self.owner}: width is read by a function (observation, width) -> mask; give one."
            )
        self.width = self.ends("width", width)
        self.function, self.info, self.method, self.fallback = function, info, method, fallback
        self.observes = function is not None
        self.needs_environment = function is None
        self.ranks = fallback is None

    @property
    def widths(self) -> Mapping[str, float | Between]:
        """The width, if there is one."""
        return {} if self.width is None else {"width": self.width}

    def check(self, space: spaces.Space[Any]) -> None:
        """Raise AttachError unless there are finitely many actions, and the fallback is one of them."""
        if not isinstance(space, spaces.Discrete) or space.start != 0:
            raise AttachError(
                f"{self.owner} needs a Discrete action space that starts at 0; this model acts in {space}."
            )
        if self.fallback is not None and not space.contains(self.fallback):
            raise AttachError(f"{self.owner}: fallback {self.fallback!r} is no action of {space}.")

    def masks(self, situation: Situation, widths: Mapping[str, float]) -> BoolArray:
        """Return which actions are allowed, ``(n_rows, n_actions)`` bool.

        Raises:
            RolloutError: if there is no mask, it has another length, or it allows nothing.
        """
        n_actions = int(situation.space.n)  # type: ignore[attr-defined]
        given = self._given(situation, tuple(widths.values()))
        try:
            masks = np.stack([np.asarray(mask).reshape(n_actions) for mask in given]).astype(bool)
        except (TypeError, ValueError) as error:
            raise RolloutError(
                f"{self.owner}: the mask is {given[0]!r}; {n_actions} truth values are needed, one per action."
            ) from error
        if not masks.any(axis=1).all():
            raise RolloutError(
                f"{self.owner} allows no action in some state. Let the mask keep one, such as braking or doing nothing."
            )
        return masks

    def _given(self, situation: Situation, width: tuple[float, ...]) -> list[Any]:
        n_rows = range(situation.n_rows)
        if callable(self.function):
            function, observations = self.function, situation.observations
            return [self.answer(function, row(observations, index), *width) for index in n_rows]
        if self.method is not None:
            return list(self.at_hand(situation.call)(self.method))
        source: Any = situation.observations if self.info is None else self.at_hand(situation.inform)()
        key = self.function if self.info is None else self.info
        try:
            return [source[key][index] if self.info is None else source[index][key] for index in n_rows]
        except (KeyError, IndexError, TypeError) as error:
            where = "the observation" if self.info is None else "info"
            raise RolloutError(
                f"{self.owner} reads the key {key!r} of {where}, which does not have it. An environment must give it "
                "at every step and at reset."
            ) from error

    def project(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Array:
        """Return ``actions``, with those that are not allowed replaced."""
        return self.within(actions, self.masks(situation, widths), situation)

    def within(self, actions: Array, masks: BoolArray, situation: Situation) -> Array:
        """Return ``actions``, with those that ``masks`` do not allow replaced."""
        flat = actions.reshape(-1)
        refused = ~masks[np.arange(len(masks)), flat]
        if not refused.any():
            return actions
        replaced: Array = np.where(refused, self._replacement(masks, situation), flat)
        return replaced.astype(actions.dtype).reshape(actions.shape)

    def _replacement(self, masks: BoolArray, situation: Situation) -> Array:
        chosen: Array
        if self.fallback is None:
            chosen = np.where(masks, situation.ranking, -np.inf).argmax(axis=1)
        else:
            chosen = np.where(masks[:, self.fallback], self.fallback, masks.argmax(axis=1))
        return chosen
