"""Each promise of the contract is broken by one metric; a sound metric passes all of them."""

import math
import time

import numpy as np
import pytest

from guardrails import CompetenceMetric, Rollout
from guardrails.testing import MetricContract

PROMISES = sorted(name for name in vars(MetricContract) if name.startswith("test_"))


class Brevity(CompetenceMetric):
    name = "acme.brevity"
    requires = frozenset({"lengths"})

    def measure(self, rollout):
        return 1.0 / (1.0 + np.abs(rollout.lengths))


class Cheap(CompetenceMetric):
    name = "acme.cheap"
    requires = frozenset({"toxicity"})

    def measure(self, rollout):
        return 1.0 - np.clip(rollout.cost("toxicity"), 0.0, 1.0)


class TestBrevity(MetricContract):
    def metric(self):
        return Brevity()

    def rollout(self):
        return Rollout(
            rewards=[1.0, 2.0, float("nan")],
            lengths=[1.0, 2.0, 3.0],
            completions=[["a", "b"], ["c"], []],
            infos=[{"level": np.array(level)} for level in (0.0, 1.0, math.nan)],
            costs={"toxicity": [0.0, 0.5, 2.0]},
        )


class TestCheap(TestBrevity):
    def metric(self):
        return Cheap()


def broken(promise, measure, requires=frozenset({"lengths"})):
    metric = type("Broken", (CompetenceMetric,), {"name": "acme.broken", "requires": requires, "measure": measure})
    return pytest.param(promise, metric, id=promise)


def remembers(self, rollout):
    self.seen = getattr(self, "seen", 0) + rollout.n_rows
    return np.full(rollout.n_rows, 1.0 / (1.0 + self.seen))


def sorts_in_place(self, rollout):
    rollout.lengths[::-1].sort()
    return np.zeros(rollout.n_rows)


def sleeps(self, rollout):
    time.sleep(0.0005 * rollout.n_rows)
    return np.zeros(rollout.n_rows)


@pytest.mark.parametrize(
    ("promise", "metric"),
    [
        broken("test_every_row_gets_one_score_from_0_to_1", lambda self, rollout: rollout.lengths),
        broken("test_an_empty_rollout_gives_no_scores", lambda self, rollout: rollout.lengths / rollout.lengths.max()),
        broken("test_equal_rollouts_get_equal_scores", remembers),
        broken("test_rows_that_trade_places_keep_their_scores", lambda self, r: np.linspace(0.0, 1.0, r.n_rows)),
        broken("test_the_rollout_is_left_as_it_was", sorts_in_place),
        broken("test_the_required_columns_suffice", lambda self, r: 1.0 / (1.0 + r.lengths + (r.completions is None))),
        broken("test_the_required_columns_are_read", lambda self, r: np.zeros(r.n_rows), {"lengths", "toxicity"}),
        broken("test_256_rows_are_measured_in_time", sleeps),
    ],
)
def test_the_contract_catches_a_metric_that_breaks_its_promise(promise, metric):
    suite = TestBrevity()
    suite.metric = metric
    suite.time_limit = 0.1  # the sleeper takes 0.128 s at least
    with pytest.raises((AssertionError, ValueError)):
        getattr(suite, promise)()


def test_every_promise_is_seen_to_fail():
    (mark,) = test_the_contract_catches_a_metric_that_breaks_its_promise.pytestmark
    assert sorted(case.values[0] for case in mark.args[1]) == PROMISES


@pytest.mark.parametrize("scores", [[1.0, float("nan"), 0.0], [1.0, 0.5], [1.0, 0.5, 1.1], None])
def test_scores_the_gate_would_refuse_break_the_contract(scores):
    suite = TestBrevity()
    suite.metric = type("Broken", (Brevity,), {"measure": lambda self, rollout: scores})
    with pytest.raises(AssertionError, match="the gate would count the metric as failed"):
        suite.test_every_row_gets_one_score_from_0_to_1()


def test_a_column_read_but_not_required_is_named_in_the_failure():
    suite = TestBrevity()
    suite.metric = type(
        "Broken", (Brevity,), {"measure": lambda self, rollout: [len(c) / 2 for c in rollout.completions]}
    )
    with pytest.raises(AssertionError, match=r"only its required columns \['lengths'\].*Name every column it reads"):
        suite.test_the_required_columns_suffice()
