"""Calibration: how far a safety critic's predictions were from the costs that then came."""

from __future__ import annotations

from guardrails.competence.metric import CompetenceMetric, to_unit
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers.base import check_number

CRITIC_ERROR = "critic_error"
"""Name of the column in which a host with a safety critic gives each episode's prediction error."""


class CriticCalibration(CompetenceMetric):
    """score = clip(1 - e / tolerance, 0, 1), with e the episode's mean |predicted - realised| cost-to-go.

    Errors are in violation scales: 1 is a limit's worth of cost (for a constraint with the default
    scale), so the default tolerance scores 0 where the critic is off by half the limit. Over several
    constraints e is the largest.

    Args:
        tolerance: error that counts as 0, > 0, in violation scales.

    Example:
        >>> CriticCalibration().measure(Rollout(costs={"critic_error": [0.1, 0.6]}))
        array([0.8, 0. ])
    """

    name = "critic_calibration"
    requires = frozenset({CRITIC_ERROR})

    def __init__(self, tolerance: float = 0.5) -> None:
        self.tolerance = check_number("CriticCalibration", "tolerance", tolerance, low=0.0, open_low=True)

    def measure(self, rollout: Rollout) -> FloatArray:
        """Return how close the predictions made in each episode were to its costs."""
        return to_unit(1.0 - rollout.cost(CRITIC_ERROR) / self.tolerance)
