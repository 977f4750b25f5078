"""Two processes refine as one does on the same global batch, also when one of them has nothing to refine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import SEVERAL_PROCESSES

CASES = (
    "all",
    "one rank",
    "reward",
    "reward on one rank",
    "reward fails on one rank",
    "lora",
    "accumulated",
    "static graph",
)


@pytest.fixture(scope="module")
def results(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined")
    script = str(Path(__file__).with_name("refined_processes.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([sys.executable], launch):
        done = subprocess.run(
            [*command, script, random_model, str(folder), *CASES],
            env=os.environ | SEVERAL_PROCESSES | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def load(folder, case):
    files = [f"{case.replace(' ', '_')}_{n}_{rank}.json" for n, rank in ((1, 0), (2, 0), (2, 1))]
    return [json.loads((folder / file).read_text()) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(results, case):
    one, first, second = load(results, case)
    for name in one["weights"]:
        alone, rank0, rank1 = (torch.tensor(run["weights"][name]) for run in (one, first, second))
        assert torch.equal(rank0, rank1)
        # float32 gradients summed in another order, two steps of 0.01
        torch.testing.assert_close(rank0, alone, rtol=1e-5, atol=2e-6)
    for key, values in one["logged"].items():
        assert first["logged"][key] == second["logged"][key] == pytest.approx(values, rel=1e-5), key
    assert first["cost"] == second["cost"] == one["cost"] == one["logged"]["edit_ratio"][-1]
    assert first["refined"] == second["refined"] == one["refined"]


def test_the_cases_are_what_they_say(results):
    _, first, second = load(results, "one rank")
    assert (first["has_term"], second["has_term"]) == (False, True)
    assert first["refined"] == [None] * 4 + ["5", None, "9", "12"]
    _, first, _ = load(results, "reward on one rank")
    # the first process has nothing to score, and takes part all the same; "so 5" to "5" is a word less, and refused
    assert first["refined"] == [None] * 6 + ["9", "12"]
    everything, _, _ = load(results, "all")
    scored, _, _ = load(results, "reward")
    # the reward counts words, so no word may be taken out
    assert scored["logged"]["change_rate"] == [0.0, 0.0] < everything["logged"]["change_rate"]
