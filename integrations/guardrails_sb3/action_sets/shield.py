"""CriticShield: no action whose predicted risk exceeds a bound, decided within a time budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from guardrails import AttachError, RolloutError
from guardrails.competence import Between
from guardrails.schedulers.base import check_number, whole_number
from guardrails_sb3.action_sets.base import Array, BoolArray, SafeSet, Situation, row, rows
from guardrails_sb3.action_sets.worker import Worker

Risk = Callable[[Any, Array], Any]


class CriticShield(SafeSet):
    """A(s) = {a: risk(s, a) ≤ bound} ∪ {safe(s)}; risk(s, a) ≥ bound where the safety critic judges a lower limit.

    An action whose predicted risk is beyond the bound is moved along the line towards the safe action, to the
    farthest of ``candidates`` evenly spaced points at which the risk is within the bound; if it is at none, it
    becomes the safe action. Discrete actions have no line between them: the safe action replaces them. A risk of
    NaN is beyond any bound.

    Args:
        bound: greatest risk, in its own unit, or ``gate.between(tight, loose)``. Of a constraint with ``sense=">="``
            it is the least: the safety critic's risk is then Q̄_c - κ σ, what is to be had even if in doubt.
        risk: ``(observations, actions) -> (n_rows,)``, of rows of observations as the policy gets them and of
            actions as the environment does. Default: the safety critic that the model is guarded with, whose unit
            is that of a discounted sum of costs.
        constraint: whose risk the safety critic is asked for; may be left out where there is one. A ``risk`` of your
            own has no use for it.
        safe: the safest action known: an action, or a function of one observation as the environment gives it.
            Default: the centre of a continuous action space; discrete ones need it.
        candidates: points of the line, the safe action among them, ≥ 1; all are judged in one batch.
        budget_ms: longest time to decide in, in milliseconds. Predictions then run in a thread of their own; what is
            not decided in time gets the safe action, and `late` counts it. Python may take up to its switch interval
            (5 ms) to notice while ``risk`` runs Python code. None sets no limit, and keeps runs reproducible:
            what a clock decides is not.
        name: what logs and errors call it.

    Raises:
        ConfigurationError: if an argument is out of range, or ``bound`` narrows with competence; where that depends on
            the constraint it is an AttachError, when the guard is attached.

    Example:
        >>> shield = CriticShield(1.0, risk=lambda observations, actions: np.abs(actions[:, 0]))
        >>> shield.widths
        {'bound': 1.0}
    """

    observes = True

    def __init__(
        self,
        bound: float | Between,
        *,
        risk: Risk | None = None,
        constraint: str | None = None,
        safe: Any = None,
        candidates: int = 8,
        budget_ms: float | None = None,
        name: str = "critic_shield",
    ) -> None:
        super().__init__(name)
        if risk is not None:
            self.must_call("risk", risk)
            self.opening("bound", bound, self._finite)
        if isinstance(bound, Between):
            self.bound: float | Between = bound
            self._finite(bound.tight), self._finite(bound.loose)
        else:
            self.bound = self._finite(bound)
        self.risk, self.constraint, self.safe = risk, constraint, safe
        self.candidates = whole_number(self.owner, "candidates", candidates)
        self.budget_ms = budget_ms
        if budget_ms is not None:
            self.budget_ms = check_number(self.owner, "budget_ms", budget_ms, low=0.0, open_low=True)
        self.late = 0
        self._worker = Worker()

    def _finite(self, bound: float) -> float:
        return check_number(self.owner, "bound", bound)

    @property
    def widths(self) -> Mapping[str, float | Between]:
        """The bound."""
        return {"bound": self.bound}

    def check(self, space: spaces.Space[Any]) -> None:
        """Raise AttachError unless there is a safe action of this space."""
        if self.safe is None:
            if isinstance(space, spaces.Discrete):
                raise AttachError(
                    f"{self.owner}: which action of {space} is safe? Give safe=, an action or a function."
                )
            self.bounded(space)
        elif not callable(self.safe):
            safe = np.asarray(self.safe, dtype=space.dtype)
            if not space.contains(safe if space.shape else safe[()]):
                raise AttachError(f"{self.owner}: safe={self.safe!r} is no action of {space}.")

    def suits(self, senses: Mapping[str, str]) -> None:
        """Raise AttachError if it is open whose risk is asked for, or competence would narrow the bound."""
        if self.risk is not None:
            return
        if senses and (self.constraint not in senses if self.constraint is not None else len(senses) > 1):
            named = "none was named" if self.constraint is None else f"'{self.constraint}' is none of them"
            raise AttachError(
                f"{self.owner} asks the safety critic for the risk of a constraint. It judges {', '.join(senses)}; "
                f"{named}. Give constraint=, one of these."
            )
        bound, sign = self.bound, self.sign(senses)
        if isinstance(bound, Between) and sign * bound.tight > sign * bound.loose:
            extreme, narrow = ("greatest", "smaller") if sign > 0.0 else ("least", "greater")
            raise AttachError(
                f"{self.owner}: bound=between({bound.tight:g}, {bound.loose:g}), the {extreme} risk allowed, starts at "
                f"the wider end, so competence would narrow it. Give the narrow value first, here the {narrow} one."
            )

    def sign(self, senses: Mapping[str, str]) -> float:
        """Return -1 where the safety critic is asked about a lower limit, of which too little is a risk; else 1.

        Args:
            senses: of the guard's constraints, by name.
        """
        if self.risk is not None or not senses:
            return 1.0
        asked = next(iter(senses)) if self.constraint is None else self.constraint
        return -1.0 if senses[asked] == ">=" else 1.0

    def project(self, actions: Array, situation: Situation, widths: Mapping[str, float]) -> Array:
        """Return ``actions``, with those of too great a risk moved towards the safe one."""
        judgement = _Judgement(self, actions, situation, widths["bound"])
        if self.budget_ms is None or not situation.hurried:
            judgement.run()
        elif not self._worker.run(judgement.run, self.budget_ms / 1e3):
            self.late += 1
        return judgement.result()

    def safe_actions(self, actions: Array, situation: Situation, chosen: BoolArray) -> Array:
        """Return the safe action of each of the ``chosen`` rows."""
        indices = np.flatnonzero(chosen).tolist()
        if callable(self.safe):
            observations = situation.observations
            given = [self.answer(self.safe, row(observations, index)) for index in indices]
        else:
            given = [situation.box.centre if self.safe is None else self.safe] * len(indices)
        safe: Array = self.actions(given, actions[0])
        return safe if situation.bounds is None else np.clip(safe, situation.bounds.low, situation.bounds.high)

    def risks(self, answered: Any, n_rows: int) -> Array:
        """Return what ``risk`` answered as an array ``(n_rows,)``; RolloutError if it is not one number per row."""
        values = answered.detach().cpu().numpy() if isinstance(answered, torch.Tensor) else answered
        try:
            return np.asarray(values, dtype=np.float64).reshape(n_rows)
        except (TypeError, ValueError) as error:
            given = f"shape {np.shape(values)}" if isinstance(values, np.ndarray) else repr(values)
            raise RolloutError(
                f"{self.owner}: its risk returned {given} for {n_rows} actions; {n_rows} numbers are needed, one each."
            ) from error


class _Judgement:
    """One batch of actions under judgement; what it has found out so far can be read at any time.

    What has to be read from the host is read before it runs, so that only predictions are left to another thread.
    """

    def __init__(self, shield: CriticShield, actions: Array, situation: Situation, bound: float) -> None:
        self._shield, self._actions, self._situation, self._bound = shield, actions, situation, bound
        self._risk = shield.risk or partial(shield.at_hand(situation.critic), constraint=shield.constraint)
        self._sign = shield.sign(situation.senses)
        self._observations = situation.perceived
        if callable(shield.safe):
            situation.observations  # noqa: B018
        self._accepted: BoolArray = np.zeros(len(actions), dtype=bool)
        self._moved: Array | None = None

    def run(self) -> None:
        self._accepted = self._within(self._observations, self._actions)
        if not self._accepted.all():
            self._moved = self._towards_safe(~self._accepted)

    def result(self) -> Array:
        moved = self._moved  # read first: what was accepted is final once it is there
        accepted = self._accepted
        if accepted.all():
            return self._actions
        if moved is None:  # out of time
            moved = self._shield.safe_actions(self._actions, self._situation, ~accepted)
        projected: Array = self._actions.copy()
        projected[~accepted] = moved
        return projected

    def _towards_safe(self, refused: BoolArray) -> Array:
        actions = self._actions[refused]
        safe = self._shield.safe_actions(self._actions, self._situation, refused)
        n_points = self._shield.candidates
        if self._situation.bounds is None or n_points == 1:
            return safe
        shares = np.arange(n_points - 1, 0, -1, dtype=actions.dtype) / n_points  # from the action to the safe one
        shares = shares.reshape(-1, *(1,) * actions.ndim)
        points = safe + shares * (actions - safe)
        observations = rows(rows(self._observations, refused), np.tile(np.arange(len(actions)), len(shares)))
        within = self._within(observations, points.reshape(-1, *actions.shape[1:])).reshape(len(shares), -1)
        points = np.concatenate([points, safe[None]])
        within = np.concatenate([within, np.ones((1, len(actions)), dtype=bool)])
        nearest: Array = points[within.argmax(axis=0), np.arange(len(actions))]
        return nearest

    def _within(self, observations: Any, actions: Array) -> BoolArray:
        with torch.no_grad():
            answered = self._shield.answer(self._risk, observations, actions)
        within: BoolArray = self._sign * self._shield.risks(answered, len(actions)) <= self._sign * self._bound
        return within
