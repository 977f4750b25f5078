"""Guardrails for TRL: `GuardrailsCallback` makes a GRPO or RLOO trainer respect constraints."""

from guardrails_trl.callback import GuardrailsCallback

__all__ = ["GuardrailsCallback"]
