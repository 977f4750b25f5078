"""The online refiner: who corrects, what is to be corrected, and which corrections count."""

from __future__ import annotations

import importlib
from typing import Any

from guardrails.refine.acceptance import Acceptance
from guardrails.refine.correction import Corrections, Corrector
from guardrails.refine.degeneration import Degenerate, Empty, LowEntropy, Repetition, Truncated, Unparsable
from guardrails.refine.detectors import AllOf, Always, AnyOf, Detector, Not, Rows, detected
from guardrails.refine.edits import edit_ratio
from guardrails.refine.judges import CostAbove, Predicate
from guardrails.refine.refiner import FunctionRefiner, RefineHost, Refiner, Text, plain

_LATE = {"ModelRefiner": "guardrails.refine.model", "EndpointRefiner": "guardrails.refine.endpoint"}
"""Names of modules that need torch or another large package, imported when the name is first used."""

__all__ = [
    "Acceptance",
    "AllOf",
    "Always",
    "AnyOf",
    "Corrections",
    "Corrector",
    "CostAbove",
    "Degenerate",
    "Detector",
    "Empty",
    "EndpointRefiner",
    "FunctionRefiner",
    "LowEntropy",
    "ModelRefiner",
    "Not",
    "Predicate",
    "RefineHost",
    "Refiner",
    "Repetition",
    "Rows",
    "Text",
    "Truncated",
    "Unparsable",
    "detected",
    "edit_ratio",
    "plain",
]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
