"""Guardrails for Stable-Baselines3: `wrap` a model, let it learn, `unwrap` it.

On-policy algorithms (PPO, A2C, and sb3-contrib's TRPO, RecurrentPPO and MaskablePPO) are guarded at
the end of each rollout, through the host's own callbacks; see `guardrails_sb3.on_policy`.
"""

from guardrails_sb3.wrap import unwrap, wrap

__all__ = ["unwrap", "wrap"]
