"""Detector: tells which completions have degenerated; detectors combine with ``&``, ``|`` and ``~``.

A detector is also a cost function for TRL: ``Constraint("degenerate", limit=0.05, cost=Degenerate())``.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

from guardrails.errors import ConfigurationError, told
from guardrails.refine.refiner import Text, plain

logger = logging.getLogger(__name__)

COLUMNS = frozenset({"truncated", "entropy"})
"""What a detector may require besides prompts and completions, which every host has."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What detectors read: one entry per completion in each column.

    Args:
        prompts: as the host holds them.
        completions: texts.
        truncated: whether each was cut at the host's maximal length; None where the host does not know.
        entropy: mean policy entropy of each, in nats per token; None where the host does not know.
        infos: the data set's row of each; None where there is none.
        answers: of completions that are conversations, the last message that the policy wrote; None where they are
            one text each.

    Raises:
        ConfigurationError: if columns differ in length.
    """

    prompts: Sequence[Text]
    completions: Sequence[str]
    truncated: Sequence[bool] | None = None
    entropy: Sequence[float] | None = None
    infos: Sequence[Mapping[str, Any]] | None = None
    answers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "truncated", "entropy", "infos", "answers"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.completions):
                raise ConfigurationError(
                    f"Rows: '{name}' has {len(column)} entries for {len(self.completions)} completions."
                )

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, rows: Sequence[int]) -> Rows:
        """Return these rows, in this order."""
        chosen = {
            name: None if (column := getattr(self, name)) is None else [column[row] for row in rows]
            for name in self.__dataclass_fields__
        }
        return Rows(**chosen)  # type: ignore[arg-type]


class Detector(ABC):
    """Tells which rows have degenerated.

    A subclass sets `name` and writes `detect`. It keeps no state, and judges each row by itself.

    Attributes:
        name: under which a plug-in lists it, ``"<vendor>.<name>"``.
        requires: columns of `Rows` beyond prompts and completions without which it cannot tell; of
            ``"truncated"`` and ``"entropy"``.

    Example:
        >>> class Shouting(Detector):
        ...     name = "acme.shouting"
        ...
        ...     def detect(self, rows):
        ...         return [text.isupper() for text in rows.completions]
        >>> from guardrails.refine import Empty
        >>> (Shouting() | Empty())(prompts=["Hello"] * 3, completions=["HELLO", "Good day.", ""])
        [1.0, 0.0, 1.0]
    """

    name: str = ""
    requires: frozenset[str] = frozenset()

    @abstractmethod
    def detect(self, rows: Rows) -> Sequence[bool | None]:
        """Return for each row whether it has degenerated; None where that cannot be told."""

    def __and__(self, other: Detector) -> Detector:
        return AllOf(self, other) if isinstance(other, Detector) else NotImplemented

    def __or__(self, other: Detector) -> Detector:
        return AnyOf(self, other) if isinstance(other, Detector) else NotImplemented

    def __invert__(self) -> Detector:
        return Not(self)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Return 1.0 for each degenerate completion, else 0.0: the signature of a TRL reward function.

        Of a conversation the messages of the assistant are judged, and those without a role; what tools and others
        wrote is not the policy's. What the detector cannot tell, or fails on, counts as degenerate.

        Raises:
            ConfigurationError: if it requires a column that cost functions are not given.
        """
        if self.requires:
            raise ConfigurationError(
                f"{self!r} requires {sorted(self.requires)}, which cost functions are not given. Use it as when= of a "
                "Refinement, or a detector that reads texts alone."
            )
        n_rows = len(completions)
        per_row = {
            name: values
            for name, values in columns.items()
            if isinstance(values, Sized) and not isinstance(values, (str, Mapping)) and len(values) == n_rows
        }
        infos = [{name: values[row] for name, values in per_row.items()} for row in range(n_rows)]  # type: ignore[index]
        written = [text if isinstance(text, str) else _of_assistant(text) for text in completions]
        rows = Rows(
            prompts=prompts,
            completions=[plain(text) for text in written],
            infos=infos,
            answers=[plain(text if isinstance(text, str) else text[-1:]) for text in written],
        )
        found, failure = detected(self, rows)
        if failure:
            logger.warning("Detector %r %s; the rows concerned count as degenerate.", self, failure)
        return [float(each) for each in found]

    @property
    def __name__(self) -> str:
        """What TRL's logs call it as a cost function."""
        return str(self.name or type(self).__name__)

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def detected(detector: Detector, rows: Rows) -> tuple[list[bool], str]:
    """Return which rows ``detector`` finds degenerate, and what was wrong with it, if anything.

    Where it cannot tell, a row counts as degenerate; where it raises, or returns something other than one
    answer per row, all rows do. ``KeyboardInterrupt`` and ``SystemExit`` pass.
    """
    missing = sorted(name for name in detector.requires if getattr(rows, name) is None)
    if missing:
        return [True] * len(rows), f"lacks the columns {missing}"
    try:
        found = list(detector.detect(rows))
        unusable = [each for each in found if not (each is None or _is_truth(each))]
    except Exception as error:
        return [True] * len(rows), f"raised {told(error)}"
    if len(found) != len(rows):
        return [True] * len(rows), f"returned {len(found)} answers for {len(rows)} rows"
    if unusable:
        return [True] * len(rows), f"returned {unusable[0]!r}, which is neither true, false nor None"
    unknown = sum(each is None for each in found)
    return [each is None or bool(each) for each in found], f"could not tell of {unknown} rows" if unknown else ""


