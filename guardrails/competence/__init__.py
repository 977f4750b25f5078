"""How trust is earned, measured by metrics and proven by a gate, and how it is lost."""

from collections.abc import Callable, Mapping

from guardrails.competence.adapters import FromFunction, FromTorchMetrics
from guardrails.competence.behaviour import ActionVariance, CriticCalibration, FailureAvoidance, SubgoalAdherence
from guardrails.competence.between import Between
from guardrails.competence.builtin import (
    ConstraintSatisfaction,
    Drift,
    RefinerAgreement,
    RewardLevel,
    Stability,
    TokenEntropy,
)
from guardrails.competence.change import Break
from guardrails.competence.confidence import Betting, EmpiricalBernstein
from guardrails.competence.gate import Gate
from guardrails.competence.metric import CompetenceMetric
from guardrails.competence.require import Require
from guardrails.competence.state import GateState

BUILTIN: Mapping[str, Callable[[], CompetenceMetric]] = {
    kind.name: kind
    for kind in (
        ActionVariance,
        ConstraintSatisfaction,
        CriticCalibration,
        Drift,
        FailureAvoidance,
        RefinerAgreement,
        RewardLevel,
        Stability,
        SubgoalAdherence,
        TokenEntropy,
    )
}
"""Metrics that can be named where one is asked for: ``Require("reward_level", at_least=0.9)``."""

__all__ = [
    "BUILTIN",
    "ActionVariance",
    "Betting",
    "Between",
    "Break",
    "CompetenceMetric",
    "ConstraintSatisfaction",
    "CriticCalibration",
    "Drift",
    "EmpiricalBernstein",
    "FailureAvoidance",
    "FromFunction",
    "FromTorchMetrics",
    "Gate",
    "GateState",
    "RefinerAgreement",
    "Require",
    "RewardLevel",
    "Stability",
    "SubgoalAdherence",
    "TokenEntropy",
]
