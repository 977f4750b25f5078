"""The examples run as they are printed; without the guard each breaks the limit that it holds with it."""

import functools
import re
import runpy
import sys
from pathlib import Path

import pytest

from guardrails_trl import toy

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch, capsys, name, *options):
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.strip().splitlines()[-1]


def number(line, before):
    return float(re.search(rf"{before} (-?[\d.]+)", line).group(1))


@pytest.mark.parametrize(
    ("name", "quantity", "low", "high", "steps"),
    [
        ("trainer_classifier.py", "gap", -0.05, 0.05, "400"),
        ("trainer_sft.py", "filler words", 0.0, 0.1, "80"),
        ("trainer_kl.py", "divergence", 0.04, 0.06, "100"),
    ],
)
def test_example_holds_its_limit_and_breaks_it_unguarded(monkeypatch, capsys, name, quantity, low, high, steps):
    monkeypatch.setattr(toy, "build", functools.partial(toy.build, steps=100))  # it need not answer well here
    guarded = run(monkeypatch, capsys, name, "--steps", steps)
    unguarded = run(monkeypatch, capsys, name, "--steps", steps, "--unguarded")
    assert low <= number(guarded, quantity) <= high
    assert number(unguarded, quantity) > 2 * high
