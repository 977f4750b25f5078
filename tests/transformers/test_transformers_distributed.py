"""Two processes decide as one does on the same rows, whatever rows each of them sees, and exchange little."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import SEVERAL_PROCESSES

from guardrails.ledger import read
from guardrails_trl import toy

FOLDER = Path(__file__).parent


def launch(script, n_processes, *arguments):
    """Run a script of this folder on so many processes."""
    command = [sys.executable]
    if n_processes > 1:
        # accelerate's launcher; its --cpu would leave the start of several processes to MPI, and without MPI start one.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n_processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
    done = subprocess.run(
        [*command, str(FOLDER / script), *map(str, arguments)],
        env=os.environ
        | SEVERAL_PROCESSES
        | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process found, and what each of two did."""
    model = toy.build(tmp_path_factory.mktemp("model"), steps=20, layers=1, width=32)
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for n_processes, folder in enumerate(folders, start=1):
        launch("two_processes.py", n_processes, model, folder)
    one = json.loads((folders[0] / "rank0of1.json").read_text())
    two = [json.loads((folders[1] / f"rank{rank}of2.json").read_text()) for rank in (0, 1)]
    return one, two, folders[1]


CASES = ("plain", "accumulated", "uneven", "sft")


@pytest.mark.parametrize("case", CASES)
def test_all_processes_decide_alike_to_the_bit(runs, case):
    _, (first, second), _ = runs
    for key in ("state", "costs", "multipliers", "weights", "traffic"):
        assert first[case][key] == second[case][key]


@pytest.mark.parametrize("case", [case for case in CASES if case != "uneven"])
def test_two_processes_do_what_one_does_on_the_same_rows(runs, case):
    """Uneven data are left out: there the host itself repeats rows, so that each process has as many."""
    one, (first, _), _ = runs
    assert first[case]["rows"] == one[case]["rows"]
    # Sums of single precision in another order; a penalty that bends has the slope of all processes' rows.
    assert first[case]["costs"] == pytest.approx(one[case]["costs"], rel=1e-4)
    assert first[case]["multipliers"] == pytest.approx(one[case]["multipliers"], rel=1e-3, abs=1e-5)


def test_the_guard_acted(runs):
    one, _, _ = runs
    for case in CASES:
        assert max(one[case]["multipliers"].values()) > 0.1
        assert one[case]["costs"][-1] < one[case]["costs"][0]


def test_a_step_takes_one_collective_and_one_more_where_a_penalty_bends(runs):
    one, (first, _), _ = runs
    assert one["plain"]["traffic"] == [0, 0]
    # SFT: six steps of one constraint. The first finds out how many rows there are, so it asks twice; a process sends
    # two numbers for a header, and four rows.
    assert first["sft"]["traffic"] == [7, 2 * 8 * 2 + 6 * 2 * 8 * (2 + 4)]
    # Classifier: eight steps of two batches each, for 'bent' one collective a batch, and two evaluations.
    collectives, received = first["accumulated"]["traffic"]
    assert 8 + 16 + 2 < collectives <= 8 + 16 + 2 + 3
    assert received < 8 * 2 * 8 * (8 + 4 * 16) + 16 * 2 * 2 * 4 * 2 + 400


def test_only_the_first_process_writes_the_ledger_and_the_state(runs):
    _, (first, second), folder = runs
    for case in CASES:
        assert first[case]["ledger"]
        assert not second[case]["ledger"]
        steps = [line.data["step"] for line in read(folder / case / "guardrails") if line.kind == "step"]
        assert steps == list(range(1, first[case]["state"]["step"] + 1))
    saved = json.loads((folder / "plain" / "checkpoint-8" / "guardrails.json").read_text())
    assert saved == first["plain"]["state"]


def test_a_process_without_a_row_that_a_cost_counts_waits_for_nobody_and_nobody_for_it(runs):
    _, ranks, _ = runs
    counts = np.array([rank["uneven"]["counts"] for rank in ranks])
    assert counts.shape == (2, 8)
    assert ((counts == 0).any(axis=0) & (counts > 0).any(axis=0)).any()
    assert (counts == 0).all(axis=0).any()  # a step without any


@pytest.mark.slow
def test_processes_that_hold_parts_of_the_weights_decide_as_one_does_and_resume(tmp_path):
    launch("sharded.py", 1, tmp_path / "one")
    launch("sharded.py", 2, tmp_path / "two")
    one = json.loads((tmp_path / "one" / "sharded0of1.json").read_text())
    first, second = (json.loads((tmp_path / "two" / f"sharded{rank}of2.json").read_text()) for rank in (0, 1))
    assert first == second
    assert {run["kind"] for run in first.values()} == {"FSDP"}
    assert first["resumed"] == first["whole"]
    # Sums of single precision in another order.
    assert first["whole"]["costs"] == pytest.approx(one["whole"]["costs"], rel=1e-4)
    assert first["plain"]["losses"] == pytest.approx(one["plain"]["losses"], rel=1e-4)
    assert first["whole"]["costs"][-1] < 0.05 < first["whole"]["costs"][0]
