"""Sets of safe actions: parts of a guard that hold each action of a model, wherever it acts."""

from guardrails_sb3.action_sets.base import SafeSet, Situation
from guardrails_sb3.action_sets.box import ActionBox
from guardrails_sb3.action_sets.deployment import SafeActions
from guardrails_sb3.action_sets.mask import ActionMask
from guardrails_sb3.action_sets.projection import Projection
from guardrails_sb3.action_sets.rate import RateLimit
from guardrails_sb3.action_sets.shield import CriticShield

__all__ = ["ActionBox", "ActionMask", "CriticShield", "Projection", "RateLimit", "SafeActions", "SafeSet", "Situation"]
