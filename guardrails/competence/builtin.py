"""Competence read from what a host measures anyway: rewards, costs, divergence, entropy, edits."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from guardrails.competence.metric import CompetenceMetric, column, cost_column, to_unit
from guardrails.errors import ConfigurationError
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers.base import check_number


class RewardLevel(CompetenceMetric):
    """score = clip((reward - floor) / (reference - floor), 0, 1): how much of a reference level is reached.

    Args:
        reference: the reward that counts as 1, in the reward's unit.
        floor: the reward that counts as 0, below ``reference``.

    Example:
        >>> RewardLevel(reference=2.0).measure(Rollout(rewards=[1.0, 3.0]))
        array([0.5, 1. ])
    """

    name = "reward_level"
    requires = frozenset({"rewards"})

    def __init__(self, reference: float = 1.0, *, floor: float = 0.0) -> None:
        self.floor = check_number("RewardLevel", "floor", floor)
        self.reference = check_number("RewardLevel", "reference", reference, low=self.floor, open_low=True)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return the share of the reference level that each row reached."""
        rewards = column(rollout, "rewards")
        return to_unit((rewards - self.floor) / (self.reference - self.floor))


class Stability(CompetenceMetric):
    """score = clip(1 - d² / spread², 0, 1), with d² = (r - centre)² + (r - mean)² / (n - 1) of a reward r.

    The centre is the rollout's mean reward, or ``level`` where the mean has fallen below it, so that a
    downward trend counts against stability as variance does: the scores' mean is 1 - (variance + [level - mean]₊²) /
    spread², where none is cut to 0. n is the number of rows; what is divided by n - 1 makes up for a mean that is taken
    of the very rows it is held against, so that few rows do not look stable. A single one shows no stability and
    scores 0, unless there is a ``level`` to hold it against. The rows are not
    independent evidence, which is a reason for a gate's ``dwell`` of several batches.

    Args:
        spread: deviation that counts as 0, > 0, in the reward's unit.
        level: mean reward once held, from which a falling trend is measured. Default: no trend.

    Example:
        >>> Stability(spread=2.0).measure(Rollout(rewards=[1.0, 3.0, 2.0]))
        array([0.625, 0.625, 1.   ])
        >>> Stability(spread=2.0, level=3.0).measure(Rollout(rewards=[2.0, 2.0]))
        array([0.75, 0.75])
    """

    name = "stability"
    requires = frozenset({"rewards"})

    def __init__(self, spread: float = 1.0, *, level: float | None = None) -> None:
        self.spread = check_number("Stability", "spread", spread, low=0.0, open_low=True)
        self.level = None if level is None else check_number("Stability", "level", level)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return how close each row is to the centre."""
        rewards: FloatArray = column(rollout, "rewards")
        if rewards.size == 0:
            return rewards
        if rewards.size == 1 and self.level is None:
            return np.zeros(1)
        mean = float(rewards.mean())
        centre = mean if self.level is None else max(mean, self.level)
        own = np.square(rewards - mean) / max(rewards.size - 1, 1)
        return to_unit(1.0 - (np.square(rewards - centre) + own) / self.spread**2)


class ConstraintSatisfaction(CompetenceMetric):
    """score = 1 where cost ≤ limit, falling to 0 over ``margin`` beyond it; at once where margin is 0.

    Args:
        cost: name of the cost column.
        limit: largest cost of a row that counts as 1, in the cost's unit.
        sense: ``"<="``, or ``">="`` for a lower limit.
        margin: ≥ 0, in the cost's unit.

    Example:
        >>> ConstraintSatisfaction("cost", 25.0, margin=10.0).measure(Rollout(costs={"cost": [20.0, 30.0, 40.0]}))
        array([1. , 0.5, 0. ])
    """

    name = "constraint_satisfaction"

    def __init__(
        self, cost: str = "cost", limit: float = 0.0, *, sense: Literal["<=", ">="] = "<=", margin: float = 0.0
    ) -> None:
        if sense not in ("<=", ">="):
            raise ConfigurationError(f"ConstraintSatisfaction: sense is {sense!r}; give '<=' or '>='.")
        self.cost, self.sense = cost, sense
        self.limit = check_number("ConstraintSatisfaction", "limit", limit)
        self.margin = check_number("ConstraintSatisfaction", "margin", margin, low=0.0)
        self.requires = frozenset({cost})

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return 1 for rows within the limit; a cost that is not finite is a violation."""
        cost = cost_column(rollout, self.cost)
        excess = (cost - self.limit) * (1.0 if self.sense == "<=" else -1.0)
        excess = np.where(np.isfinite(cost), excess, np.inf)
        if self.margin == 0.0:
            return (excess <= 0.0).astype(np.float64)
        scores: FloatArray = np.clip(1.0 - excess / self.margin, 0.0, 1.0)
        return scores


class Drift(CompetenceMetric):
    """score = clip(1 - KL / limit, 0, 1): closeness to the reference policy.

    Args:
        limit: divergence that counts as 0, > 0, in nats.

    Example:
        >>> Drift(limit=2.0).measure(Rollout(kl=[0.5, 3.0]))
        array([0.75, 0.  ])
    """

    name = "drift"
    requires = frozenset({"kl"})

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = check_number("Drift", "limit", limit, low=0.0, open_low=True)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return how little each row has drifted."""
        return to_unit(1.0 - column(rollout, "kl") / self.limit)


class TokenEntropy(CompetenceMetric):
    """score = clip(1 - entropy / maximum, 0, 1): decidedness of a language policy, as `ActionVariance` for actions.

    Args:
        maximum: entropy that counts as 0, > 0, in nats per token; log(vocabulary size) is the largest there is.

    Example:
        >>> TokenEntropy(maximum=2.0).measure(Rollout(entropy=[0.5, 4.0]))
        array([0.75, 0.  ])
    """

    name = "token_entropy"
    requires = frozenset({"entropy"})

    def __init__(self, maximum: float = math.log(50_000)) -> None:
        self.maximum = check_number("TokenEntropy", "maximum", maximum, low=0.0, open_low=True)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return how decided each row is."""
        return to_unit(1.0 - column(rollout, "entropy") / self.maximum)


class RefinerAgreement(CompetenceMetric):
    """score = 1 - edit ratio: how much of a completion the refiner left as it was.

    Example:
        >>> RefinerAgreement().measure(Rollout(edit_ratio=[0.25, 0.0]))
        array([0.75, 1.  ])
    """

    name = "refiner_agreement"
    requires = frozenset({"edit_ratio"})

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return the share of each row that needed no correction."""
        scores: FloatArray = 1.0 - column(rollout, "edit_ratio")
        return scores
