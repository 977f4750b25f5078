"""GateState: all that a gate remembers, of a size that does not depend on the run's length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from guardrails.competence.change import BreakState
from guardrails.errors import StateError
from guardrails.rollout import FloatArray


class GateState(NamedTuple):
    """State of a `Gate` with k requirements.

    Args:
        rung: rung in force, 0 is the tightest.
        frozen: whether proxies and audits were found to diverge.
        total_rows: rows seen in all.
        rung_rows: rows seen since the last climb or fall.
        rung_updates: updates with rows since then.
        attempts: ``(k,)`` which evidence of the run this is, from 1; its error is spent once.
        rows: ``(k,)`` rows of the current evidence.
        totals: ``(k,)`` sum of scores in it.
        variances: ``(k,)`` sum of squared distances from the centre in it.
        breaks: state of the change detector.
    """

    rung: int
    frozen: bool
    total_rows: int
    rung_rows: int
    rung_updates: int
    attempts: FloatArray
    rows: FloatArray
    totals: FloatArray
    variances: FloatArray
    breaks: BreakState

    def means(self) -> FloatArray:
        """Return the mean score of the current evidence, ``(k,)``; 0 where there is none."""
        means: FloatArray = self.totals / np.maximum(self.rows, 1.0)
        return means

    def restart(self, where: FloatArray | np.ndarray[Any, np.dtype[np.bool_]]) -> GateState:
        """Return the state with fresh evidence ``where`` true; evidence without rows is not used up."""
        keep = ~np.asarray(where, dtype=bool)
        return self._replace(
            attempts=self.attempts + (~keep & (self.rows > 0)),
            rows=self.rows * keep,
            totals=self.totals * keep,
            variances=self.variances * keep,
        )


_COUNTS = ("rung", "total_rows", "rung_rows", "rung_updates")
_ARRAYS = ("attempts", "rows", "totals", "variances")


def dump(state: GateState) -> dict[str, Any]:
    """Return ``state`` as JSON data; floats survive bit for bit."""
    data: dict[str, Any] = {name: getattr(state, name) for name in (*_COUNTS, "frozen")}
    data |= {name: getattr(state, name).tolist() for name in _ARRAYS}
    evidence = [[None if value == -math.inf else value for value in row] for row in state.breaks.log_evidence.tolist()]
    return data | {"log_evidence": evidence, "window": [[rows, list(sums)] for rows, sums in state.breaks.window]}


def load(data: Mapping[str, Any], like: GateState, rungs: int) -> GateState:
    """Return the state that `dump` wrote.

    Args:
        data: what `dump` returned, perhaps by way of JSON.
        like: a state of the gate that is to take it over.
        rungs: rungs of that gate.

    Raises:
        StateError: if anything is missing, foreign or out of range.
    """
    try:
        counts = {name: _count(data[name]) for name in _COUNTS}
        arrays = {name: _array(data[name], getattr(like, name).shape) for name in _ARRAYS}
        evidence = [[-math.inf if value is None else value for value in row] for row in data["log_evidence"]]
        log_evidence = np.array(evidence, dtype=np.float64)
        window = tuple((_count(rows), tuple(_array(sums, like.rows.shape).tolist())) for rows, sums in data["window"])
        frozen = data["frozen"]
        sound = (
            isinstance(frozen, bool)
            and counts["rung"] <= rungs
            and log_evidence.shape == like.breaks.log_evidence.shape
            and not np.isnan(log_evidence).any()
            and not np.isposinf(log_evidence).any()
            and (arrays["attempts"] >= 1.0).all()
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateError(f"The saved state of a gate is damaged: {type(error).__name__}: {error}.") from error
    if not sound:
        raise StateError("The saved state of a gate is damaged, or of a gate with more rungs: a value is out of range.")
    return GateState(
        counts["rung"],
        frozen,
        counts["total_rows"],
        counts["rung_rows"],
        counts["rung_updates"],
        arrays["attempts"],
        arrays["rows"],
        arrays["totals"],
        arrays["variances"],
        BreakState(log_evidence, window),
    )


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _array(values: Any, shape: tuple[int, ...]) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all() or (array < 0.0).any():
        raise ValueError(f"{values!r} is not {shape} numbers ≥ 0")
    return array
