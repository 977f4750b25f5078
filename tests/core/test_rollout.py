import numpy as np
import pytest
import torch

from guardrails import Constraint, Gate, Guard, Require, Rollout, RolloutError
from guardrails.competence import ConstraintSatisfaction


def test_columns_of_different_length_are_refused_by_name():
    with pytest.raises(RolloutError, match="'toxicity' has 3 rows, but 'rewards' has 2"):
        Rollout(rewards=[0.0, 1.0], costs={"toxicity": [0.0, 0.0, 1.0]})


def test_none_in_a_cost_becomes_nan_so_that_a_constraint_sees_it():
    rollout = Rollout(costs={"toxicity": [0.25, None]})
    assert rollout.cost("toxicity")[0] == 0.25
    assert np.isnan(rollout.cost("toxicity")[1])


def test_columns_of_numbers_cannot_be_written_to_and_the_callers_array_still_can():
    costs = np.zeros(2)
    rollout = Rollout(rewards=[1.0, 2.0], costs={"speed": costs})
    for column in (rollout.rewards, rollout.cost("speed")):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 5.0
    costs[0] = 1.0


def test_a_missing_cost_names_itself_and_those_that_are_there():
    with pytest.raises(RolloutError, match=r"no cost column 'speed'.*here: length, toxicity"):
        Rollout(costs={"toxicity": [0.0], "length": [1.0]}).cost("speed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_torch_columns_of_any_dtype_become_float64(dtype):
    values = torch.tensor([1, 2, 3], dtype=dtype)
    if dtype.is_floating_point:
        values.requires_grad_()
    column = Rollout(rewards=values).rewards
    assert column.dtype == np.float64
    np.testing.assert_array_equal(column, [1.0, 2.0, 3.0])


def test_what_is_masked_was_not_measured():
    column = Rollout(costs={"c": np.ma.array([0, 1, 0], mask=[True, False, True])}).cost("c")
    np.testing.assert_array_equal(column, [np.nan, 1.0, np.nan])


@pytest.mark.parametrize("costs", [[0.0, 1.0], "cost", 3])
def test_costs_that_are_no_columns_by_name_are_refused(costs):
    with pytest.raises(RolloutError, match="give a column for each name"):
        Rollout(costs=costs)


@pytest.mark.parametrize(
    "values",
    [
        [[0.0, 1.0]],
        3.0,
        ["high"],
        [10**400],
        [torch.tensor(1.0, requires_grad=True)],
        torch.tensor([1.0]).to_sparse(),
    ],
)
def test_a_column_that_is_not_one_number_per_row_is_refused(values):
    with pytest.raises(RolloutError, match="Column 'rewards'"):
        Rollout(rewards=values)


def test_columns_lists_what_is_present_and_costs_by_their_own_name():
    rollout = Rollout(rewards=[1.0], costs={"speed": [2.0]}, completions=["a"])
    assert rollout.columns == {"rewards", "costs", "speed", "completions"}


def test_an_empty_rollout_has_no_rows():
    assert Rollout(costs={"speed": []}).n_rows == 0


def test_a_cost_that_a_step_was_not_to_measure_is_said_with_none_and_counts_no_rows():
    rollout = Rollout(costs={"speed": [1.0, 3.0], "eval_loss": None})
    assert rollout.n_rows == 2
    assert rollout.unmeasured == {"eval_loss"}
    assert rollout.cost("eval_loss").shape == (0,)
    with pytest.raises(RolloutError, match="'eval_loss' has 0 rows, but 'speed' has 2"):
        Rollout(costs={"speed": [1.0, 3.0], "eval_loss": []})


def test_what_reads_an_unmeasured_cost_stays_as_it_is_and_the_rest_goes_on():
    watch = Gate(Require(ConstraintSatisfaction("speed", 1.0), at_least=0.5), name="watch", confidence=0.5)
    other = Gate(Require(ConstraintSatisfaction("eval_loss", 1.0), at_least=0.5), name="other", confidence=0.5)
    guard = Guard(
        Constraint("speed", limit=watch.between(1.0, 2.0)), Constraint("eval_loss", limit=other.between(1.0, 2.0))
    )
    guard.step(Rollout(costs={"speed": [2.0] * 8, "eval_loss": [2.0] * 8}))
    before, held = guard.multipliers, guard.state_dict()
    decision = guard.step(Rollout(costs={"speed": [2.0] * 8, "eval_loss": None}))
    after = guard.state_dict()
    assert guard.multipliers["speed"] > before["speed"]
    assert guard.multipliers["eval_loss"] == before["eval_loss"]
    for kind, name in (("constraints", "eval_loss"), ("gates", "other")):
        assert after[kind][name] == held[kind][name]
    assert after["gates"]["watch"] != held["gates"]["watch"]
    assert not any(reason.verdict == "failed" for reason in decision.reasons)
