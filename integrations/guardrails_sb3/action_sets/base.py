"""What a set of safe actions is on this host: a projection of rows of actions, given what they are chosen in."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from guardrails import ActionSet, AttachError, ConfigurationError, RolloutError
from guardrails.competence import Between
from guardrails.schedulers.base import check_number

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
Held = tuple[Array, list[bool] | None]
"""Finite actions inside a set, and whether each row was changed; None, and the array that was given, if none was."""

Observations = Any
"""Rows of observations: an array, or one array per key."""


class Bounds(NamedTuple):
    """A box-shaped action space, in its own dtype.

    Args:
        low: least action.
        high: greatest action.
        centre: (low + high) / 2.
        half: (high - low) / 2.
    """

    low: Array
    high: Array
    centre: Array
    half: Array

    @classmethod
    def of(cls, space: spaces.Space[Any]) -> Bounds | None:
        """Return the bounds of ``space``, or None if it is no box."""
        if not isinstance(space, spaces.Box):
            return None
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        centre, half = (low + high) / 2.0, (high - low) / 2.0
        return cls(space.low, space.high, centre.astype(space.dtype), half.astype(space.dtype))


@dataclass(eq=False, slots=True)
class Situation:
    """What rows of actions are chosen in, one row per environment.

    Args:
        space: the action space.
        bounds: of the action space, None if it is no box.
        n_rows: how many.
        fresh: ``(n_rows,)``, whether the action is the first of its episode.
        previous: actions executed just before, ``(n_rows, *space.shape)``; rows that are `fresh` mean nothing.
        observe: returns the observations as the environments give them.
        perceive: returns the observations as the policy gets them.
        rank: returns how much the policy prefers each of finitely many actions, ``(n_rows, n_actions)``, given what
            ``perceive`` returned; None where the policy does not tell.
        inform: returns the last ``info`` of each environment; None where they are not at hand, as in ``predict``.
        call: calls a method of each environment by name; None where they are not at hand.
        critic: the risk that a safety critic predicts for rows of observations and actions; None without one.
        senses: of the guard's constraints, by name: on which side of their limits the risk lies.
        hurried: whether an environment waits for the actions, so that a budget of time counts.
    """

    space: spaces.Space[Any]
    bounds: Bounds | None
    n_rows: int
    fresh: BoolArray
    previous: Array
    observe: Callable[[], Observations]
    perceive: Callable[[], Observations]
    rank: Callable[[Observations], Array] | None = None
    inform: Callable[[], list[Mapping[str, Any]]] | None = None
    call: Callable[[str], list[Any]] | None = None
    critic: Callable[[Observations, Array], Any] | None = None
    senses: Mapping[str, str] = field(default_factory=dict)
    hurried: bool = True
    _kept: dict[str, Any] = field(default_factory=dict, init=False)

    def renew(self, fresh: BoolArray, previous: Array) -> None:
        """Go on to the next step of the same environments; what was seen in the last one is forgotten."""
        self.fresh, self.previous = fresh, previous
        if self._kept:
            self._kept = {}

    @property
    def box(self) -> Bounds:
        """Bounds of a continuous action space, for sets whose `SafeSet.check` requires one."""
        if self.bounds is None:
            raise AttachError(f"The actions here are not continuous but of {self.space}: they have no bounds.")
        return self.bounds

    @property
    def observations(self) -> Observations:
        """Rows of observations as the environments give them, before any normalisation."""
        return self._once("observations", self.observe)

    @property
    def perceived(self) -> Observations:
        """Rows of observations as the policy gets them."""
        return self._once("perceived", self.perceive)

    @property
    def ranking(self) -> Array:
        """How much the policy prefers each action, ``(n_rows, n_actions)``."""
        rank = self.rank
        if rank is None:
            raise RolloutError(
                "A set asks which action the policy prefers, which nobody can tell here. Give fallback=."
            )
        ranking: Array = self._once("ranking", lambda: rank(self.perceived))
        return ranking

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class SafeSet(ActionSet):
    """A set of actions that a Stable-Baselines3 model is held to, wherever it acts.

    Laws that `project` keeps, given one situation: what it returns lies in the action space; projecting again
    changes nothing; an action inside comes back as it was; and a narrower width allows nothing that a wider does not.
    """

    observes = False
    """Whether it reads `Situation.observations` or `Situation.perceived`."""

    remembers = False
    """Whether it reads `Situation.previous`."""

    needs_environment = False
    """Whether it reads `Situation.inform` or `Situation.call`, which ``predict`` does not have."""

    ranks = False
    """Whether it reads `Situation.ranking`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.owner = f"{type(self).__name__} '{name}'"

    @abc.abstractmethod
    def check(self, space: spaces.Space[Any]) -> None:
        """Raise AttachError if the set means nothing in this action space."""

    def suits(self, senses: Mapping[str, str]) -> None:
        """Raise AttachError if the set means nothing beside the constraints of its guard; most ask nothing of them.

        Args:
            senses: of the constraints, by name.
        """

    @abc.abstractmethod
    def project(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Array:
        """Return ``actions`` with the rows outside the set replaced; the argument itself stays as it is.

        Args:
            actions: ``(n_rows, *space.shape)``, inside the action space.
            situation: what they are chosen in.
            widths: each of `widths` as the number in force.
        """

    def held(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Held | None:
        """Return what `project` would, found in less time, where that is possible and every action finite; else None.

        Arguments are the same; the laws of `project` hold.
        """
        return None

    def bounded(self, space: spaces.Space[Any]) -> None:
        """Raise AttachError unless ``space`` is a box with finite bounds."""
        if not isinstance(space, spaces.Box):
            raise AttachError(f"{self.owner} needs continuous actions, but this model acts in {space}.")
        if not space.is_bounded():
            raise AttachError(
                f"{self.owner} is a share of the action space's range, which is infinite here: {space}. Wrap the "
                "environment in gymnasium.wrappers.RescaleAction or ClipAction with finite bounds."
            )

    def opening(self, argument: str, value: float | Between, check: Callable[[float], float]) -> float | Between:
        """Return a width that ``check`` accepts, whose loose end, if it moves, is the wider one."""
        if not isinstance(value, Between):
            return check(value)
        check(value.tight), check(value.loose)
        if value.tight > value.loose:
            raise ConfigurationError(
                f"{self.owner}: {argument}=between({value.tight:g}, {value.loose:g}) starts at the wider end, so "
                "competence would narrow it. Give the narrow value first."
            )
        return value

    def must_call(self, argument: str, value: Any) -> None:
        """Raise ConfigurationError unless ``value`` is a function."""
        if not callable(value):
            raise ConfigurationError(f"{self.owner}: {argument} is {value!r}; give a function.")

    def ends(self, argument: str, value: float | Between | None) -> float | Between | None:
        """Return a width of which only a function of the user's knows the wider end, if its ends are numbers ≥ 0."""
        for end in (value.tight, value.loose) if isinstance(value, Between) else () if value is None else (value,):
            check_number(self.owner, argument, end, low=0.0)
        return value

    def at_hand(self, value: Any) -> Any:
        """Return what only an environment can tell; RolloutError where there is none."""
        if value is None:
            raise RolloutError(
                f"{self.owner} asks the environment, which is not at hand here. Step SafeActions(env, guard, model) "
                "instead, or read the observation."
            )
        return value

    def answer(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function of the user's returns; RolloutError, naming this set, if it raises."""
        try:
            return function(*arguments)
        except Exception as error:
            label = getattr(function, "__name__", repr(function))
            raise RolloutError(f"{self.owner}: its function {label} raised {type(error).__name__}: {error}.") from error

    def actions(self, values: list[Any], like: Array) -> Array:
        """Return one action per row, each shaped as ``like``; RolloutError if they are no finite actions."""
        try:
            stacked = np.stack([np.asarray(value, dtype=like.dtype).reshape(like.shape) for value in values])
        except (TypeError, ValueError) as error:
            raise RolloutError(
                f"{self.owner}: its function returned {values[0]!r}; an action of shape {like.shape} is needed."
            ) from error
        if not np.isfinite(stacked).all():
            raise RolloutError(f"{self.owner}: its function returned an action that is not finite: {stacked}.")
        return stacked


def few(actions: Array) -> bool:
    """Whether Python's own numbers are faster than arrays, whose operations take a microsecond each, or several."""
    return actions.ndim == 2 and actions.size <= 32


def row(observations: Observations, index: int) -> Any:
    """Return one row of observations."""
    if isinstance(observations, Mapping):
        return {key: values[index] for key, values in observations.items()}
    return observations[index]


def batched(observation: Any) -> Observations:
    """Return one observation as a batch of one row."""
    if isinstance(observation, Mapping):
        return {key: np.asarray(value)[None] for key, value in observation.items()}
    return np.asarray(observation)[None]


def rows(observations: Observations, chosen: Any) -> Observations:
    """Return some rows of observations."""
    if isinstance(observations, Mapping):
        return {key: np.asarray(values)[chosen] for key, values in observations.items()}
    return np.asarray(observations)[chosen]


def columns(mask: BoolArray, like: Array) -> BoolArray:
    """Return a mask of rows with as many axes as ``like`` has, so that the two broadcast."""
    shaped: BoolArray = mask.reshape(-1, *(1,) * (like.ndim - 1))
    return shaped
