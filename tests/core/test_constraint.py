import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails import ConfigurationError, Constraint

finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf, "5", True, None])
def test_a_limit_that_is_not_a_finite_number_of_at_least_zero_is_refused(limit):
    with pytest.raises(ConfigurationError, match="Constraint 'speed': limit"):
        Constraint("speed", limit=limit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, "limit of 0 has no scale"),
        ({"limit": 1.0, "scale": 0.0}, "scale is 0.0"),
        ({"limit": 1.0, "sense": "<"}, "sense is '<'"),
        ({"limit": 1.0, "cost": []}, "cost is"),
        ({"limit": 1.0, "cost": [len, 3]}, "cost is"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_with_a_cure(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Constraint("speed", **arguments)


@pytest.mark.parametrize("name", ["", "  ", "a/b", 3])
def test_a_name_that_loggers_cannot_carry_is_refused(name):
    with pytest.raises(ConfigurationError, match="name"):
        Constraint(name, limit=1.0)


def test_violation_is_positive_when_the_limit_is_broken_on_either_side():
    assert Constraint("c", limit=2.0).violation(3.0) == 1.0
    assert Constraint("c", limit=2.0, sense=">=").violation(3.0) == -1.0


def test_mean_cost_of_finite_rows_is_their_mean():
    measured = Constraint("c", limit=2.0).measure(np.array([1.0, 2.0, 6.0]))
    assert measured.cost == 3.0
    assert measured.invalid_rows == 0


@pytest.mark.parametrize("sense", ["<=", ">="])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(costs=st.lists(finite, max_size=8), limit=st.floats(0.1, 1e3))
def test_an_unmeasurable_row_violates_and_never_looks_better_than_any_other(sense, bad, costs, limit):
    constraint = Constraint("c", limit=limit, sense=sense)
    measured = constraint.measure(np.array([bad, *costs]))
    assert math.isfinite(measured.cost)
    assert np.isfinite(measured.rows).all()
    assert constraint.violation(measured.cost) > 0.0
    worst = constraint.violation(measured.rows[0])
    assert all(worst >= constraint.violation(row) for row in measured.rows)
    np.testing.assert_array_equal(measured.rows[1:], costs)


def test_costs_whose_sum_overflows_still_have_a_finite_mean():
    measured = Constraint("c", limit=1.0).measure(np.array([1.7e308, 1.7e308]))
    assert measured.cost == pytest.approx(1.7e308)
    assert measured.invalid_rows == 0


@pytest.mark.parametrize("costs", [[math.inf, -math.inf], [1.7e308, 1.7e308], [math.nan, 1.0]])
def test_costs_that_cannot_be_summed_raise_no_warning_of_numpy(costs):
    with np.errstate(all="raise"):
        assert math.isfinite(Constraint("c", limit=1.0).measure(np.array(costs)).cost)


def test_no_rows_measure_nothing():
    assert math.isnan(Constraint("c", limit=1.0).measure(np.array([])).cost)


@pytest.mark.parametrize("limit", [np.float32(0.5), np.float64(0.5), np.int64(2)])
def test_a_limit_may_be_a_number_of_numpy(limit):
    constraint = Constraint("cost", limit=limit)
    assert type(constraint.limit) is float
    assert constraint.limit == limit
