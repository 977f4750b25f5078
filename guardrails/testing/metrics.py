"""The suite that a competence metric must pass; authors subclass it in their own tests."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from guardrails.competence.metric import CompetenceMetric, measure
from guardrails.rollout import FloatArray, Rollout, as_column

_COLUMNS = tuple(name for name, each in Rollout.__dataclass_fields__.items() if each.init and name != "costs")


class MetricContract:
    """Pytest suite for a `CompetenceMetric`: what the gate relies on.

    Subclass it under a name that pytest collects, and write `metric` and `rollout`. Give `rollout`
    a handful of rows that score differently, with every column the host would have, not only
    those the metric needs.

    Args:
        time_limit: seconds that 256 rows may take; the best of three is compared.

    Example:
        >>> class TestPoliteness(MetricContract):
        ...     def metric(self):
        ...         return Politeness()
        ...
        ...     def rollout(self):
        ...         return Rollout(completions=["thank you", "you fool"], rewards=[1.0, 0.0])
    """

    time_limit: ClassVar[float] = 1.0

    def metric(self) -> CompetenceMetric:
        """Return a new metric."""
        raise NotImplementedError(f"{type(self).__name__} must write metric(self), returning a new metric.")

    def rollout(self) -> Rollout:
        """Return a rollout of at least two rows, with every column that the host would have."""
        raise NotImplementedError(f"{type(self).__name__} must write rollout(self), returning a Rollout.")

    def test_every_row_gets_one_score_from_0_to_1(self) -> None:
        """One finite score in [0, 1] per row."""
        rollout = self.rollout()
        _require(rollout.n_rows >= 2, "rollout() has fewer than two rows, too few to show anything.")
        failure = measure(self.metric(), rollout).failure
        _require(not failure, f"the gate would count the metric as failed: it {failure}.")

    def test_an_empty_rollout_gives_no_scores(self) -> None:
        """No rows, no scores; no error, as of a mean over nothing."""
        scores = _scores(self.metric(), _rows(self.rollout(), []))
        _require(scores.size == 0, f"{scores.size} scores for an empty rollout.")

    def test_equal_rollouts_get_equal_scores(self) -> None:
        """The scores follow from the rollout alone: no chance, no memory of earlier calls."""
        metric = self.metric()
        first = _scores(metric, self.rollout())
        _scores(metric, _rows(self.rollout(), [0]))
        _same(_scores(metric, self.rollout()), first, "the same metric scored an equal rollout differently later on.")
        _same(_scores(self.metric(), self.rollout()), first, "another instance scored an equal rollout differently.")

    def test_rows_that_trade_places_keep_their_scores(self) -> None:
        """A score belongs to its row, wherever the row stands."""
        rollout = self.rollout()
        order = [*range(1, rollout.n_rows), 0]
        moved = _scores(self.metric(), _rows(rollout, order))
        _same(moved, _scores(self.metric(), rollout)[order], "scores changed when rows traded places.")

    def test_the_rollout_is_left_as_it_was(self) -> None:
        """Other metrics and the constraints read the same rollout."""
        rollout = self.rollout()
        before = copy.deepcopy(_columns(rollout))
        _scores(self.metric(), rollout)
        changed = [name for name, values in _columns(rollout).items() if not equal(values, before[name])]
        _require(not changed, f"measure() changed columns {changed}; copy what you alter.")

    def test_the_required_columns_suffice(self) -> None:
        """An adapter promises the columns in ``requires`` and no other."""
        metric, rollout = self.metric(), self.rollout()
        missing = sorted(set(metric.requires) - rollout.columns)
        _require(not missing, f"rollout() lacks the columns {missing} that the metric requires.")
        only = _rollout({name: values for name, values in _columns(rollout).items() if _asked(name, metric.requires)})
        try:
            scores = _scores(metric, only)
        except Exception as error:
            raise AssertionError(
                f"With only its required columns {sorted(metric.requires)} the metric raised "
                f"{type(error).__name__}: {error}. Name every column it reads in 'requires'."
            ) from error
        _same(scores, _scores(self.metric(), rollout), "scores depend on columns that 'requires' does not name.")

    def test_the_required_columns_are_read(self) -> None:
        """A column required in vain would turn hosts away that lack it."""
        metric, rollout = self.metric(), self.rollout()
        watched, read = _watched(rollout)
        metric.measure(watched)
        unread = sorted(
            name for name in metric.requires if name not in read and not (name in rollout.costs and "costs" in read)
        )
        _require(not unread, f"the columns {unread} are required but never read; leave them out of 'requires'.")

    def test_256_rows_are_measured_in_time(self) -> None:
        """The gate measures in every step of the host's training."""
        metric, rollout = self.metric(), self.rollout()
        large = _rows(rollout, [row % rollout.n_rows for row in range(256)])
        best = min(_seconds(lambda: metric.measure(large)) for _ in range(3))
        _require(best <= self.time_limit, f"256 rows took {best:.3g} s, more than the {self.time_limit:g} s allowed.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _same(scores: FloatArray, expected: FloatArray, message: str) -> None:
    # A sum over a batch may round differently when rows move: 1e-9 is far below any threshold on a score.
    equal = scores.shape == expected.shape and np.allclose(scores, expected, rtol=0.0, atol=1e-9)
    _require(equal, f"{message} {scores[:5].tolist()} against {expected[:5].tolist()}")


def _scores(metric: CompetenceMetric, rollout: Rollout) -> FloatArray:
    return as_column(metric.measure(rollout), "scores")


def _columns(rollout: Rollout) -> dict[str, Any]:
    """Return the columns that are present, each cost under ``cost <name>``."""
    plain = {name: getattr(rollout, name) for name in _COLUMNS if getattr(rollout, name) is not None}
    return plain | {f"cost {name}": values for name, values in rollout.costs.items()}


def _rollout(columns: dict[str, Any]) -> Rollout:
    costs = {name[5:]: values for name, values in columns.items() if name.startswith("cost ")}
    return Rollout(costs=costs, **{name: values for name, values in columns.items() if name in _COLUMNS})


def _rows(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Return a rollout of these rows, in this order."""
    return _rollout({name: [values[row] for row in rows] for name, values in _columns(rollout).items()})


def _asked(name: str, requires: Any) -> bool:
    if name.startswith("cost "):
        return "costs" in requires or name[5:] in requires
    return name in requires


def equal(left: Any, right: Any) -> bool:
    """Compare nested sequences, mappings and arrays; NaN equals NaN."""
    if isinstance(left, (str, bytes)) or not hasattr(left, "__len__") or getattr(left, "ndim", 1) == 0:
        return bool(left == right) or (left != left and right != right)
    if len(left) != len(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return all(equal(one, other) for one, other in zip(left, right, strict=True))


def _watched(rollout: Rollout) -> tuple[Rollout, set[str]]:
    """Return an equal rollout, and the set that fills with the columns read from it."""
    read: set[str] = set()

    class Watched(Rollout):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    columns = _columns(rollout)
    watched = Watched(
        costs={name[5:]: values for name, values in columns.items() if name.startswith("cost ")},
        **{name: values for name, values in columns.items() if name in _COLUMNS},
    )
    read.clear()
    return watched, read


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
