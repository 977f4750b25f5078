"""The suite that a detector must pass; authors subclass it in their own tests."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from guardrails.refine.detectors import COLUMNS, Detector, Rows, detected
from guardrails.testing.metrics import equal


class DetectorContract:
    """Pytest suite for a `Detector`: what a refinement relies on.

    Subclass it under a name that pytest collects, and write `detector` and `rows`. Give `rows` a handful of
    rows, some degenerate and some not, with every column that the hosts have.

    Args:
        time_limit: seconds that 256 rows may take; the best of three is compared.

    Example:
        >>> class TestShouting(DetectorContract):
        ...     def detector(self):
        ...         return Shouting()
        ...
        ...     def rows(self):
        ...         return Rows(prompts=["Hello"] * 2, completions=["HELLO", "Good day."])
    """

    time_limit: ClassVar[float] = 1.0

    def detector(self) -> Detector:
        """Return a new detector."""
        raise NotImplementedError(f"{type(self).__name__} must write detector(self), returning a new detector.")

    def rows(self) -> Rows:
        """Return rows, degenerate ones and others, with every column that the hosts have."""
        raise NotImplementedError(f"{type(self).__name__} must write rows(self), returning Rows.")

    def test_it_tells_degenerate_rows_from_others(self) -> None:
        """One answer per row, and not the same for all."""
        found = _found(self.detector(), self.rows())
        _require(len(set(found)) == 2, f"it says {found[:1]} of every row in rows(); give rows of both kinds.")

    def test_no_rows_give_no_answers(self) -> None:
        """Where nothing was written there is nothing to find, and no error."""
        _require(_found(self.detector(), self.rows().take([])) == [], "it answered although there were no rows.")

    def test_equal_rows_get_equal_answers(self) -> None:
        """The answers follow from the rows alone: no chance, no memory of earlier calls."""
        detector = self.detector()
        first = _found(detector, self.rows())
        _found(detector, self.rows().take([0]))
        _require(_found(detector, self.rows()) == first, "the same detector judged equal rows differently later on.")
        _require(_found(self.detector(), self.rows()) == first, "another instance judged equal rows differently.")

    def test_rows_that_trade_places_keep_their_answers(self) -> None:
        """An answer belongs to its row, wherever and among whichever others the row stands."""
        rows = self.rows()
        first = _found(self.detector(), rows)
        order = [*range(1, len(rows)), 0]
        moved = _found(self.detector(), rows.take(order))
        _require(moved == [first[row] for row in order], "answers changed when rows traded places.")
        alone = [_found(self.detector(), rows.take([row]))[0] for row in range(len(rows))]
        _require(alone == first, "answers changed when a row stood alone.")

    def test_the_rows_are_left_as_they_were(self) -> None:
        """The refiner reads the same ones."""
        rows = self.rows()
        before = {name: copy.deepcopy(getattr(rows, name)) for name in rows.__dataclass_fields__}
        _found(self.detector(), rows)
        changed = [name for name, values in before.items() if not equal(values, getattr(rows, name))]
        _require(not changed, f"detect() changed the columns {changed}; copy what you alter.")

    def test_the_required_columns_suffice(self) -> None:
        """A host without the other columns gets answers too."""
        detector, rows = self.detector(), self.rows()
        foreign = sorted(detector.requires - COLUMNS)
        _require(not foreign, f"it requires {foreign}; there are only {sorted(COLUMNS)} to require.")
        absent = sorted(name for name in detector.requires if getattr(rows, name) is None)
        _require(not absent, f"rows() lacks the columns {absent} that the detector requires.")
        kept: dict[str, Any] = {name: getattr(rows, name) for name in detector.requires}
        _found(detector, Rows(prompts=rows.prompts, completions=rows.completions, **kept))

    def test_256_rows_are_judged_in_time(self) -> None:
        """It runs in every step of the host's training."""
        detector, rows = self.detector(), self.rows()
        many = rows.take([row % len(rows) for row in range(256)])
        best = min(_seconds(detector, many) for _ in range(3))
        _require(best <= self.time_limit, f"256 rows took {best:.3g} s, more than the {self.time_limit:g} s allowed.")


def _found(detector: Detector, rows: Rows) -> Sequence[bool]:
    found, failure = detected(detector, rows)
    _require(not failure, f"the rows would count as degenerate, whatever they say: the detector {failure}.")
    return found


def _seconds(detector: Detector, rows: Rows) -> float:
    begun = time.perf_counter()
    detector.detect(rows)
    return time.perf_counter() - begun


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
