"""Detectors that ask others: a function of the user's, or a cost function such as a learned cost model."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from guardrails.errors import ConfigurationError, told
from guardrails.refine.detectors import Detector, Rows
from guardrails.refine.functions import check_plain
from guardrails.refine.refiner import Text
from guardrails.schedulers.base import check_number

logger = logging.getLogger(__name__)

_GIVEN = ("prompts", "completions")
_NOT_GIVEN = frozenset({"prompt", "completion", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""What a cost function cannot be given here: each text by itself, and what belongs to a host's own scoring."""


class Predicate(Detector):
    """Rows on which a function says so. Of a row on which it raises, nothing can be told.

    Args:
        function: takes a prompt and the text of its completion and returns whether that is degenerate.

    Raises:
        ConfigurationError: if it is no function, or asynchronous.

    Example:
        >>> short = Predicate(lambda prompt, completion: len(completion) < 4)
        >>> short(prompts=["Hello"] * 2, completions=["Hm.", "Good day."])
        [1.0, 0.0]
    """

    name = "predicate"

    def __init__(self, function: Callable[[Text, str], bool]) -> None:
        if not callable(function):
            raise ConfigurationError(f"Predicate({function!r}): give a function (prompt, completion) -> bool.")
        check_plain("Predicate", function)
        self.function = function

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return what the function says of each row."""
        return [self._ask(*row) for row in zip(rows.prompts, rows.completions, strict=True)]

    def _ask(self, prompt: Text, completion: str) -> bool | None:
        try:
            return bool(self.function(prompt, completion))
        except Exception as error:
            logger.debug("Predicate %r raised %s", self.function, told(error))
            return None


class CostAbove(Detector):
    """Rows whose cost is above ``threshold``, by a learned cost model or any other cost function.

    Of a row whose cost is None or NaN nothing can be told.

    Args:
        function: like a plain TRL reward function: it is given ``prompts``, ``completions`` (as messages where the
            prompt is messages) and the data set's columns, and returns a number per row. What else TRL passes its
            reward functions, such as ``completion_ids``, there is none of here.
        threshold: in the cost's unit.

    Raises:
        ConfigurationError: if ``function`` is no function, asynchronous or asks for more than that, or ``threshold`` is
            no number.

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
        check_plain("CostAbove", function)
        _check_parameters(function)
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
        names = {name for info in infos for name in info} - {"prompt", "completion", *_GIVEN}
        columns = {name: [info.get(name) for info in infos] for name in sorted(names)}
        costs = self.function(prompts=list(rows.prompts), completions=completions, **columns)
        if hasattr(costs, "tolist"):  # an array or tensor of any library
            costs = costs.tolist()
        return [None if cost is None or math.isnan(cost) else bool(cost > self.threshold) for cost in costs]


def _check_parameters(function: Callable[..., Any]) -> None:
    """Raise if a cost function cannot be called with prompts, completions and columns of a data set, all by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature to look at
        return
    required = [each for each in parameters if each.default is each.empty]
    by_place = [each.name for each in required if each.kind is each.POSITIONAL_ONLY]
    named = [each.name for each in required if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    lacking = [*by_place, *(name for name in named if name in _NOT_GIVEN)]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    cure = "Write it as function(prompts, completions, **kwargs), with columns of the data set by their names."
    if lacking:
        raise ConfigurationError(
            f"CostAbove: {function!r} requires '{lacking[0]}', which it is not given here: what it is given by name is "
            f"prompts, completions and the data set's columns. {cure}"
        )
    if not takes_any and not {each.name for each in parameters}.issuperset(_GIVEN):
        raise ConfigurationError(
            f"CostAbove: {function!r} takes no **kwargs, but it is given prompts, completions and every column of the "
            f"data set by name. {cure}"
        )
