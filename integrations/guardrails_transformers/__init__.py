"""Guardrails for transformers: `GuardrailsCallback` makes a `Trainer` respect constraints.

Also what every transformers-based host shares: the guard's state in a checkpoint folder.
"""

from guardrails_transformers.callback import GuardrailsCallback
from guardrails_transformers.checkpoint import load_guard, save_guard
from guardrails_transformers.rows import Traffic

__all__ = ["GuardrailsCallback", "Traffic", "load_guard", "save_guard"]
