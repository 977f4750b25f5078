"""The online refiner: who corrects, what is to be corrected, and which corrections count."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from guardrails.errors import PluginError
from guardrails.refine.acceptance import Acceptance
from guardrails.refine.correction import Corrections, Corrector
from guardrails.refine.degeneration import Degenerate, Empty, LowEntropy, Repetition, Truncated, Unparsable
from guardrails.refine.detectors import AllOf, Always, AnyOf, Detector, Not, Rows, detected
from guardrails.refine.edits import edit_ratio
from guardrails.refine.judges import CostAbove, Predicate
from guardrails.refine.refiner import FunctionRefiner, RefineHost, Refiner, Text, plain

_LATE = {"ModelRefiner": "guardrails.refine.model", "EndpointRefiner": "guardrails.refine.endpoint"}
"""Names of modules that need torch or another large package, imported when the name is first used."""

DETECTORS: Mapping[str, Callable[..., Detector]] = {
    kind.name: kind
    for kind in (Always, CostAbove, Degenerate, Empty, LowEntropy, Predicate, Repetition, Truncated, Unparsable)
}
"""Detectors that can be named where one is asked for: ``Refinement(..., when="degenerate")``."""


class _Refiners(Mapping[str, Callable[..., Refiner]]):
    """Refiners by name; a class is imported when it is asked for."""

    _CLASSES: Mapping[str, str] = {
        "endpoint": "EndpointRefiner",
        "function": "FunctionRefiner",
        "model": "ModelRefiner",
    }

    def __getitem__(self, name: str) -> Callable[..., Refiner]:
        kind = self._CLASSES[name]
        try:
            found: Callable[..., Refiner] = globals().get(kind) or __getattr__(kind)
        except ImportError as error:
            raise PluginError(
                f"The refiner '{name}' needs a package that is not installed ({error}). "
                "Run: pip install 'training-guardrails[trl]'."
            ) from error
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._CLASSES)

    def __len__(self) -> int:
        return len(self._CLASSES)


REFINERS: Mapping[str, Callable[..., Refiner]] = _Refiners()
"""Refiners that can be named where one is asked for: ``Refinement("model")``."""

__all__ = [
    "DETECTORS",
    "REFINERS",
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
