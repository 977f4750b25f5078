"""A metric that fails is not competent: it scores 0, says why, and stops nothing."""

import math
import time

import numpy as np
import pytest
import torch

from guardrails import CompetenceMetric, ConfigurationError, Constraint, Gate, Guard, Require, Rollout
from guardrails.competence import FromFunction, RewardLevel
from guardrails.competence.metric import measure
from guardrails.errors import PluginError

ROWS = 4


class Answers(CompetenceMetric):
    name = "answers"
    requires = frozenset({"rewards"})

    def __init__(self, answer):
        self.answer = answer

    def measure(self, rollout):
        return self.answer(rollout) if callable(self.answer) else self.answer


def raises(rollout):
    raise RuntimeError("out of paper")


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def raises_unprintable(rollout):
    raise UnprintableError


def sleeps(rollout):
    time.sleep(0.05)
    return [1.0] * ROWS


BAD = {
    "raises": (raises, "raised RuntimeError: out of paper"),
    "raises without words": (raises_unprintable, "raised UnprintableError: its message cannot be shown"),
    "none": (None, "returned None"),
    "masked": (np.ma.array(np.ones(4), mask=[True, False, False, True]), "returned NaN in 2 of 4"),
    "complex": (np.ones(4) + 0j, "returned complex numbers"),
    "nan": ([1.0, math.nan, 1.0, 1.0], "returned NaN in 1 of 4"),
    "none in a row": ([1.0, None, 1.0, 1.0], "returned NaN in 1 of 4"),
    "infinite": ([1.0, math.inf, 1.0, 1.0], "outside"),
    "huge": ([1.0, 1e300, 1.0, 1.0], "outside"),
    "negative": ([1.0, -0.01, 1.0, 1.0], "outside"),
    "short": ([1.0] * 3, "shape (3,) for 4 rows"),
    "long": ([1.0] * 5, "shape (5,) for 4 rows"),
    "scalar": (1.0, "shape () for 4 rows"),
    "column": (np.ones((4, 1)), "shape (4, 1) for 4 rows"),
    "words": (["good"] * 4, "raised ValueError"),
    "ragged": ([[1.0], 1.0, 1.0, 1.0], "raised ValueError"),
    "slow": (sleeps, "over its budget of 0.01 s"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_failing_metric_scores_zero_on_every_row_and_says_why(case):
    answer, why = BAD[case]
    scores, failure = measure(Answers(answer), Rollout(rewards=[0.0] * ROWS), budget_seconds=0.01)
    assert scores.tolist() == [0.0] * ROWS
    assert why in failure


@pytest.mark.parametrize("case", BAD)
def test_a_failing_metric_tightens_at_once_and_training_goes_on(case):
    answers = {"answer": [1.0] * ROWS}
    metric = Answers(lambda rollout: answers["answer"](rollout) if callable(answers["answer"]) else answers["answer"])
    gate = Gate(Require(metric, at_least=0.5), rungs=4, dwell=0, fall="one", budget_seconds=0.01)
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 25.0)))
    rollout = Rollout(rewards=[1.0] * ROWS, costs={"cost": [1.0] * ROWS})
    while guard.step(rollout).gates["gate"].rung < 3:
        pass
    answers["answer"] = BAD[case][0]
    for rung in (2, 1, 0, 0):
        decision = guard.step(rollout)
        assert decision.gates["gate"].rung == rung
        assert decision.constraints["cost"].limit == 5.0 + 5.0 * rung
        reason = next(reason for reason in decision.reasons if reason.subject == "answers")
        assert reason.verdict == "failed"
        assert BAD[case][1] in reason.text
    answers["answer"] = [1.0] * ROWS
    assert guard.step(rollout).gates["gate"].rung == 0, "one batch of good scores is not yet evidence"
    for _ in range(20):
        guard.step(rollout)
    assert guard.gates["gate"].rung > 0, "only finite scores restore trust, and they do"


def test_a_metric_that_writes_into_the_rollout_fails_and_changes_no_cost():
    def forgives(rollout):
        rollout.cost("cost")[:] = 0.0
        return [1.0] * ROWS

    guard = Guard(Constraint("cost", limit=Gate(Require(Answers(forgives), at_least=0.5)).between(5.0, 25.0)))
    decision = guard.step(Rollout(rewards=[1.0] * ROWS, costs={"cost": np.full(ROWS, 30.0)}))
    assert "read-only" in decision.gates["gate"].requirements[0].failure
    assert guard.sanitised("cost").tolist() == [30.0] * ROWS


def test_a_metric_is_not_asked_about_a_step_without_rows():
    guard = Guard(Constraint("cost", limit=Gate(Require(Answers(raises), at_least=0.5)).between(5.0, 25.0)))
    decision = guard.step(Rollout(rewards=[], costs={"cost": []}))
    assert {reason.verdict for reason in decision.reasons} == {"empty"}
    assert decision.gates["gate"].requirements[0].failure == ""


def test_interrupts_pass_through_a_metric():
    def interrupted(rollout):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Answers(interrupted), Rollout(rewards=[0.0]))


def test_single_precision_rounding_is_no_failure():
    scores, failure = measure(Answers(torch.tensor([1.0000001, -1e-7])), Rollout(rewards=[0.0, 0.0]))
    assert failure == ""
    assert scores.tolist() == [1.0, 0.0]


def test_a_metric_cannot_reach_its_scores_after_they_were_taken():
    held = np.ones(2)
    scores, _ = measure(Answers(held), Rollout(rewards=[0.0, 0.0]))
    held[:] = 0.0
    assert scores.tolist() == [1.0, 1.0]


def test_a_missing_column_is_a_failure_that_names_the_columns():
    _, failure = measure(RewardLevel(), Rollout(kl=[0.1]))
    assert "There is no column 'rewards'" in failure
    assert "Columns here: kl" in failure


class Nameless(CompetenceMetric):
    def measure(self, rollout):
        return []


class Slashed(Nameless):
    name = "a/b"


class Stringly(Nameless):
    name = "stringly"
    requires = "rewards"


@pytest.mark.parametrize(
    ("metric", "at_least", "why"),
    [
        (len, 0.5, "FromFunction"),
        (Nameless(), 0.5, "non-empty string"),
        (Slashed(), 0.5, "group by '/'"),
        (Stringly(), 0.5, "give a set of columns"),
        (RewardLevel(), 0.0, "at_least"),
        (RewardLevel(), 1.0, "no finite sample"),
        (RewardLevel(), math.nan, "at_least"),
    ],
)
def test_requirements_that_cannot_be_met_or_measured_are_refused(metric, at_least, why):
    with pytest.raises(ConfigurationError, match=why):
        Require(metric, at_least=at_least)


def test_an_unknown_name_is_refused_where_it_is_written():
    with pytest.raises(PluginError, match=r"There is no metric 'acme\.polite'"):
        Require("acme.polite", at_least=0.9)


def test_a_function_may_stand_for_a_metric():
    gate = Gate(Require(FromFunction(lambda kl: 1.0 - kl, "kl", name="close"), at_least=0.9))
    _, decision = gate.update(gate.init(), Rollout(kl=[0.25, 0.75]))
    assert decision.requirements[0].mean == 0.5
