"""Break: notices quickly that scores have fallen below a threshold.

Two alarms share one error budget: a Shiryaev-Roberts e-detector (Shin, Ramdas, Rinaldo 2022), which
has no inertia however long the good times lasted, and a Chernoff bound on the most recent window.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from guardrails.errors import ConfigurationError
from guardrails.rollout import FloatArray
from guardrails.schedulers.base import check_number, whole_number

_FRACTIONS = np.array([0.03, 0.1, 0.3, 0.6, 0.9])
_LOG_WEIGHT = -math.log(_FRACTIONS.size)

BoolArray: TypeAlias = npt.NDArray[np.bool_]

Batch: TypeAlias = tuple[int, tuple[float, ...]]
"""Rows of a batch, and the sum of their scores for each threshold."""


class BreakState(NamedTuple):
    """State of `Break`: the e-detector per threshold and bet, ``(k, 5)`` logs, and the recent batches."""

    log_evidence: FloatArray
    window: tuple[Batch, ...]

    def recent(self) -> tuple[int, FloatArray]:
        """Return how many rows the window holds, and the mean score in it per threshold; NaN when empty."""
        rows = sum(n for n, _ in self.window)
        sums = np.array([sums for _, sums in self.window], dtype=np.float64)
        return rows, sums.sum(axis=0) / rows if rows else np.full(len(self.log_evidence), np.nan)


class Break:
    """Alarms that the conditional mean of a score is no longer at or above its threshold θ.

    Evidence, updated once per batch: M ← (M + 1) · Π_i (1 + f (θ - x_i) / (1 - θ)), averaged over
    bets f of 0.03 to 0.9; alarm when it reaches 2k · run_length. Window: alarm when
    W · KL(x̄_W ‖ θ) ≥ log(2k · run_length) over the last W ≥ ``window`` rows, if x̄_W < θ.

    As long as every conditional mean is at or above its threshold, the probability of any alarm
    within T updates is at most T / run_length, for all k thresholds together: M - t is a
    supermartingale, and each window alarm has probability at most 1 / (2k · run_length).

    Args:
        thresholds: θ in (0, 1), one per stream of scores.
        run_length: updates per false alarm, at least, > 1.
        window: rows of the recent window, ≥ 1; whole batches are kept, the fewest that hold so many.

    Raises:
        ConfigurationError: if an argument is out of range.

    Example:
        >>> detector = Break([0.95])
        >>> state, alarm = detector.update(detector.init(), np.zeros((1, 8)))
        >>> bool(alarm[0])
        True
    """

    def __init__(self, thresholds: list[float], *, run_length: float = 10_000.0, window: int = 64) -> None:
        if not len(thresholds):
            raise ConfigurationError("Break watches nothing. Give at least one threshold.")
        for threshold in thresholds:
            _open_unit("Break", "threshold", threshold)
        self.thresholds = np.array(thresholds, dtype=np.float64)
        self.run_length = check_number("Break", "run_length", run_length, low=1.0, open_low=True)
        self.window = whole_number("Break", "window", window)
        self._log_alarm = math.log(2.0 * len(self.thresholds) * self.run_length)
        self._bets = (_FRACTIONS / (1.0 - self.thresholds[:, None]))[:, :, None]

    def init(self) -> BreakState:
        """Return the state before the first score."""
        return BreakState(np.full((self.thresholds.size, _FRACTIONS.size), -np.inf), ())

    def update(self, state: BreakState, scores: FloatArray) -> tuple[BreakState, BoolArray]:
        """Return the next state and which thresholds are broken.

        Args:
            state: what the last update returned; after an alarm, `init` starts over.
            scores: ``(k, n_rows)`` in [0, 1], n_rows ≥ 1, each row sorted so that order cannot matter.

        Raises:
            ConfigurationError: if there are scores of another shape, or outside [0, 1].
        """
        scores = check_scores(scores, self.thresholds.size)
        return self.advance(state, scores.shape[1], tuple(scores.sum(axis=1).tolist()), self.growth(scores))

    def growth(self, scores: FloatArray) -> FloatArray:
        """Return what ``scores`` add to the log evidence of each bet, ``(k, 5)``."""
        deficits = (self.thresholds[:, None] - scores)[:, None, :]
        growth: FloatArray = np.log1p(self._bets * deficits).sum(axis=2)
        return growth

    def advance(
        self, state: BreakState, n_rows: int, totals: tuple[float, ...], growth: FloatArray
    ) -> tuple[BreakState, BoolArray]:
        """Return what `update` does, for scores reduced to their number, their sums and their `growth`."""
        log_evidence = np.logaddexp(state.log_evidence, 0.0) + growth
        window = (*state.window, (n_rows, totals))
        rows = sum(n for n, _ in window)
        while rows - window[0][0] >= self.window:
            rows -= window[0][0]
            window = window[1:]
        following = BreakState(log_evidence, window)
        rows, mean = following.recent()
        alarm = np.logaddexp.reduce(log_evidence, axis=1) + _LOG_WEIGHT >= self._log_alarm
        low = rows * kl_bernoulli(mean, self.thresholds) >= self._log_alarm
        return following, alarm | (low & (mean < self.thresholds))

    def rows_to_alarm(self, mean: float, *, batch: int = 1, index: int = 0) -> float:
        """Return an upper bound on the expected rows from a break to the alarm; inf if it is none.

        h / g + v / g² + batch, with h the evidence still to gather and g, v the mean and variance of
        what a row adds to it (Wald's identity, and Lorden's bound on the overshoot of a batch), for
        the best single bet. It holds for independent scores of any distribution: at a given mean,
        scores of 0 and 1 alone, which it reckons with, add the least and vary the most.

        Args:
            mean: mean score after the break, in [0, 1].
            batch: rows per update.
            index: which threshold.
        """
        threshold = float(self.thresholds[index])
        miss, hit = np.log1p(_FRACTIONS * threshold / (1.0 - threshold)), np.log1p(-_FRACTIONS)
        growth = (1.0 - mean) * miss + mean * hit
        useful = growth > 0.0
        if mean >= threshold or not useful.any():
            return math.inf
        g, variance = growth[useful], mean * (1.0 - mean) * (miss - hit)[useful] ** 2
        rows = (self._log_alarm - _LOG_WEIGHT) / g + variance / g**2 + batch
        return float(rows.min())


def kl_bernoulli(mean: FloatArray, threshold: FloatArray) -> FloatArray:
    """Return KL(mean ‖ threshold) of two Bernoulli distributions in nats; thresholds lie in (0, 1)."""
    mean = np.clip(mean, 0.0, 1.0)
    hit = mean * np.log(np.where(mean > 0.0, mean, 1.0) / threshold)
    miss = (1.0 - mean) * np.log(np.where(mean < 1.0, 1.0 - mean, 1.0) / (1.0 - threshold))
    return hit + miss


def check_scores(scores: FloatArray, k: int) -> FloatArray:
    """Return ``scores`` if they are ``(k, n_rows)`` numbers in [0, 1].

    Raises:
        ConfigurationError: otherwise.
    """
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 2 or len(given) != k or not ((given >= 0.0) & (given <= 1.0)).all():
        raise ConfigurationError(
            f"Scores of shape {given.shape} are not numbers in [0, 1], a row for each of {k} thresholds: nothing is "
            "promised for others."
        )
    return given


def _open_unit(owner: str, name: str, value: float) -> float:
    check_number(owner, name, value, low=0.0, high=1.0)
    if value in (0.0, 1.0):
        raise ConfigurationError(
            f"{owner}: {name} is {value!r}; a finite sample can show neither 0 nor 1. Give a number between them."
        )
    return float(value)
