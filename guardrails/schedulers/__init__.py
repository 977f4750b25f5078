"""How the strength of a constraint follows its violation."""

from collections.abc import Mapping
from typing import Any

from guardrails.schedulers.anneal import Anneal, Fixed
from guardrails.schedulers.augmented import AugmentedLagrangian, augmented_penalty, effective_multiplier
from guardrails.schedulers.augmenting import Augmented
from guardrails.schedulers.base import ConstraintScheduler
from guardrails.schedulers.dual import AdamAscent, DualAscent
from guardrails.schedulers.elementwise import ElementwiseScheduler, Ops
from guardrails.schedulers.kl import AdaptiveKL
from guardrails.schedulers.log_dual import AdamLogDual, LogDual
from guardrails.schedulers.margin import Margin
from guardrails.schedulers.nupi import NuPI
from guardrails.schedulers.pid import PID
from guardrails.schedulers.rows import stack, unstack
from guardrails.schedulers.switching import CRPO
from guardrails.schedulers.wrappers import Cap, RateLimit, Smooth, Warmup

BUILTIN: Mapping[str, type[ConstraintScheduler[Any]]] = {
    "adam_ascent": AdamAscent,
    "adam_log_dual": AdamLogDual,
    "adaptive_kl": AdaptiveKL,
    "anneal": Anneal,
    "augmented_lagrangian": AugmentedLagrangian,
    "crpo": CRPO,
    "dual_ascent": DualAscent,
    "fixed": Fixed,
    "log_dual": LogDual,
    "nupi": NuPI,
    "pid": PID,
}
"""Schedulers that can be named where one is asked for: ``Constraint(..., scheduler="nupi")``."""

WRAPPERS: Mapping[str, type[ConstraintScheduler[Any]]] = {
    "augmented": Augmented,
    "cap": Cap,
    "margin": Margin,
    "rate_limit": RateLimit,
    "smooth": Smooth,
    "warmup": Warmup,
}
"""Schedulers around another, by the names that a policy file uses."""

__all__ = [
    "BUILTIN",
    "CRPO",
    "PID",
    "WRAPPERS",
    "AdamAscent",
    "AdamLogDual",
    "AdaptiveKL",
    "Anneal",
    "Augmented",
    "AugmentedLagrangian",
    "Cap",
    "ConstraintScheduler",
    "DualAscent",
    "ElementwiseScheduler",
    "Fixed",
    "LogDual",
    "Margin",
    "NuPI",
    "Ops",
    "RateLimit",
    "Smooth",
    "Warmup",
    "augmented_penalty",
    "effective_multiplier",
    "stack",
    "unstack",
]
