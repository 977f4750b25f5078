import sys

import pytest
from matplotlib.image import imread
from recorded import record

from guardrails import Constraint, Guard, Refinement, Rollout
from guardrails.errors import GuardrailsError
from guardrails.refine import FunctionRefiner
from guardrails.report import collect
from guardrails.report.picture import draw


def test_a_picture_holds_cost_limit_multiplier_and_level_of_each_run(run, tmp_path):
    record(tmp_path, 40, seed=1)
    draw([collect(run, name="one"), collect(tmp_path, name="two")], tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    for part in ("one", "two", "toxicity", "length", "level of gate", "multiplier λ", "95% band", "step"):
        assert f"{part}<" in text or f">{part}" in text
    draw([collect(run)], tmp_path / "picture.png")
    pixels = imread(tmp_path / "picture.png")
    assert pixels.shape[0] > 800
    assert pixels[..., :3].std() > 0.02  # not an empty sheet


def test_the_same_ledger_gives_the_same_file(run, tmp_path):
    for name in ("one.svg", "two.svg"):
        draw([collect(run)], tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_names_are_no_formulas(tmp_path):
    guarded = Guard(Constraint(r"$\frac{<b>$ \x1b", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.step(Rollout(costs={r"$\frac{<b>$ \x1b": [2.0]}))
    draw([collect(tmp_path, name="a $ b $ c\n\x1b")], tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "a $ b $ c" in text
    assert r"$\frac{&lt;b&gt;$" in text


def test_costs_as_large_as_a_float_holds_are_drawn(tmp_path):
    guarded = Guard(Constraint("cost", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        for cost in (0.5, 1.7e308, -1.7e308):
            guarded.step(Rollout(costs={"cost": [cost]}))
    draw([collect(tmp_path)], tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png")[..., :3].std() > 0.02


def test_runs_that_share_no_constraint_are_drawn(run, tmp_path):
    guarded = Guard(Constraint("other", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.step(Rollout(costs={"other": [2.0]}))
    draw([collect(run), collect(tmp_path)], tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().count("not in this run") == 4


def test_without_matplotlib_the_cure_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GuardrailsError, match="pip install matplotlib"):
        draw([collect(run)], tmp_path / "picture.png")


def test_another_ending_and_an_unwritable_path_are_refused(run, tmp_path):
    with pytest.raises(GuardrailsError, match=r"ends in \.png, \.svg, \.pdf"):
        draw([collect(run)], tmp_path / "picture.bmp")
    with pytest.raises(GuardrailsError, match="cannot be written"):
        draw([collect(run)], tmp_path / "missing" / "picture.png")


def test_a_run_of_steps_without_a_constraint_is_not_said_to_have_no_steps(tmp_path):
    guarded = Guard(Refinement(FunctionRefiner(lambda prompt, completion: completion)))
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.step(Rollout(rewards=[1.0], edit_ratio=[0.5]))
    view = collect(tmp_path)
    assert view.steps == 1
    with pytest.raises(GuardrailsError, match="no step with a constraint or a gate was recorded"):
        draw([view], tmp_path / "picture.png")
