import json
import os
import subprocess
import sys

import pytest

from guardrails import Constraint, Gate, Guard, Require, Rollout
from guardrails.schedulers import CRPO

GUARDRAILS = [sys.executable, "-m", "guardrails"]


def guardrails(*arguments, **variables):
    done = subprocess.run(
        [*GUARDRAILS, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **variables}
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    guard = Guard(Constraint("toxicity", limit=0.5))
    with guard.record(folder / "ledger.jsonl", seed=3):
        for cost in (0.9, 0.7, 0.2):
            guard.step(Rollout(costs={"toxicity": [cost, cost]}))
    return folder


def test_the_page_is_written_and_its_path_printed(run, tmp_path):
    page = tmp_path / "new" / "page.html"
    assert guardrails("report", run, "--output", page) == (0, f"Page: {page}\n", "")
    assert page.read_text().startswith("<!doctype html>")
    assert '"toxicity"' in page.read_text()


def test_figures_are_printed_as_json_and_a_picture_drawn(run, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    code, out, _ = guardrails("report", run, run, "-o", page, "--image", picture, "--json")
    written = json.loads(out)
    assert code == 0
    assert (written["output"], written["image"]) == (str(page), str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    first, second = written["runs"]
    assert first == second
    assert (first["steps"], first["rows"], first["closed"]) == (3, 6, True)
    figures = first["constraints"]["toxicity"]
    assert (figures["measured"], figures["violated"], figures["last_cost"]) == (3, 2, 0.2)
    assert first["verification"]["ok"]


def test_a_run_of_more_steps_than_points_ends_with_what_its_last_step_decided(tmp_path):
    gate = Gate(Require("reward_level", at_least=0.5), rungs=2, dwell=0)
    guard = Guard(Constraint("toxicity", limit=gate.between(1.0, 2.0), scheduler=CRPO()))
    with guard.record(tmp_path / "ledger.jsonl"):
        for step in range(1, 1101):
            cost = 2.5 - step % 2 * 2.0
            guard.step(Rollout(rewards=[float(step < 1100)] * 64, costs={"toxicity": [cost] * 64}))
    code, out, _ = guardrails("report", tmp_path, "-o", tmp_path / "page.html", "--no-verify", "--json")
    (written,) = json.loads(out)["runs"]
    figures, last = written["constraints"]["toxicity"], guard.decision
    assert code == 0
    assert (figures["last_multiplier"], figures["last_cost"], figures["last_limit"]) == (1e6, 2.5, 1.5)
    assert last.constraints["toxicity"].limit == 1.5
    assert written["gates"] == {"gate": last.gates["gate"].level} == {"gate": 0.5}


def test_an_altered_ledger_is_shown_and_the_exit_code_is_1(run, tmp_path):
    ledger = run / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"mean":0.7', b'"mean":0.1'))
    page = tmp_path / "page.html"
    code, out, _ = guardrails("report", run, "-o", page)
    assert code == 1
    assert out.startswith(f"ALTERED: {run}: ledger.jsonl, line 3 is damaged or was altered")
    assert page.exists()
    code, out, _ = guardrails("report", run, "-o", page, "--no-verify", "--json")
    assert code == 1
    assert json.loads(out)["runs"][0]["verification"] is None


def test_no_ledger_and_an_unwritable_page_are_a_sentence_and_exit_code_2(run, tmp_path):
    code, out, err = guardrails("report", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "There is no ledger at" in err
    code, out, err = guardrails("report", run, "-o", run / "ledger.jsonl" / "page.html")
    assert (code, out) == (2, "")
    assert "cannot be written" in err
    assert "Traceback" not in err


def test_a_newer_ledger_is_refused(run, tmp_path):
    ledger = run / "ledger.jsonl"
    from guardrails.ledger import lines

    header = json.loads(ledger.read_bytes().splitlines()[0])
    body = {name: value for name, value in header.items() if name not in ("prev", "hash")} | {"schema": 99}
    ledger.write_bytes(lines.seal(lines.encode(body), lines.START)[0])
    code, _, err = guardrails("report", run, "-o", tmp_path / "page.html")
    assert code == 2
    assert "schema 99" in err
    assert not (tmp_path / "page.html").exists()


def test_a_page_without_a_picture_needs_no_matplotlib_and_no_torch(run, tmp_path):
    code = (
        "import sys; from guardrails.cli import app\n"
        f"app(['report', {str(run)!r}, '-o', {str(tmp_path / 'page.html')!r}], standalone_mode=False)\n"
        "print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
