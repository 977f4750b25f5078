"""Guardrails for TRL: `GuardrailsCallback` makes a GRPO, RLOO, OnlineDPO or loss trainer respect constraints."""

from guardrails_trl.callback import GuardrailsCallback

__all__ = ["GuardrailsCallback"]
