"""Two processes decide and train as one does on the same completions, and exchange nothing more for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import SEVERAL_PROCESSES

from guardrails.ledger import read, verify

SCRIPT = Path(__file__).with_name("same_batch.py")
STEPS, ROWS = 3, 16


# accelerate's launcher; its --cpu would leave the start of several processes to MPI, and without MPI start one.
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0"
)


def run(model, folder, n_processes):
    folder.mkdir()
    launch = ["-m", *LAUNCH.split()] if n_processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), model, str(folder), str(n_processes)],
        env=os.environ | SEVERAL_PROCESSES | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(n_processes)]


@pytest.fixture(scope="module")
def runs(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return folder, run(random_model, folder / "one", 1)[0], run(random_model, folder / "two", 2)


def test_decisions_are_the_same_on_all_processes_and_those_of_one_process(runs):
    _, one, two = runs
    assert two[0]["state"] == two[1]["state"] == one["state"]
    assert two[0]["costs"] == two[1]["costs"] == one["costs"]
    assert len(one["costs"]["fillers"]) == ROWS
    assert one["state"]["gates"]["gate"]["rung"] > 0
    assert all(multiplier > 0 for multiplier in one["multipliers"])


def test_the_weights_are_those_of_one_process(runs):
    _, one, two = runs
    assert two[0]["weights"] == two[1]["weights"]
    # Sums over another order of rows in float32, after three steps of Adam at a rate of 1e-2.
    assert two[0]["weights"] == pytest.approx(one["weights"], rel=1e-3, abs=1e-3)


def test_a_guard_sends_its_costs_with_the_hosts_rewards_and_nothing_of_its_own(runs):
    _, _, two = runs
    for rank in two:
        (plain_calls, plain_bytes), (calls, n_bytes) = rank["plain"], rank["guarded"]
        assert plain_calls > 0
        assert calls == plain_calls
        # Two costs and the length of each of its completions, in float32.
        assert n_bytes - plain_bytes == STEPS * 3 * 4 * ROWS // 2


def test_one_process_alone_writes_the_ledger(runs):
    folder, one, two = runs
    assert [rank["records"] for rank in two] == [True, False]
    decided = []
    for name in ("one", "two"):
        assert verify(folder / name / "guarded").ok
        lines = [line.data for line in read(folder / name / "guarded") if line.kind == "step"]
        decided.append([(line["step"], line["evidence"], line["decision"]) for line in lines])
        assert len(lines) == STEPS
    assert decided[0] == decided[1]
    assert one["records"]


def test_an_evaluation_whose_last_batch_does_not_fill_all_processes_agrees(runs):
    _, _, two = runs
    assert two[0]["evaluation"] == two[1]["evaluation"]
    assert two[0]["evaluation"]["eval_guardrails/fillers/cost"] > 0


def test_a_divergence_is_measured_alike_on_all_processes(runs):
    _, _, two = runs
    assert two[0]["sampled"] == two[1]["sampled"]
    assert two[0]["beta"] == two[1]["beta"] == two[0]["sampled"]["constraints"]["kl"]["multiplier"] != 0.1
