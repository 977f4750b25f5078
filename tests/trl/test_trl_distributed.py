"""Two processes that share one group of completions decide alike, and train on the documented advantages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import SEVERAL_PROCESSES


def launch(name, *arguments):
    """Run a script of this folder on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(name)), *map(str, arguments)],
        env=os.environ | SEVERAL_PROCESSES | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_agree_and_each_trains_on_its_own_rows(random_model, tmp_path):
    launch("two_processes.py", random_model, tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    assert ranks[0]["multipliers"] == ranks[1]["multipliers"]
    assert ranks[0]["costs"] == ranks[1]["costs"]
    assert len(ranks[0]["costs"][0]) == 8
    lam = sum(ranks[0]["multipliers"].values())
    for rank in ranks:
        assert [ids for ids, _ in rank["guarded"]] == [ids for ids, _ in rank["reward"]]
        expected = [
            (a_r - lam * a_c) / (1 + lam) for (_, a_r), (_, a_c) in zip(rank["reward"], rank["cost"], strict=True)
        ]
        # float32 in the trainer against float64 here
        assert [a for _, a in rank["guarded"]] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert ranks[0]["guarded"] != ranks[1]["guarded"]
    saved = json.loads((tmp_path / "checkpoint-1" / "guardrails.json").read_text())
    assert {name: entry["multiplier"] for name, entry in saved["constraints"].items()} == ranks[0]["multipliers"]


def test_two_processes_that_rank_pairs_decide_on_the_costs_of_both(random_model, tmp_path):
    launch("pairs_processes.py", random_model, tmp_path)
    first, second = (json.loads((tmp_path / f"pairs{rank}.json").read_text()) for rank in (0, 1))
    for key in ("decided", "state", "traffic"):
        assert first[key] == second[key]
    assert first["measured"] != second["measured"]
    for step, rows in enumerate(first["decided"]):
        batches = [batch for rank in (first, second) for batch in rank["measured"][2 * step : 2 * step + 2]]
        assert rows == [cost for batch in batches for cost in batch]
        assert len(rows) == 2 * 2 * 4
    # One gather per step, and one more in the first, which asks how many rows there are: a header of four numbers,
    # then rewards and costs of eight completions.
    assert first["traffic"] == [4, 8 * 2 * (4 + 3 * (4 + 16))]
    assert first["records"]
    assert not second["records"]
    assert json.loads((tmp_path / "checkpoint-3" / "guardrails.json").read_text()) == first["state"]
