"""Suites that the authors of metrics, schedulers, refiners and detectors subclass in their own tests.

They use plain assertions of behaviour and need no package beyond the core; pytest collects them.
"""

from guardrails.testing.detectors import DetectorContract
from guardrails.testing.metrics import MetricContract
from guardrails.testing.refiners import RefinerContract
from guardrails.testing.schedulers import SchedulerContract

__all__ = ["DetectorContract", "MetricContract", "RefinerContract", "SchedulerContract"]
