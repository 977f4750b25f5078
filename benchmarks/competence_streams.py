"""Streams of scores for the competence benchmark: what a policy does, knowing what the gate has done.

Two requirements with one threshold. The first follows the scenario; the second is always competent, except
where the scenario says otherwise. Each batch reports the conditional mean of every requirement beside its scores,
so that the truth of each climb is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from guardrails import Gate, Require
from guardrails.competence import FromFunction

THRESHOLD = 0.9
BATCH = 128
UPDATES = 500
STEADY = 0.97


@dataclass
class View:
    """What a policy may know of the gate before it acts.

    Args:
        rows: rows so far.
        since_move: rows since the gate's last climb or fall.
        climbs: climbs so far.
        falls: falls so far.
        truth: running average of the first requirement's conditional mean in the current evidence.
        evidence_rows: rows of that evidence.
        lower: its lower bound.
    """

    rows: int = 0
    since_move: int = 0
    climbs: int = 0
    falls: int = 0
    truth: float = 0.0
    evidence_rows: int = 0
    lower: float = 0.0


Play = tuple[float, np.ndarray]
Policy = Callable[[np.random.Generator, View, dict], Play]


def coin(rng, mean):
    return mean, (rng.random(BATCH) < mean).astype(float)


def just_under(rng, view, memory):
    return coin(rng, THRESHOLD - 0.005)


def just_over(rng, view, memory):
    return coin(rng, THRESHOLD + 0.02)


def slow_drift(rng, view, memory):
    return coin(rng, THRESHOLD + 0.05 * np.cos(2 * np.pi * view.rows / 16_000))


def bursts(rng, view, memory):
    left = memory.get("left", 0)
    if not left and rng.random() < 1 / 40:
        left = 4
    memory["left"] = max(left - 1, 0)
    return coin(rng, 1.0 if left else THRESHOLD - 0.04)


def switches_after_each_climb(rng, view, memory):
    if view.climbs > memory.get("climbs", 0):
        memory.update(climbs=view.climbs, bad=2_000)
    memory["bad"] = max(memory.get("bad", 0) - BATCH, 0)
    return coin(rng, 0.84 if memory["bad"] else 0.96)


def hides_failures(rng, view, memory):
    """Many scores a little above the threshold, a rare 0: the mean is just below, few samples show it."""
    return rare_zero(rng, THRESHOLD - 0.001, 0.02)


def rare_zero(rng, mean, gain):
    usual = min(mean + gain, 1.0)
    return mean, np.where(rng.random(BATCH) < mean / usual, usual, 0.0)


def adversary(rng, view, memory):
    """Keep the running truth 0.001 below the threshold whatever happens, and pick the odds by how near the gate is.

    Fair coins vary most and so reach furthest; close to a climb, many small gains against a rare 0 do better.
    """
    goal = THRESHOLD - 0.001
    owed = goal * (view.evidence_rows + BATCH) - view.truth * view.evidence_rows
    mean = float(np.clip(owed / BATCH, 0.0, goal + 0.05))
    if view.lower > THRESHOLD - 0.005:
        return rare_zero(rng, mean, 0.03)
    return coin(rng, mean)


POLICIES: dict[str, Policy] = {
    "stationary, just under": just_under,
    "stationary, just over": just_over,
    "slow drift": slow_drift,
    "bursts": bursts,
    "switches after each climb": switches_after_each_climb,
    "hides failures": hides_failures,
    "adversary that sees the gate": adversary,
}


class Gated:
    """The gate under test."""

    def __init__(self, confidence: float) -> None:
        scores = (FromFunction(float, "rewards", name=name) for name in ("followed", "steady"))
        self.gate = Gate(*(Require(each, at_least=THRESHOLD) for each in scores), confidence=confidence, rungs=1_000)
        self.state = self.gate.init()
        self.lower = 0.0

    def step(self, scores):
        """Return whether it climbed, whether it fell, and which evidence goes on."""
        before = self.state.rung
        self.state, decision = self.gate.decide(self.state, scores)
        self.lower = decision.requirements[0].lower
        return self.state.rung > before, self.state.rung < before, self.state.rows > 0


class MovingAverage:
    """What is common today: relax when the mean of the last 256 rows is at the threshold."""

    lower = 0.0

    def __init__(self, confidence: float) -> None:
        self.recent = np.zeros((2, 0))

    def step(self, scores):
        """Return whether it climbed, whether it fell, and which evidence goes on."""
        self.recent = np.hstack([self.recent, scores])[:, -256:]
        climbed = self.recent.shape[1] == 256 and bool((self.recent.mean(axis=1) >= THRESHOLD).all())
        if climbed:
            self.recent = self.recent[:, :0]
        return climbed, False, np.full(2, not climbed)


class Peeking:
    """A fixed-sample confidence interval, looked at after every batch since the last climb."""

    lower = 0.0

    def __init__(self, confidence: float) -> None:
        self.z = {0.95: 1.645}[confidence]
        self.rows, self.sums, self.squares = 0, np.zeros(2), np.zeros(2)

    def step(self, scores):
        """Return whether it climbed, whether it fell, and which evidence goes on."""
        self.rows += BATCH
        self.sums, self.squares = self.sums + scores.sum(axis=1), self.squares + np.square(scores).sum(axis=1)
        mean = self.sums / self.rows
        deviation = np.sqrt(np.maximum(self.squares / self.rows - mean**2, 0.0))
        climbed = bool((mean - self.z * deviation / np.sqrt(self.rows) >= THRESHOLD).all())
        if climbed:
            self.rows, self.sums, self.squares = 0, np.zeros(2), np.zeros(2)
        return climbed, False, np.full(2, not climbed)


RULES = {"gate": Gated, "moving average": MovingAverage, "peeking interval": Peeking}


@dataclass(frozen=True)
class Run:
    """Outcome of one stream.

    Args:
        climbs: climbs until the first false one, or in all.
        falls: falls likewise.
        false_climb: whether some climb came while a running average was below its threshold.
        first_climb_rows: rows until the first climb, NaN if none.
    """

    climbs: int
    falls: int
    false_climb: bool
    first_climb_rows: float


def play(rule: str, policy: str, seed: int, *, confidence: float = 0.95, updates: int = UPDATES) -> Run:
    """Run one stream; it ends at the first false climb."""
    rng = np.random.default_rng([seed, list(POLICIES).index(policy)])
    judge, view, memory = RULES[rule](confidence), View(), {}
    totals, rows = np.zeros(2), np.zeros(2)
    first = float("nan")
    for _ in range(updates):
        mean, followed = POLICIES[policy](rng, view, memory)
        steady = STEADY + 0.03 * (2.0 * rng.random(BATCH) - 1.0)
        totals, rows = totals + BATCH * np.array([mean, STEADY]), rows + BATCH
        climbed, fell, goes_on = judge.step(np.array([followed, steady]))
        view.rows += BATCH
        view.since_move = 0 if climbed or fell else view.since_move + BATCH
        view.climbs += climbed
        view.falls += fell
        if climbed and first != first:
            first = float(view.rows)
        # A running average exactly at the threshold meets it; the sum of floats may land a hair below.
        if climbed and (totals / rows < THRESHOLD - 1e-9).any():
            return Run(view.climbs, view.falls, True, first)
        totals, rows = totals * goes_on, rows * goes_on
        view.evidence_rows = int(rows[0])
        view.truth = totals[0] / rows[0] if rows[0] else 0.0
        view.lower = judge.lower
    return Run(view.climbs, view.falls, False, first)
