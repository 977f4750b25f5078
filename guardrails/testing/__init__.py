"""Suites that the authors of metrics and schedulers subclass in their own tests.

They use plain assertions of behaviour and need no package beyond the core; pytest collects them.
"""

from guardrails.testing.metrics import MetricContract
from guardrails.testing.schedulers import SchedulerContract

__all__ = ["MetricContract", "SchedulerContract"]
