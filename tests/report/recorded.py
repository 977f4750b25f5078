"""Runs recorded by real guards, for the tests of reports."""

import numpy as np

from guardrails import CompetenceMetric, Constraint, Dial, Gate, Guard, Require, Rollout
from guardrails.schedulers import PID


class Politeness(CompetenceMetric):
    """Reads its scores from ``infos``; fails where one is missing."""

    name = "politeness"
    requires = frozenset({"infos"})

    def measure(self, rollout):
        return [info["polite"] for info in rollout.infos]


def guard(name="toxicity", limit=0.3):
    gate = Gate(Require(Politeness(), at_least=0.8), Require("reward_level", at_least=0.5), rungs=4, dwell=8)
    return Guard(
        Constraint(name, limit=gate.between(limit, 2 * limit), scheduler=PID()),
        Constraint("length", limit=50.0, sense=">="),
        Dial("beta", gate.between(0.1, 0.01)),
    )


def rollout(step, rng, *, name="toxicity", polite=True, rows=32):
    cost = rng.normal(0.2 + 0.6 * np.exp(-step / 30), 0.15, rows)
    return Rollout(
        rewards=np.clip(rng.normal(0.8, 0.05, rows), 0, 1),
        costs={name: cost, "length": rng.normal(40 + step / 4, 9, rows)},
        infos=[{"polite": 0.95 if polite else 0.1} for _ in range(rows)],
    )


def record(folder, steps=80, *, seed=0, name="toxicity", impolite=range(50, 53), close=True, max_bytes=1 << 28):
    """Train nothing, but let a real guard decide ``steps`` times and record it; return the guard."""
    rng, made = np.random.default_rng(seed), guard(name)
    ledger = made.record(folder / "ledger.jsonl", seed=seed, max_bytes=max_bytes)
    for step in range(1, steps + 1):
        made.step(rollout(step, rng, name=name, polite=step not in impolite))
        if step == 20:
            ledger.note("refinement", refinement(step))
    if close:
        ledger.close()
    else:
        ledger.flush()
    return made


def refinement(step, before="the the cat sat sat down", after="the cat sat down", prompt="Tell me of a cat."):
    return {
        "step": step,
        "rows": 32,
        "refined": 5,
        "accepted": 4,
        "examples": [{"prompt": prompt, "before": before, "after": after, "accepted": True}],
    }
