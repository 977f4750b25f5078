"""Guardrails for Stable-Baselines3: `wrap` a model, let it learn, `unwrap` it.

On-policy algorithms (PPO, A2C, and sb3-contrib's TRPO, RecurrentPPO and MaskablePPO) are guarded at
the end of each rollout, through the host's own callbacks; see `guardrails_sb3.on_policy`. Off-policy ones (SAC,
TD3, DDPG, DQN, and sb3-contrib's TQC, CrossQ and QRDQN) are guarded in their gradient steps, by a safety critic;
see `guardrails_sb3.off_policy`. ARS is guarded in the return of its candidates; see `guardrails_sb3.population`.
Action sets, parts of a guard as constraints are, hold each action of any of them to what is safe; see
`guardrails_sb3.action_sets`.
"""

from guardrails_sb3.action_sets import ActionBox, ActionMask, CriticShield, Projection, RateLimit, SafeActions
from guardrails_sb3.costs import terminated
from guardrails_sb3.evaluate import Estimate, Evaluation, evaluate_guarded
from guardrails_sb3.meters import CostMeters
from guardrails_sb3.wrap import safety_critic, unwrap, wrap

__all__ = [
    "ActionBox",
    "ActionMask",
    "CostMeters",
    "CriticShield",
    "Estimate",
    "Evaluation",
    "Projection",
    "RateLimit",
    "SafeActions",
    "evaluate_guarded",
    "safety_critic",
    "terminated",
    "unwrap",
    "wrap",
]
