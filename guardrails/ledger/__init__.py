"""The ledger: an append-only record of a run that can be read, verified and replayed.

`Guard.record` writes it, `read` and `Reader` read it, ``guardrails verify`` proves it; `lines` says what it holds.
"""

from guardrails.ledger.lines import SCHEMA
from guardrails.ledger.reader import AlteredError, Line, Reader, files, find, read
from guardrails.ledger.verification import Verification, verify
from guardrails.ledger.writer import Ledger

__all__ = ["SCHEMA", "AlteredError", "Ledger", "Line", "Reader", "Verification", "files", "find", "read", "verify"]
