"""What the demo says of its runs follows from what they measured."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from guardrails_demo import table
from guardrails_demo.curves import Curves
from guardrails_demo.jobs import Job


def curves(costs, *, guarded=True):
    measured = Curves("control", guarded, limit=25.0)
    for step, cost in enumerate(costs, start=1):
        measured.add(step * 1000, reward=2.0 * cost, cost=cost, multiplier=1.5)
    return measured


@pytest.mark.parametrize(
    ("costs", "mean", "held"),
    [
        ([90.0] * 6 + [20.0, 30.0], 25.0, True),
        ([0.0] * 6 + [20.0, 30.1], 25.05, False),
        ([10.0], 10.0, True),
    ],
)
def test_a_limit_is_held_if_the_mean_cost_of_the_last_quarter_is_within_it(costs, mean, held):
    assert curves(costs).last_quarter(curves(costs).cost) == pytest.approx(mean)
    assert curves(costs).held is held


def test_a_run_that_measured_nothing_has_not_held_its_limit():
    assert math.isnan(curves([]).last_quarter([]))
    assert not curves([]).held


def test_the_table_shows_the_figures_of_each_run_and_its_verdict():
    runs = [curves([80.0] * 4, guarded=False), curves([80.0] * 3 + [21.0])]
    jobs = [Job("control", run.guarded, 0, False, Path("ledger.jsonl")) for run in runs]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(jobs, runs))
    unguarded, guarded = [line for line in console.export_text().splitlines() if "PPO Hopper" in line]
    assert unguarded.replace("│", " ").split()[3:] == ["160.00", "80.00", "25", "-", "broken"]
    assert guarded.replace("│", " ").split()[3:] == ["42.00", "21.00", "25", "1.50", "held"]
