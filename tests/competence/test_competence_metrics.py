"""Built-in metrics: the contract every metric keeps, and the scores each promises."""

import math

import numpy as np
import pytest

from guardrails import ConfigurationError, Require, Rollout
from guardrails.competence import (
    BUILTIN,
    ActionVariance,
    ConstraintSatisfaction,
    CriticCalibration,
    Drift,
    FailureAvoidance,
    FromFunction,
    FromTorchMetrics,
    RefinerAgreement,
    RewardLevel,
    Stability,
    SubgoalAdherence,
    TokenEntropy,
)
from guardrails.competence.metric import measure
from guardrails.testing import MetricContract


def everything():
    return Rollout(
        rewards=[1.0, 0.2, 0.7, 0.4],
        costs={"cost": [0.0, 30.0, 12.0, 25.0], "other": [1.0, 0.0, 0.0, 2.0]},
        lengths=[3, 4, 2, 3],
        actions=[[[0.1], [0.2]], [[-1.0], [1.0]], [[0.0], [0.5]], [[0.9], [0.9]]],
        completions=["please wait", "NO", "thank you", "go away"],
        infos=[
            {"failure": False, "subgoals": [True, True], "predicted_cost": 1.0},
            {"failure": True, "subgoals": [False, True], "predicted_cost": 2.0},
            {"failure": False, "subgoals": [True, False], "predicted_cost": 12.5},
            {"failure": False, "subgoals": [False, False], "predicted_cost": 25.25},
        ],
        edit_ratio=[0.0, 0.8, 0.1, 0.3],
        kl=[0.01, 0.5, 0.3, 2.0],
        entropy=[0.5, 3.0, 1.0, 20.0],
    )


def contract(make):
    class Suite(MetricContract):
        def metric(self):
            return make()

        def rollout(self):
            return everything()

    return Suite


for _name, _kind in BUILTIN.items():
    globals()[f"Test{_kind.__name__}"] = contract(_kind)
TestTrend = contract(lambda: Stability(level=2.0))
TestFailureByCost = contract(lambda: FailureAvoidance(cost="cost", level=25.0))
TestGraded = contract(lambda: ConstraintSatisfaction("cost", 10.0, margin=20.0))
TestPredicates = contract(lambda: SubgoalAdherence([str.islower, lambda text: "e" in text], ordered=True))
TestFunction = contract(lambda: FromFunction(lambda kl, cost: min(1.0, kl + cost / 40), ["kl", "cost"], name="f"))


def scores(metric, **columns):
    return np.asarray(metric.measure(Rollout(**columns))).tolist()


def test_every_built_in_is_named_as_it_names_itself():
    for name in BUILTIN:
        assert Require(name, at_least=0.5).name == name


def test_reward_level_is_the_share_of_the_way_from_floor_to_reference():
    assert scores(RewardLevel(10.0, floor=5.0), rewards=[4.0, 5.0, 7.5, 10.0, 99.0]) == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_the_mean_of_stability_is_one_minus_the_variance_in_units_of_the_spread():
    rewards = np.array([1.0, 2.0, 4.0, 1.5])
    assert np.mean(scores(Stability(spread=5.0), rewards=rewards)) == pytest.approx(1.0 - rewards.var(ddof=1) / 25.0)


@pytest.mark.parametrize("n_rows", [2, 3, 8, 64])
def test_stability_is_the_same_on_average_however_few_rows_a_step_has(n_rows):
    rng = np.random.default_rng(0)
    steps = [np.mean(scores(Stability(spread=20.0), rewards=rng.normal(0.0, 5.0, n_rows))) for _ in range(4000)]
    assert np.mean(steps) == pytest.approx(1.0 - 25.0 / 400.0, abs=0.01)  # three standard errors at two rows: 0.004


def test_a_single_row_is_not_stable_by_itself():
    assert scores(Stability(spread=10.0), rewards=[20.0]) == [0.0]
    assert scores(Stability(spread=10.0, level=25.0), rewards=[20.0]) == [0.75]


def test_a_mean_below_the_level_once_held_counts_as_variance_and_one_above_does_not():
    rewards = np.array([1.0, 2.0, 4.0, 1.0])
    fallen, risen = Stability(spread=5.0, level=3.0), Stability(spread=5.0, level=1.5)
    assert np.mean(scores(fallen, rewards=rewards)) == pytest.approx(1.0 - (rewards.var(ddof=1) + 1.0) / 25.0)
    assert scores(risen, rewards=rewards) == scores(Stability(spread=5.0), rewards=rewards)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_a_cost_that_could_not_be_measured_is_neither_satisfied_nor_free_of_failure(cost):
    for metric in (
        ConstraintSatisfaction("cost", 25.0),
        ConstraintSatisfaction("cost", 25.0, margin=5.0),
        ConstraintSatisfaction("cost", 25.0, sense=">="),
        ConstraintSatisfaction("cost", 25.0, sense=">=", margin=5.0),
        FailureAvoidance(cost="cost", level=25.0),
    ):
        assert scores(metric, costs={"cost": [cost]}) == [0.0]


