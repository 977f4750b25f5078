"""Gate: trust earned with evidence, rung by rung, and lost at once.

The statistics are in `confidence` (climbing) and `change` (falling); this module says what they decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from guardrails.competence import standing
from guardrails.competence import state as states
from guardrails.competence.between import Between, Scale
from guardrails.competence.change import BoolArray, Break, check_scores
from guardrails.competence.metric import measure
from guardrails.competence.require import Require
from guardrails.competence.state import GateState
from guardrails.decision import GateDecision, Verdict
from guardrails.errors import ConfigurationError, StateError
from guardrails.evidence import GateEvidence
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers.base import check_number, whole_number

_PRIOR_ROWS = 8.0
"""Weight of the threshold as a guess of the mean, until the recent window says better."""

_PATIENCE = 8
"""Evidence below its threshold is begun anew no more often than after 1/8 of all rows: each attempt costs error."""


class Gate:
    """A ladder of rungs, level = rung / rungs, climbed with confidence and fallen from at once.

    **Climbing.** Each rung begins fresh evidence for each requirement. The gate climbs one rung when the
    lower confidence bound of *every* requirement, audits included, is at or above its threshold, its
    recent window is too, and the dwell is over. The k-th evidence of one of r requirements has error
    (1 - confidence) / r · 6 / (π² k²). So, whatever the scores do: over a run of any length, the
    probability of ever climbing while the running average, since its evidence began, of some
    requirement's conditional mean score was below its threshold, is at most 1 - confidence.

    **Falling.** A `Break` of any requirement, or a metric that fails, drops the gate at once and begins
    all evidence anew. While all conditional means are at or above their thresholds, the probability of
    a fall by mistake within T updates is at most T / run_length.

    **Freezing.** When the lower bounds of all requirements other than audits are at or above their
    thresholds while the upper bound of some audit is below its own, the gate climbs no more, and the
    audits begin anew. It thaws when every audit's lower bound is at or above its threshold; then the
    other requirements begin anew, since what they showed meanwhile is what was in doubt.

    A gate is configuration and pure functions: `init` and `update`; a guard holds the state.

    Args:
        *requires: the requirements, each of another metric.
        confidence: 1 - error over the whole run, in (0, 1).
        rungs: steps from tight to loose, ≥ 1.
        dwell: rows at least on a rung before the next climb, ≥ 0.
        interval: updates at least on a rung before the next climb, ≥ 1.
        fall: how far a break drops it: one rung, to half the rung (rounded down), or to the floor.
        run_length: updates per mistaken fall, at least; a larger one reacts later.
        window: rows of the recent window, ≥ 1.
        budget_seconds: time a metric may take per update before that counts as a failure. Leave None
            where several processes decide on the same rows: their clocks differ.
        name: what logs and states call it; unique in a guard, without ``/``.

    Raises:
        ConfigurationError: if there is no requirement, two of one name, or an argument out of range.

    Example:
        >>> gate = Gate(Require("reward_level", at_least=0.9), rungs=4)
        >>> state = gate.init()
        >>> for _ in range(4):
        ...     state, decision = gate.update(state, Rollout(rewards=np.ones(32)))
        >>> gate.report(state).rung
        1
    """

    def __init__(
        self,
        *requires: Require,
        confidence: float = 0.95,
        rungs: int = 10,
        dwell: int = 64,
        interval: int = 1,
        fall: Literal["one", "half", "floor"] = "half",
        run_length: float = 10_000.0,
        window: int = 64,
        budget_seconds: float | None = None,
        name: str = "gate",
    ) -> None:
        if not isinstance(name, str) or not name.strip() or "/" in name:
            raise ConfigurationError(f"A gate's name must be a non-empty string without '/', not {name!r}.")
        owner = f"Gate '{name}'"
        for each in requires:
            if not isinstance(each, Require):
                raise ConfigurationError(f"{owner} takes Require objects, not {each!r}.")
        names = [each.name for each in requires]
        if not names:
            raise ConfigurationError(
                f"{owner} requires nothing, so it would open for anyone. Give at least one Require."
            )
        if len(set(names)) < len(names):
            raise ConfigurationError(f"{owner} requires one metric twice: {names}. Give each metric a name of its own.")
        if fall not in ("one", "half", "floor"):
            raise ConfigurationError(f"{owner}: fall is {fall!r}; give 'one', 'half' or 'floor'.")
        self.name = name
        self.requires = requires
        self.confidence = check_number(owner, "confidence", confidence, low=0.0, high=1.0 - 1e-12, open_low=True)
        self.rungs = whole_number(owner, "rungs", rungs)
        self.dwell = whole_number(owner, "dwell", dwell, low=0)
        self.interval = whole_number(owner, "interval", interval)
        self.fall = fall
        self.budget_seconds = budget_seconds
        if budget_seconds is not None:
            self.budget_seconds = check_number(owner, "budget_seconds", budget_seconds, low=0.0, open_low=True)
        thresholds = [each.at_least for each in requires]
        self.breaks = Break(thresholds, run_length=run_length, window=window)
        self.thresholds = np.array(thresholds)
        self._audits = np.array([each.audit for each in requires])

    def __repr__(self) -> str:
        return f"Gate({', '.join(map(repr, self.requires))}, confidence={self.confidence:g}, name={self.name!r})"

    def between(self, tight: float, loose: float, *, scale: Scale = "linear") -> Between:
        """Return a value that is ``tight`` at level 0 and ``loose`` at level 1, for a limit or a dial."""
        return Between(self, tight, loose, scale)

    def init(self) -> GateState:
        """Return the state before the first rollout: on the floor, with no evidence."""
        zeros = np.zeros(len(self.requires))
        return GateState(0, False, 0, 0, 0, zeros + 1.0, zeros, zeros, zeros, self.breaks.init())

    def level(self, state: GateState) -> float:
        """Return the level in [0, 1]."""
        return state.rung / self.rungs

    def update(self, state: GateState, rollout: Rollout) -> tuple[GateState, GateDecision]:
        """Measure every requirement on ``rollout``, and return the next state and what was decided."""
        return self.judge(state, self.measure(state, rollout))

    def decide(
        self, state: GateState, scores: FloatArray, failures: Sequence[str] = ()
    ) -> tuple[GateState, GateDecision]:
        """Return the next state and what was decided, from scores already measured; see `reduce`."""
        return self.judge(state, self.reduce(state, scores, failures))

    def measure(self, state: GateState, rollout: Rollout) -> GateEvidence:
        """Measure every requirement on ``rollout``, and return what the scores come down to."""
        read = {column for each in self.requires for column in each.measured.requires}
        absent = rollout.unmeasured & read or (rollout.unmeasured and "costs" in read)
        if absent or not rollout.n_rows:  # nothing to judge a metric by, so nothing to hold against it
            return self.reduce(state, np.zeros((len(self.requires), 0)))
        measured = [measure(each.measured, rollout, self.budget_seconds) for each in self.requires]
        scores = np.array([each.scores for each in measured])
        return self.reduce(state, scores, [each.failure for each in measured])

    def reduce(self, state: GateState, scores: FloatArray, failures: Sequence[str] = ()) -> GateEvidence:
        """Return what scores come down to in ``state``, which sets the centre of their squares.

        Args:
            state: the state so far.
            scores: ``(k, n_rows)`` in [0, 1], a row per requirement; the order of columns does not matter.
            failures: what went wrong with each metric, empty strings for those that did not fail.

        Raises:
            ConfigurationError: if there are scores of another shape, or outside [0, 1].
        """
        scores = check_scores(scores, len(self.requires))
        # Sorted rows in one memory layout: sums then do not depend on the order in which ranks were gathered.
        scores = np.ascontiguousarray(np.sort(scores, axis=1))
        recent_rows, recent = state.breaks.recent()
        known = np.where(np.isnan(recent), 0.0, recent) * recent_rows
        centre = (known + _PRIOR_ROWS * self.thresholds) / (recent_rows + _PRIOR_ROWS)
        return GateEvidence(
            scores.shape[1],
            tuple(scores.sum(axis=1).tolist()),
            tuple(np.square(scores - centre[:, None]).sum(axis=1).tolist()),
            tuple(map(tuple, self.breaks.growth(scores).tolist())),
            tuple(failures) or ("",) * len(self.requires),
        )

    def judge(self, state: GateState, evidence: GateEvidence) -> tuple[GateState, GateDecision]:
        """Return the next state and what was decided; the same arguments give the same result, to the bit."""
        failures = evidence.failures
        if evidence.n_rows == 0:
            text = f"{self._where(state)}: no rows in this step"
            return state, standing.decision(self, state, state, "empty", text, failures, standing.bounds(self, state))
        gathered, broken = self._gather(state, evidence)
        if any(failures):
            # What a failed metric would have said is unknown: the row counts go on, the evidence does not.
            gathered = gathered._replace(rows=state.rows, totals=state.totals, variances=state.variances)
        bounds = standing.bounds(self, gathered)
        if any(failures) or broken.any():
            following, verdict, text = self._fall(gathered, broken, failures)
        else:
            following, verdict, text = self._advance(gathered, *bounds)
        return following, standing.decision(self, following, gathered, verdict, text, failures, bounds)

    def report(self, state: GateState) -> GateDecision:
        """Return where the gate stands in ``state``, and what it waits for."""
        bounds = standing.bounds(self, state)
        return standing.decision(self, state, state, "held", "", [""] * len(self.requires), bounds)

    def _gather(self, state: GateState, evidence: GateEvidence) -> tuple[GateState, BoolArray]:
        n_rows = evidence.n_rows
        breaks, broken = self.breaks.advance(state.breaks, n_rows, evidence.totals, np.array(evidence.growth))
        state = state._replace(
            total_rows=state.total_rows + n_rows,
            rung_rows=state.rung_rows + n_rows,
            rung_updates=state.rung_updates + 1,
            rows=state.rows + n_rows,
            totals=state.totals + np.array(evidence.totals),
            variances=state.variances + np.array(evidence.squares),
            breaks=breaks,
        )
        return state, broken

    def _fall(self, state: GateState, broken: BoolArray, failures: Sequence[str]) -> tuple[GateState, Verdict, str]:
        causes = []
        rows, recent = state.breaks.recent()
        for index, each in enumerate(self.requires):
            if failures[index]:
                causes.append(f"{each.name} {failures[index]}")
            elif broken[index]:
                causes.append(f"{each.name} at {recent[index]:.3f} over the last {rows} rows, {each.at_least:g} needed")
        fresh = state._replace(breaks=self.breaks.init())
        if state.rung == 0:
            # On the floor a long bad time must not use up attempts: only evidence that spoke otherwise is void.
            void = (broken & (state.means() >= self.thresholds)) | np.full(len(self.requires), any(failures))
            text = f"{self._where(state)}, the floor: {'; '.join(causes)}" if void.any() else ""
            return fresh.restart(void), "held", text
        rung = {"one": state.rung - 1, "half": state.rung // 2, "floor": 0}[self.fall]
        fresh = fresh.restart(np.ones(len(self.requires), dtype=bool))
        fresh = fresh._replace(rung=rung, rung_rows=0, rung_updates=0)
        return fresh, "tightened", f"rung {state.rung} → {rung} of {self.rungs}: {'; '.join(causes)}"

    def _advance(self, state: GateState, lower: FloatArray, upper: FloatArray) -> tuple[GateState, Verdict, str]:
        shown = lower >= self.thresholds
        recent = state.breaks.recent()[1]
        diverged = shown[~self._audits].all() and (upper < self.thresholds)[self._audits].any()
        if diverged and not state.frozen and not self._audits.all():
            audits = ", ".join(
                each.name for each, u in zip(self.requires, upper, strict=True) if each.audit and u < each.at_least
            )
            text = f"{self._where(state)}, frozen: all else is met with confidence, but {audits} is not"
            return state.restart(self._audits)._replace(frozen=True), "frozen", text
        if state.frozen and shown[self._audits].all():
            text = f"{self._where(state)}, thawed: every audit is met with confidence; the rest begins anew"
            return state.restart(~self._audits)._replace(frozen=False), "held", text
        if shown.all() and state.rung < self.rungs and not standing.waits(self, state):
            climbed = state.restart(np.ones(len(self.requires), dtype=bool))
            climbed = climbed._replace(rung=state.rung + 1, rung_rows=0, rung_updates=0)
            text = f"rung {state.rung} → {climbed.rung} of {self.rungs}: every requirement is met with confidence"
            return climbed, "relaxed", text
        hopeful = (state.means() < self.thresholds) & (recent >= self.thresholds)
        ripe = state.rows * _PATIENCE >= max(state.total_rows, _PATIENCE * self.breaks.window)
        return state.restart(hopeful & ripe), "held", ""

    def _where(self, state: GateState) -> str:
        return f"rung {state.rung} of {self.rungs}"

    def dump(self, state: GateState) -> dict[str, Any]:
        """Return ``state`` as JSON data, with the requirements it belongs to."""
        return {"requires": self._signature(), "rungs": self.rungs, **states.dump(state)}

    def load(self, data: Mapping[str, Any]) -> GateState:
        """Return the state that `dump` wrote.

        Raises:
            StateError: if it is damaged, or of a gate with other requirements or rungs.
        """
        own = {"requires": self._signature(), "rungs": self.rungs}
        saved = {name: data.get(name) for name in own} if isinstance(data, Mapping) else None
        if saved != own:
            raise StateError(
                f"The saved state of gate '{self.name}' is of {saved}, but this gate has {own}. Evidence for one "
                "threshold is none for another: build the gate as the run was saved with."
            )
        return states.load(data, self.init(), self.rungs)

    def _signature(self) -> list[list[Any]]:
        return [[each.name, each.at_least, each.audit] for each in self.requires]
