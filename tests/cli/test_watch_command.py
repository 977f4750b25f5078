import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tracemalloc

import pytest
from rich.console import Console

from guardrails import CompetenceMetric, Constraint, Dial, Gate, Guard, LedgerError, Require, Rollout
from guardrails.watch import Watch, follow, sparkline

WATCH = [sys.executable, "-m", "guardrails", "watch"]


def printed(watch, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(watch.frame(width))
    return console.file.getvalue()


def step(guard, cost):
    return guard.step(Rollout(costs={"toxicity": [cost, cost]}))


@pytest.fixture
def guard(tmp_path):
    made = Guard(Constraint("toxicity", limit=0.5))
    made.record(tmp_path / "ledger.jsonl")
    yield made
    made.ledger.close()


def test_a_frame_tells_cost_limit_multiplier_and_the_reason(guard, tmp_path):
    for cost in (0.1, 0.9, 0.75):
        decision = step(guard, cost)
    guard.ledger.flush()
    watch = Watch(tmp_path)
    assert [line.decision.step for line in watch.steps()] == [1, 2, 3]
    text = printed(watch)
    row = next(line for line in text.splitlines() if "toxicity  " in line)
    assert " 0.75 " in row
    assert " 0.5 " in row
    assert f"{decision.constraints['toxicity'].multiplier:.4g}" in row
    assert sparkline([0.1, 0.9, 0.75], low=0.0, high=0.9) in row
    assert "toxicity tightened: mean cost 0.75 is above limit 0.5" in text
    assert "step 3, 2 rows" in text


def test_a_frame_fits_the_terminal(guard, tmp_path):
    for _ in range(200):
        step(guard, 0.4)
    guard.ledger.flush()
    watch = Watch(tmp_path)
    watch.poll()
    for width in (60, 80, 200):
        text = printed(watch, width)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("look", [Watch.poll, lambda watch: list(map(id, follow(watch, 1.0)))], ids=["poll", "follow"])
def test_a_long_run_is_looked_at_in_the_memory_of_what_is_drawn(guard, tmp_path, look):
    for _ in range(2000):
        step(guard, 0.4)
    guard.ledger.close()
    watch = Watch(tmp_path)
    tracemalloc.start()
    try:
        look(watch)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "step 2000, 2 rows" in printed(watch)
    assert most < 2e6  # 60 steps of 5.5 kB, and what else a look takes; all 2000 are 11 MB


def test_what_is_written_later_and_elsewhere_is_read_until_the_end(tmp_path):
    guard = Guard(Constraint("toxicity", limit=0.5))
    ledger = guard.record(tmp_path / "ledger.jsonl", max_bytes=1500)
    watch = Watch(tmp_path)
    assert list(watch.steps()) == []
    assert "No step was recorded yet" in printed(watch)
    for number in range(1, 6):
        step(guard, 0.1 * number)
        ledger.flush()
        assert [line.decision.step for line in watch.steps()] == [number]
        assert not watch.ended
    assert len(list(tmp_path.iterdir())) > 1
    ledger.close()
    assert list(watch.steps()) == []
    assert watch.ended
    assert "ended" in printed(watch)


def test_a_cost_that_a_step_did_not_measure_is_shown_as_it_was_last(tmp_path):
    guard = Guard(Constraint("toxicity", limit=0.5), Constraint("wrong", limit=0.5))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={"toxicity": [0.125], "wrong": None}))
        guard.step(Rollout(costs={"toxicity": None, "wrong": [0.75]}))
    watch = Watch(tmp_path)
    watch.poll()
    text = printed(watch)
    assert "0.125" in text
    assert "0.75" in text
    assert "nan" not in text


def test_costs_as_large_as_a_float_holds_are_shown(guard, tmp_path):
    for cost in (-1.7e308, 0.0, 1.7e308):
        step(guard, cost)
    guard.ledger.flush()
    watch = Watch(tmp_path)
    watch.poll()
    assert "▁▅█" in printed(watch)


def test_gates_dials_and_failures_are_told(tmp_path):
    class Moody(CompetenceMetric):
        name = "moody"
        requires = frozenset({"rewards"})

        def measure(self, rollout):
            if rollout.rewards[0] < 0:
                raise RuntimeError("not today")
            return [0.99] * len(rollout.rewards)

    gate = Gate(Require(Moody(), at_least=0.5), rungs=2, dwell=1)
    guard = Guard(Constraint("toxicity", limit=gate.between(0.5, 1.0)), Dial("beta", gate.between(0.1, 0.2)))
    with guard.record(tmp_path / "ledger.jsonl"):
        for reward in (1.0, 1.0, 1.0, -1.0):
            guard.step(Rollout(rewards=[reward] * 64, costs={"toxicity": [0.1] * 64}))
    watch = Watch(tmp_path)
    watch.poll()
    text = " ".join(printed(watch, 160).split())
    assert "beta = 0.1" in text
    assert "step 1: gate relaxed: rung 0 → 1 of 2: every requirement is met with confidence" in text
    assert "step 4: moody failed: raised RuntimeError: not today" in text
    assert guard.decision.gates["gate"].text[:40] in text


