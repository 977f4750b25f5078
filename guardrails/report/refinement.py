"""Refinements: what a refiner changed, read from the ledger's notes of that subject.

Such a note is ``ledger.note("refinement", data)`` with::

    {"step": 7, "rows": 32, "refined": 5, "accepted": 4,
     "examples": [{"prompt": "...", "before": "...", "after": "...", "accepted": true}, ...]}

Every field may be missing. Notes are for the reader alone, so a malformed one is passed over.
"""

from __future__ import annotations

from typing import Any

from guardrails.report.view import Example, Refinement

SUBJECT = "refinement"
"""Subject of the notes that are read here."""

EXAMPLES = 12
"""Examples shown of a run: the first half as they came, then the latest."""

LONGEST = 4000
"""Characters of a text that are shown."""


class Refinements:
    """Counts of all notes, and a few examples."""

    def __init__(self) -> None:
        self._counts = {"rows": 0, "refined": 0, "accepted": 0}
        self._examples: list[Example] = []
        self._any = False

    def add(self, data: Any) -> None:
        """Take in the ``data`` of a note."""
        if not isinstance(data, dict):
            return
        self._any = True
        for name in self._counts:
            self._counts[name] += _count(data.get(name))
        examples = data.get("examples")
        for example in examples if isinstance(examples, list) else ():
            if isinstance(example, dict):
                prompt, before, after = (str(example.get(name, ""))[:LONGEST] for name in ("prompt", "before", "after"))
                if len(self._examples) == EXAMPLES:
                    del self._examples[EXAMPLES // 2]
                accepted = example.get("accepted", True) is not False
                self._examples.append(Example(_count(data.get("step")), prompt, before, after, accepted))

    def view(self) -> Refinement | None:
        """Return what to show, None where no note was read."""
        return Refinement(**self._counts, examples=list(self._examples)) if self._any else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
