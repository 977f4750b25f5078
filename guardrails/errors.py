"""The errors a user meets; each message names the cause and the cure."""

from __future__ import annotations


class GuardrailsError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(GuardrailsError, ValueError):
    """A constructor was given a value that cannot mean anything (a negative limit, a gain of NaN)."""


class AttachError(GuardrailsError):
    """A guard cannot act on this host: unsupported class or version, missing column, attached twice."""


class RolloutError(GuardrailsError, ValueError):
    """The data of a step is malformed: a cost of the wrong length, a column that is not there."""


class StateError(GuardrailsError, ValueError):
    """A saved state is foreign, newer than this package, or damaged; nothing of it was loaded."""


class PluginError(GuardrailsError):
    """A plug-in's object cannot be had: the name is unknown or refused, or the plug-in failed to load."""


class LedgerError(GuardrailsError):
    """A ledger cannot be opened, read, verified or replayed: damaged, altered, foreign, newer, or in use."""