def _of_assistant(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages if message.get("role") in (None, "assistant")]


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # numpy's own are among them


class Always(Detector):
    """Every row: the refiner sees all that the policy writes, as in the paper.

    On faultless rows the correction is the completion itself, whose term has a gradient of mean zero and
    still pulls back each time the policy moves.

    Example:
        >>> Always()(prompts=["Hello"], completions=["Good day."])
        [1.0]
    """

    name = "always"

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return True for every row."""
        return [True] * len(rows)


class _Combined(Detector):
    """Several detectors as one."""

    _word: ClassVar[str]

    def __init__(self, *parts: Detector) -> None:
        for part in parts:
            if not isinstance(part, Detector):
                raise ConfigurationError(f"{type(self).__name__} combines detectors, not {part!r}.")
        if not parts:
            raise ConfigurationError(f"{type(self).__name__}() combines nothing. Give at least one detector.")
        same = [each.parts if type(each) is type(self) else (each,) for each in parts]
        self.parts: tuple[Detector, ...] = tuple(part for group in same for part in group)
        self.requires = frozenset(name for part in self.parts for name in part.requires)

    def _answers(self, rows: Rows) -> list[tuple[bool | None, ...]]:
        return list(zip(*(part.detect(rows) for part in self.parts), strict=True))

    def __repr__(self) -> str:
        return f"({f' {self._word} '.join(map(repr, self.parts))})"


class AnyOf(_Combined):
    """Rows that any of several detectors finds; written ``a | b``.

    Where none finds a row and one cannot tell, this one cannot either.

    Args:
        *parts: the detectors.
    """

    name = "any"
    _word = "|"

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return True where one part does."""
        return [True if any(found) else None if None in found else False for found in self._answers(rows)]


class AllOf(_Combined):
    """Rows that all of several detectors find; written ``a & b``.

    Where none rules a row out and one cannot tell, this one cannot either.

    Args:
        *parts: the detectors.
    """

    name = "all"
    _word = "&"

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return True where every part does."""
        return [
            False if any(each is not None and not each for each in found) else None if None in found else True
            for found in self._answers(rows)
        ]


class Not(Detector):
    """Rows that a detector does not find; written ``~a``. What it cannot tell stays untold.

    Args:
        part: the detector.
    """

    name = "not"

    def __init__(self, part: Detector) -> None:
        if not isinstance(part, Detector):
            raise ConfigurationError(f"Not takes a detector, not {part!r}.")
        self.part = part
        self.requires = part.requires

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return True where the part returns False."""
        return [None if found is None else not found for found in self.part.detect(rows)]

    def __repr__(self) -> str:
        return f"~{self.part!r}"
