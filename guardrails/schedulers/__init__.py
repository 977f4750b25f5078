"""How the strength of a constraint follows its violation."""

from guardrails.schedulers.anneal import Fixed
from guardrails.schedulers.base import ConstraintScheduler
from guardrails.schedulers.dual import DualAscent
from guardrails.schedulers.pid import PID

__all__ = ["PID", "ConstraintScheduler", "DualAscent", "Fixed"]
