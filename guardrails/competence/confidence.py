"""Confidence sequences: bounds on a mean that hold at all times at once, so one may look after every batch.

Scores x₁, x₂, ... lie in [0, 1]; of their distribution only this is assumed: each has a conditional
mean μ_t given those before it. Sources: Howard, Ramdas, McAuliffe, Sekhon 2021 (Theorem 4, discrete
mixtures); Fan, Grama, Liu 2015 (the inequality behind it); Waudby-Smith, Ramdas 2024 (betting).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guardrails.errors import ConfigurationError
from guardrails.rollout import FloatArray
from guardrails.schedulers.base import check_number, whole_number

# A mixture over tilts λ = o / (1 + o). For scores with mean slack Δ and variance v the best odds are
# o = Δ / v; the range serves a slack of 0.001 at v = 0.25 as well as scores that never miss.
_ODDS = np.exp(np.arange(math.log(1 / 250), math.log(80), math.log(3)))
_TILTS = _ODDS / (1.0 + _ODDS)
_PSI = -np.log1p(-_TILTS) - _TILTS
_BELL = 1.0 / (1.0 + (np.log(_ODDS) / 2.0) ** 2)
_LOG_WEIGHTS = np.log(_BELL / _BELL.sum())
_NEWTON_STEPS = 3


def bernstein_boundary(variance: npt.ArrayLike, log_inverse_error: npt.ArrayLike) -> FloatArray:
    """Return u(V): Σ(x_t - μ_t) stays below it at all times with probability ≥ 1 - error.

    u solves Σ_j w_j exp(λ_j u - ψ(λ_j) V) = 1 / error with ψ(λ) = -log(1 - λ) - λ and V the sum of
    (x_t - c_t)², each centre c_t chosen before x_t was seen. Newton's method comes from above on a
    convex function, so that stopping early errs on the safe side.

    Args:
        variance: V ≥ 0, any shape.
        log_inverse_error: log(1 / error) > 0, of a shape that broadcasts with ``variance``.

    Example:
        >>> float(bernstein_boundary(0.0, math.log(20)).round(2))
        4.4
    """
    penalty = np.asarray(variance, dtype=np.float64)[..., None] * _PSI - _LOG_WEIGHTS
    penalty = penalty + np.asarray(log_inverse_error, dtype=np.float64)[..., None]
    u: FloatArray = (penalty / _TILTS).min(axis=-1)
    for _ in range(_NEWTON_STEPS):
        terms = np.exp(u[..., None] * _TILTS - penalty)
        total = terms.sum(axis=-1)
        u = u - np.log(total) * total / (terms @ _TILTS)
    return u


def rows_until_certain(slack: FloatArray, variance: FloatArray, log_inverse_error: FloatArray) -> FloatArray:
    """Return after how many rows in all a mean is shown to lie ``slack`` below what is seen; inf if never.

    Args:
        slack: mean score minus threshold.
        variance: V per row so far.
        log_inverse_error: log(1 / error).
    """
    gain = slack[..., None] * _TILTS - variance[..., None] * _PSI
    need = log_inverse_error[..., None] - _LOG_WEIGHTS
    rows: FloatArray = np.where(gain > 0.0, need / np.where(gain > 0.0, gain, 1.0), np.inf).min(axis=-1)
    return rows


class BernsteinState(NamedTuple):
    """State of `EmpiricalBernstein`: rows seen, Σx and V."""

    rows: float
    total: float
    variance: float


class EmpiricalBernstein:
    """Bounds on the running average of the conditional means, (μ₁ + ... + μ_n) / n.

    lower_n = x̄_n - u(V_n) / n, upper_n = x̄_n + u(V_n) / n, with u the `bernstein_boundary` and
    V_n = Σ(x_t - c_t)². The centre of a whole batch is the mean before it, so neither memory nor
    time depends on the run's length, and rows of a batch may trade places. Nothing is assumed to be
    stationary: P(ever: running average < lower_n) ≤ error, and likewise above.

    Args:
        centre: c₁ in [0, 1], a guess of the mean before the first score.

    Example:
        >>> sequence = EmpiricalBernstein()
        >>> state = sequence.update(sequence.init(), np.ones(500))
        >>> round(sequence.lower(state, 0.05), 3)
        0.981
    """

    def __init__(self, centre: float = 0.9) -> None:
        self.centre = check_number("EmpiricalBernstein", "centre", centre, low=0.0, high=1.0)

    def init(self) -> BernsteinState:
        """Return the state before the first score."""
        return BernsteinState(0.0, 0.0, 0.0)

    def update(self, state: BernsteinState, scores: FloatArray) -> BernsteinState:
        """Return the state after a batch of ``(n_rows,)`` scores in [0, 1]."""
        centre = (state.total + 8.0 * self.centre) / (state.rows + 8.0)
        x = np.sort(_scores(scores))
        variance = state.variance + float(((x - centre) ** 2).sum())
        return BernsteinState(state.rows + x.size, state.total + float(x.sum()), variance)

    def lower(self, state: BernsteinState, error: float) -> float:
        """Return the lower bound, which fails ever with probability ≤ ``error``."""
        return max(0.0, state.total / state.rows - self._width(state, error)) if state.rows else 0.0

    def upper(self, state: BernsteinState, error: float) -> float:
        """Return the upper bound, which fails ever with probability ≤ ``error``."""
        return min(1.0, state.total / state.rows + self._width(state, error)) if state.rows else 1.0

    def _width(self, state: BernsteinState, error: float) -> float:
        return float(bernstein_boundary(state.variance, -math.log(_error(error)))) / state.rows


_FRACTIONS = np.array([0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.95])


class BettingState(NamedTuple):
    """State of `Betting`: log capital per candidate mean and fraction, of bets for a higher and a lower mean."""

    high: FloatArray
    low: FloatArray


class Betting:
    """Bounds by betting against each candidate mean m; tighter than `EmpiricalBernstein` far from 0 and 1 only.

    K_n(m) = mean over f of Π_t (1 - f + f x_t / m) is the capital of bets of constant fraction f that
    the mean exceeds m; the lower bound is the largest m on the grid with K_n(m) ≥ 1 / error.

    If all μ_t equal μ: P(ever: μ < lower_n) ≤ error. If they move, for each *fixed* m:
    P(ever: lower_n ≥ m while the running average of μ_t is ≤ m) ≤ error, because
    Π(1 - f + f μ_t / m) ≤ exp(f Σ(μ_t / m - 1)) ≤ 1 whenever that average is ≤ m. It says nothing of
    a moving average and a moving m at once; `EmpiricalBernstein` does.

    Args:
        resolution: candidate means 1/resolution, 2/resolution, ...; memory is 14 floats for each.

    Example:
        >>> betting = Betting()
        >>> state = betting.update(betting.init(), np.ones(500))
        >>> betting.lower(state, 0.05)
        0.99
    """

    def __init__(self, resolution: int = 200) -> None:
        self.resolution = whole_number("Betting", "resolution", resolution, low=2)
        self._means = np.arange(1, self.resolution) / self.resolution

    def init(self) -> BettingState:
        """Return the capital of 1 that every bet starts with."""
        zeros = np.zeros((self._means.size, _FRACTIONS.size))
        return BettingState(zeros, zeros)

    def update(self, state: BettingState, scores: FloatArray) -> BettingState:
        """Return the state after a batch of ``(n_rows,)`` scores in [0, 1]."""
        x = np.sort(_scores(scores))
        return BettingState(state.high + self._log_growth(x), state.low + self._log_growth(1.0 - x[::-1]))

    def lower(self, state: BettingState, error: float) -> float:
        """Return the lower bound on the mean."""
        return self._largest_refuted(state.high, error)

    def upper(self, state: BettingState, error: float) -> float:
        """Return the upper bound on the mean."""
        return 1.0 - self._largest_refuted(state.low, error)

    def _log_growth(self, x: FloatArray) -> FloatArray:
        growth = np.zeros((self._means.size, _FRACTIONS.size))
        for index, fraction in enumerate(_FRACTIONS):
            growth[:, index] = np.log1p(fraction * (x / self._means[:, None] - 1.0)).sum(axis=1)
        return growth

    def _largest_refuted(self, log_capital: FloatArray, error: float) -> float:
        top = log_capital.max(axis=1)
        log_mean = top + np.log(np.exp(log_capital - top[:, None]).mean(axis=1))
        refuted = np.flatnonzero(log_mean >= -math.log(_error(error)))
        return float(self._means[refuted[-1]]) if refuted.size else 0.0


def spending(share: float, attempt: npt.ArrayLike) -> FloatArray:
    """Return share · 6 / (π² k²), the error of the k-th attempt; over all attempts it sums to ``share``.

    Args:
        share: error to spend over an unbounded run, in (0, 1).
        attempt: k ≥ 1.

    Example:
        >>> float(spending(0.05, 1).round(4))
        0.0304
    """
    return share * (6.0 / math.pi**2) / np.square(np.asarray(attempt, dtype=np.float64))


def _scores(values: FloatArray) -> FloatArray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not ((scores >= 0.0) & (scores <= 1.0)).all():
        raise ConfigurationError(
            f"Scores of shape {scores.shape} are not numbers in [0, 1], one per row: the bounds hold for such only."
        )
    return scores


def _error(error: float) -> float:
    return check_number("confidence sequence", "error", error, low=0.0, high=1.0 - 1e-12, open_low=True)
