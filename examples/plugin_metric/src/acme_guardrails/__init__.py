"""Acme's metrics for training-guardrails; the entry point `acme` names this module."""

import guardrails
from acme_guardrails.politeness import Politeness

__all__ = ["Politeness"]


@guardrails.hookimpl
def guardrails_competence_metrics():
    return [Politeness]
