"""What every transformers-based host shares: the guard's state in a checkpoint folder."""

from guardrails_transformers.checkpoint import load_guard, save_guard

__all__ = ["load_guard", "save_guard"]