def test_a_lower_limit_is_satisfied_from_above():
    metric = ConstraintSatisfaction("cost", 10.0, sense=">=", margin=4.0)
    assert scores(metric, costs={"cost": [12.0, 9.0, 6.0]}) == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("metric", "column"), [(RewardLevel(), "rewards"), (Drift(), "kl"), (TokenEntropy(), "entropy")]
)
def test_a_value_that_is_not_finite_gets_no_score(metric, column, value):
    assert math.isnan(scores(metric, **{column: [value]})[0])


def test_action_variance_is_relative_to_the_range_of_the_actions():
    actions = [[[0.0], [2.0]], [[0.5], [1.5]], [[3.0], [3.0]]]
    assert scores(ActionVariance(0.0, 2.0), actions=actions) == [0.0, 0.5, 1.0]


def test_the_action_of_a_single_step_shows_no_steadiness():
    assert scores(ActionVariance(), actions=[[[0.3]], [[0.3], [0.3]]]) == [0.0, 1.0]


def test_the_failure_key_must_be_there():
    with pytest.raises(KeyError, match="fell"):
        FailureAvoidance("fell").measure(Rollout(infos=[{"other": 1}]))


def test_failure_by_a_function_of_the_info():
    metric = FailureAvoidance(lambda info: info["height"] < 0.7)
    assert scores(metric, infos=[{"height": 1.0}, {"height": 0.5}]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("ordered", "reached", "expected"),
    [
        (False, ["b", "a"], 2 / 3),
        (True, ["b", "a"], 1 / 3),
        (True, ["a", "b", "c"], 1.0),
        (True, ["b", "c"], 0.0),
        (True, ["a", "c", "b"], 2 / 3),
        (False, [], 0.0),
    ],
)
def test_subgoals_by_name(ordered, reached, expected):
    metric = SubgoalAdherence(["a", "b", "c"], ordered=ordered)
    assert scores(metric, infos=[{"subgoals": reached}]) == [pytest.approx(expected)]


def test_ordered_truth_values_count_up_to_the_first_that_is_false():
    assert scores(SubgoalAdherence(ordered=True), infos=[{"subgoals": [True, False, True, True]}]) == [0.25]
    assert scores(SubgoalAdherence(), infos=[{"subgoals": [True, False, True, True]}]) == [0.75]


@pytest.mark.parametrize(
    ("goals", "listed"),
    [
        (["door"], {"door": False}),
        (["door"], "door"),
        ([], {"door": False}),
        ([], ["door"]),
        ([], "no"),
        ([], [math.nan, True]),
    ],
)
def test_what_is_no_list_of_sub_goals_is_a_failure_and_not_a_feat(goals, listed):
    found = measure(SubgoalAdherence(goals), Rollout(infos=[{"subgoals": listed}]))
    assert found.scores.tolist() == [0.0]
    assert "raised TypeError: a row " in found.failure
    assert "under 'subgoals'" in found.failure


def test_critic_calibration_falls_with_the_error_of_the_prediction():
    infos = [{"predicted_cost": 8.0}, {"predicted_cost": 12.0}, {"predicted_cost": 30.0}]
    assert scores(CriticCalibration(scale=10.0), costs={"cost": [10.0] * 3}, infos=infos) == [0.8, 0.8, 0.0]


def test_refiner_agreement_and_drift_and_entropy():
    assert scores(RefinerAgreement(), edit_ratio=[0.0, 0.25]) == [1.0, 0.75]
    assert scores(Drift(2.0), kl=[0.5, 2.5, -0.1]) == [0.75, 0.0, 1.0]
    assert scores(TokenEntropy(4.0), entropy=[1.0, 8.0]) == [0.75, 0.0]


def test_a_function_of_several_columns_gets_them_row_by_row():
    metric = FromFunction(lambda text, cost: (len(text) < 5) * (1.0 - cost), ["completions", "cost"], name="f")
    assert scores(metric, completions=["abc", "abcdef"], costs={"cost": [0.25, 0.0]}) == [0.75, 0.0]
    assert metric.requires == {"completions", "cost"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: FromFunction(lambda x: x, "kl"),
        lambda: FromFunction(float, ()),
        lambda: FailureAvoidance("fell", cost="cost"),
        lambda: SubgoalAdherence(["a", len]),
        lambda: SubgoalAdherence("abc"),
        lambda: SubgoalAdherence(len),
        lambda: SubgoalAdherence(None),
        lambda: RewardLevel(0.0),
        lambda: ActionVariance(1.0, 1.0),
        lambda: ConstraintSatisfaction(sense="=="),
        lambda: FromTorchMetrics(len, iter, requires={"kl"}, name="x"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()


def test_a_torchmetrics_metric_scores_each_row_by_itself_and_is_left_alone():
    text = pytest.importorskip("torchmetrics.text")
    theirs = text.CharErrorRate()
    theirs.update("abcd", "abcx")
    metric = FromTorchMetrics(
        theirs,
        lambda rollout: [(text, info["answer"]) for text, info in zip(rollout.completions, rollout.infos, strict=True)],
        requires={"completions", "infos"},
        name="spelling",
        low=1.0,
        high=0.0,
    )
    rollout = Rollout(completions=["four", "fuur", "xxxxxxxxx"], infos=[{"answer": "four"}] * 3)
    assert metric.measure(rollout).tolist() == [1.0, 0.75, 0.0]
    assert metric.measure(rollout).tolist() == [1.0, 0.75, 0.0]
    assert float(theirs.compute()) == 0.25
