"""ALGD: a diffusion policy inside Stable-Baselines3's own SAC, guided by the augmented Lagrangian (arXiv 2602.02924).

`DiffusionPolicy` is a policy class of `stable_baselines3.SAC`; `guardrails_sb3.wrap` guards a model that has one
and adds the score-matching loss; `make` puts both together with the paper's settings.
"""

from guardrails_sb3.algd.policy import DiffusionPolicy
from guardrails_sb3.algd.presets import make
from guardrails_sb3.algd.schedules import DDPMSchedule, Schedule, VESchedule, ddpm_schedule, ve_schedule
from guardrails_sb3.algd.score import ScoreMatching, energy, score_loss, score_target

__all__ = [
    "DDPMSchedule",
    "DiffusionPolicy",
    "Schedule",
    "ScoreMatching",
    "VESchedule",
    "ddpm_schedule",
    "energy",
    "make",
    "score_loss",
    "score_target",
    "ve_schedule",
]
