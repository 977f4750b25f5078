"""The README's script runs, and resumes, as it is printed."""

import functools
import runpy
import sys
from pathlib import Path

import pytest

from guardrails_trl import toy

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_grpo.py"


def run(monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


def test_example_trains_explains_its_decision_and_resumes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(toy, "build", functools.partial(toy.build, steps=30))  # it need not answer well here
    out = run(monkeypatch, capsys, "--steps", "10", "--output", str(tmp_path))
    assert "step 10, 128 rows" in out
    assert "Last quarter: reward" in out
    assert (tmp_path / "checkpoint-10" / "guardrails.json").is_file()
    out = run(monkeypatch, capsys, "--steps", "12", "--output", str(tmp_path), "--resume")
    assert "step 12, 128 rows" in out


def test_toy_task_is_reproducible_and_leaves_the_global_random_state_alone(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    folders = [toy.build(tmp_path / name, steps=3, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(torch.rand(3), expected)
    one, same, other = ((Path(folder) / "model.safetensors").read_bytes() for folder in folders)
    assert one == same != other


def test_toy_reward_pays_for_the_answer_and_for_every_filler_word():
    completions, answer = ["7", "well 7 so", "8", "so so so", "", "7 8"], [7] * 6
    assert toy.correct(completions, answer) == [1, 1, 0, 0, 0, 1]
    assert toy.fillers(completions) == [0, 2, 0, 3, 0, 0]
    assert toy.reward(completions, answer) == pytest.approx([1.0, 1.3, 0.0, 0.45, 0.0, 1.0])
