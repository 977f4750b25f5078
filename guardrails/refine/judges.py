"""Detectors that ask others: a function of the user's, or a cost function such as a learned cost model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from guardrails.errors import ConfigurationError
from guardrails.refine.detectors import Detector, Rows
from guardrails.refine.refiner import Text
from guardrails.schedulers.base import check_number

logger = logging.getLogger(__name__)


class Predicate(Detector):
    """Rows on which a function says so. Of a row on which it raises, nothing can be told.

    Args:
        function: takes a prompt and the text of its completion and returns whether that is degenerate.

    Raises:
        ConfigurationError: if it is no function.

    Example:
        >>> short = Predicate(lambda prompt, completion: len(completion) < 4)
        >>> short(prompts=["Hello"] * 2, completions=["Hm.", "Good day."])
        [1.0, 0.0]
    """

    name = "predicate"

    def __init__(self, function: Callable[[Text, str], bool]) -> None:
        if not callable(function):
            raise ConfigurationError(f"Predicate({function!r}): give a function (prompt, completion) -> bool.")
        self.function = function

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return what the function says of each row."""
        return [self._ask(*row) for row in zip(rows.prompts, rows.completions, strict=True)]

    def _ask(self, prompt: Text, completion: str) -> bool | None:
        try:
            return bool(self.function(prompt, completion))
        except Exception as error:
            logger.debug("Predicate %r raised %s: %s", self.function, type(error).__name__, error)
            return None


class CostAbove(Detector):
    """Rows whose cost is above ``threshold``, by a learned cost model or any other cost function.

    Of a row whose cost is None or NaN nothing can be told.

    Args:
        function: with the signature of a TRL reward function: it is given ``prompts``, ``completions`` (as
            messages where the prompt is messages) and the data set's columns, and returns a number per row.
        threshold: in the cost's unit.

    Raises:
        ConfigurationError: if ``function`` is no function or ``threshold`` no number.

    Example:
        >>> def length(completions, **kwargs):
        ...     return [float(len(text)) for text in completions]
        >>> CostAbove(length, 5.0)(prompts=["Hello"] * 2, completions=["Hm.", "Good day."])
        [0.0, 1.0]
    """

    name = "cost_above"

    def __init__(self, function: Callable[..., Any], threshold: float = 0.5) -> None:
        if not callable(function):
            raise ConfigurationError(f"CostAbove({function!r}): give a cost function, such as a learned cost model's.")
        self.function = function
        self.threshold = check_number("CostAbove", "threshold", threshold)

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return where the cost is above the threshold."""
        if not len(rows):
            return []
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(rows.prompts, rows.completions, strict=True)
        ]
        infos = rows.infos or [{}] * len(rows)
        names = {name for info in infos for name in info} - {"prompt", "prompts", "completion", "completions"}
        columns = {name: [info.get(name) for info in infos] for name in sorted(names)}
        costs = self.function(prompts=list(rows.prompts), completions=completions, **columns)
        if hasattr(costs, "tolist"):  # an array or tensor of any library
            costs = costs.tolist()
        return [None if cost is None or math.isnan(cost) else bool(cost > self.threshold) for cost in costs]
