"""Detectors of the ways in which a language policy degenerates: repetition, truncation, emptiness, syntax, entropy."""

from __future__ import annotations

import ast
import json
import math
import re
import textwrap
import warnings
from typing import Any, Literal

from guardrails.errors import ConfigurationError
from guardrails.refine.detectors import Detector, Rows
from guardrails.schedulers.base import check_number, whole_number

_UNIT = re.compile(r"\w+|[^\w\s]")
_LONGEST_WORD = 20
"""Longer runs of letters are counted letter by letter: scripts without spaces, and "aaaa...", have no words."""

_FENCE = re.compile(r"\A(`{3,}(?!`)|~{3,}(?!~))[^\n`]*\n(.*)\1\Z", re.DOTALL)


class Repetition(Detector):
    """share of n-grams that stood before in the text > ``share``: 1 - distinct / all, over words and signs.

    Texts of fewer than two n-grams repeat nothing. Source: "seq-rep-n" of Welleck et al. 2020 (1908.04319).

    Args:
        n: words per n-gram, ≥ 1.
        share: in [0, 1); human prose stays below 0.1 for n = 3, loops come close to 1.

    Raises:
        ConfigurationError: if a value is out of range.

    Example:
        >>> Repetition()(prompts=["Hello"] * 2, completions=["well well well well well", "Good day to you."])
        [1.0, 0.0]
    """

    name = "repetition"

    def __init__(self, n: int = 3, share: float = 0.5) -> None:
        self.n = whole_number("Repetition", "n", n)
        self.share = check_number("Repetition", "share", share, low=0.0, high=1.0 - 1e-12)

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return where the share of repeated n-grams is above the threshold."""
        return [self._repeated(text) > self.share for text in rows.completions]

    def _repeated(self, text: str) -> float:
        units = [unit for word in _UNIT.findall(text) for unit in ([word] if len(word) <= _LONGEST_WORD else word)]
        grams = list(zip(*(units[start:] for start in range(self.n)), strict=False))
        return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class Truncated(Detector):
    """Rows cut at the host's maximal length, without an end of their own.

    Example:
        >>> from guardrails.refine import Rows
        >>> Truncated().detect(Rows(prompts=["Hello"], completions=["Good"], truncated=[True]))
        [True]
    """

    name = "truncated"
    requires = frozenset({"truncated"})

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return the column."""
        return _truncated(rows)


class Empty(Detector):
    r"""Rows without a visible character.

    Example:
        >>> Empty()(prompts=["Hello"] * 2, completions=[" \n", "Good day."])
        [1.0, 0.0]
    """

    name = "empty"

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return where there is nothing but white space."""
        return [not text.strip() for text in rows.completions]


class Unparsable(Detector):
    r"""Rows that are no JSON, or no Python. Nothing is executed.

    One Markdown fence around the whole is taken off first, and Python may be indented as a block. Of a conversation the
    policy's last message is parsed alone.

    Args:
        language: ``"json"`` (RFC 8259, so without NaN) or ``"python"`` (that of the interpreter in use).

    Raises:
        ConfigurationError: if the language is another.

    Example:
        >>> Unparsable("json")(prompts=["Hello"] * 2, completions=['```json\n{"day": 1}\n```', "{'day': 1}"])
        [0.0, 1.0]
    """

    name = "unparsable"

    def __init__(self, language: Literal["json", "python"]) -> None:
        if language not in ("json", "python"):
            raise ConfigurationError(f"Unparsable: language is {language!r}; give 'json' or 'python'.")
        self.language = language

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return where the parser gives up."""
        parse = _parse_json if self.language == "json" else _parse_python
        texts = rows.completions if rows.answers is None else rows.answers
        return [not _parses(parse, _unfenced(text)) for text in texts]


class LowEntropy(Detector):
    """Rows on which the policy's mean entropy is below ``nats``: it has collapsed to one way of saying it.

    Args:
        nats: threshold in nats per token, > 0.

    Raises:
        ConfigurationError: if it is out of range.

    Example:
        >>> from guardrails.refine import Rows
        >>> LowEntropy(0.1).detect(Rows(prompts=["Hello"], completions=["Good day."], entropy=[0.01]))
        [True]
    """

    name = "low_entropy"
    requires = frozenset({"entropy"})

    def __init__(self, nats: float = 0.1) -> None:
        self.nats = check_number("LowEntropy", "nats", nats, low=0.0, open_low=True)

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return where the entropy is below the threshold; None where it is not a number."""
        entropy: Any = rows.entropy
        return [None if math.isnan(value) else bool(value < self.nats) for value in entropy]


class Degenerate(Detector):
    """A sound default: rows that repeat themselves, are cut off (where the host knows), or are empty.

    Args:
        n: of `Repetition`.
        share: of `Repetition`.

    Raises:
        ConfigurationError: if a value is out of range.

    Example:
        >>> Degenerate()(prompts=["Hello"] * 3, completions=["ha " * 9, "", "Good day."])
        [1.0, 1.0, 0.0]
    """

    name = "degenerate"

    def __init__(self, n: int = 3, share: float = 0.5) -> None:
        self._repetition = Repetition(n, share)
        self.n, self.share = self._repetition.n, self._repetition.share

    def detect(self, rows: Rows) -> list[bool | None]:
        """Return where one of the three is so; a truncation that is not known of is none."""
        parts = (self._repetition.detect(rows), _truncated(rows), Empty().detect(rows))
        return [any(found) for found in zip(*parts, strict=True)]


def _truncated(rows: Rows) -> list[bool | None]:
    return [None] * len(rows) if rows.truncated is None else [bool(each) for each in rows.truncated]


def _unfenced(text: str) -> str:
    fenced = _FENCE.match(text.strip())
    return fenced[2].rstrip() if fenced else text


def _parse_json(text: str) -> None:
    json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _parse_python(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the policy's style, such as invalid escapes
        ast.parse(textwrap.dedent(text))


def _parses(parse: Any, text: str) -> bool:
    try:
        parse(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
        return False
    return True