def test_names_and_reasons_cannot_steer_the_terminal(tmp_path):
    name = "tox\x1b]0;owned\x07[red]icity[bold]\x1b[2J"
    guard = Guard(Constraint(name, limit=0.5))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={name: [0.9]}))
    watch = Watch(tmp_path)
    watch.poll()
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    console.print(watch.frame(120))
    text = console.file.getvalue()
    assert "\x07" not in text
    assert "]0;owned" in text
    assert "\x1b]0" not in text
    assert "\x1b[2J" not in text
    assert "[red]icity[bold]" in text


def test_once_prints_a_frame_and_leaves(guard, tmp_path):
    step(guard, 0.9)
    guard.ledger.flush()
    done = subprocess.run([*WATCH, tmp_path, "--once"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "toxicity" in done.stdout
    done = subprocess.run([*WATCH, tmp_path, "--once", "--json"], capture_output=True, text=True, timeout=60)
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["step"] == 1
    assert json.loads(line)["scalars"]["toxicity/cost"] == 0.9


def test_the_command_follows_a_run_to_its_end(guard, tmp_path):
    process = subprocess.Popen(
        [*WATCH, tmp_path, "--json", "--interval", "0.05"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for number in (1, 2, 3):
        step(guard, 0.1 * number)
        guard.ledger.flush()
        assert json.loads(process.stdout.readline())["step"] == number
    guard.ledger.close()
    assert process.wait(timeout=60) == 0


def test_ctrl_c_leaves_a_live_terminal_quietly(guard, tmp_path):
    step(guard, 0.9)
    guard.ledger.flush()
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [*WATCH, tmp_path, "--interval", "0.05"],
        stdout=end,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "xterm-256color"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    shown = b""
    while b"step 2" not in shown:
        assert select.select([terminal], [], [], 60)[0], shown.decode()
        shown += os.read(terminal, 4096)
        if b"step 1" in shown and guard.decision.step == 1:
            step(guard, 0.7)
            guard.ledger.flush()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(end)
    os.close(terminal)
    assert (process.returncode, err) == (0, "")


def test_an_altered_line_ends_the_watch_with_exit_code_1(guard, tmp_path):
    for cost in (0.9, 0.8):
        step(guard, cost)
    guard.ledger.close()
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"mean":0.8', b'"mean":0.1'))
    done = subprocess.run([*WATCH, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ALTERED: ledger.jsonl, line 3 is damaged or was altered" in done.stderr
    done = subprocess.run([*WATCH, tmp_path, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ok"] is False
    assert "line 3 is damaged" in last["error"]


def test_no_ledger_and_one_that_vanishes_are_sentences(guard, tmp_path):
    done = subprocess.run([*WATCH, tmp_path / "nowhere", "--once"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "There is no ledger at" in done.stderr
    watch = Watch(tmp_path)
    watch.poll()
    (tmp_path / "ledger.jsonl").rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(LedgerError, match=r"cannot be read: No such file or directory\. Was it moved\?"):
        watch.poll()


@pytest.mark.parametrize("interval", ["0", "inf", "1e300"])
def test_an_interval_that_no_clock_can_wait_is_refused(guard, tmp_path, interval):
    done = subprocess.run([*WATCH, tmp_path, "--interval", interval], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Invalid value for '--interval'" in done.stderr


def test_a_ledger_that_is_yet_to_be_begun_is_waited_for(tmp_path):
    process = subprocess.Popen(
        [*WATCH, tmp_path / "run", "--json", "--interval", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert "Waiting for one to be begun" in process.stderr.readline()
    guard = Guard(Constraint("toxicity", limit=0.5))
    with guard.record(tmp_path / "run" / "ledger.jsonl"):
        step(guard, 0.9)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["step"] == 1
    assert err == ""  # it was said once


def test_waiting_for_a_ledger_is_left_with_ctrl_c(tmp_path):
    process = subprocess.Popen(
        [*WATCH, tmp_path / "run"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    assert "Waiting" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_a_long_path_does_not_hide_the_step(guard, tmp_path):
    step(guard, 0.9)
    guard.ledger.close()
    link = tmp_path / ("long" * 40)
    link.symlink_to(tmp_path, target_is_directory=True)
    done = subprocess.run([*WATCH, link, "--once"], capture_output=True, text=True, timeout=60)
    assert "step 1, " in done.stdout
