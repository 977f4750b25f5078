"""Third-party metrics, schedulers, refiners and detectors, found by name."""

from guardrails.plugins.hookspecs import hookimpl

__all__ = ["hookimpl"]
