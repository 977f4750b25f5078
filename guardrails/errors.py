"""The errors a user meets; each message names the cause and the cure."""

from __future__ import annotations

import re

_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+")

_LONGEST = 500
"""Characters of a foreign error's message that are told: it is repeated in decisions, ledgers and logs."""


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


def stable(text: str) -> str:
    """Return ``text`` without addresses in memory: no two processes have the same, and decisions are replayed."""
    return _ADDRESS.sub("", text)


def told(error: BaseException) -> str:
    """Return an error as a sentence has it, ``"ValueError: why"``: `stable`, cut short, and whatever its message is."""
    try:
        text = stable(str(error))
    except Exception:
        text = "its message cannot be shown"
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{type(error).__name__}: {cut}"
