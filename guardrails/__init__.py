"""Adaptive constraints for existing trainers.

A `Guard` holds `Constraint` objects; an adapter (``guardrails_trl``, ``guardrails_transformers``,
``guardrails_sb3``) feeds it what the host measured and applies what it decides. Any other loop calls
``guard.step(Rollout(...))`` itself.
"""

from guardrails.action_set import ActionSet
from guardrails.competence import CompetenceMetric, Gate, Require
from guardrails.constraint import Constraint, Dial
from guardrails.decision import ConstraintDecision, Decision, GateDecision, Reason, RequirementDecision
from guardrails.errors import (
    AttachError,
    ConfigurationError,
    GuardrailsError,
    LedgerError,
    PluginError,
    RolloutError,
    StateError,
)
from guardrails.guard import Guard
from guardrails.plugins import hookimpl
from guardrails.refinement import Refinement
from guardrails.rollout import Rollout

__version__ = "0.1.0"

__all__ = [
    "ActionSet",
    "AttachError",
    "CompetenceMetric",
    "ConfigurationError",
    "Constraint",
    "ConstraintDecision",
    "Decision",
    "Dial",
    "Gate",
    "GateDecision",
    "Guard",
    "GuardrailsError",
    "LedgerError",
    "PluginError",
    "Reason",
    "Refinement",
    "Require",
    "RequirementDecision",
    "Rollout",
    "RolloutError",
    "StateError",
    "__version__",
    "hookimpl",
]
