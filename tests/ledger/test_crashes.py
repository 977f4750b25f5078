"""Real processes killed at random moments, files cut at every byte, real disks that are full."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from random_guards import rollout

from guardrails import Constraint, Gate, Guard, Require
from guardrails.ledger import read, verify
from guardrails.schedulers import PID


def new():
    gate = Gate(Require("reward_level", at_least=0.6), dwell=0)
    return Guard(Constraint("a", limit=gate.between(1.0, 2.0), scheduler=PID()))


def train(path, checkpoint, seed):
    """Resume from the checkpoint, if there is one, and train until killed."""
    draw = random.Random(seed)
    guard = new()
    if checkpoint.exists():
        guard.load_state_dict(json.loads(checkpoint.read_text()))
    ledger = guard.record(path, max_bytes=200_000)
    while True:
        guard.step(rollout(draw.randrange(10_000)))
        if draw.random() < 0.3:  # so that kills come in the middle of writing, and after steps of no checkpoint
            ledger.flush()
        if draw.random() < 0.05:
            written = checkpoint.with_suffix(".new")
            written.write_text(json.dumps(guard.state_dict()))
            written.replace(checkpoint)


def test_a_run_killed_at_random_moments_is_whole_up_to_each_kill_and_replays(tmp_path):
    path, checkpoint = tmp_path / "ledger.jsonl", tmp_path / "checkpoint.json"
    draw = random.Random(0)
    for attempt in range(25):
        child = os.fork()
        if child == 0:
            try:
                train(path, checkpoint, attempt)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the training itself failed"
    guard = new()
    if checkpoint.exists():
        guard.load_state_dict(json.loads(checkpoint.read_text()))
    with guard.record(path):
        guard.step(rollout(1))
    result = verify(path)
    assert result.ok, result
    assert result.steps > 100
    assert any("resumed from step" in note for note in result.notes)


def test_a_ledger_cut_at_any_byte_of_its_end_is_continued_from_its_last_whole_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    guard = Guard(Constraint("a", limit=1.0))
    with guard.record(path):
        for seed in range(2):
            guard.step(rollout(seed))
    whole = path.read_bytes()
    begin_of_second_step = whole.index(b'"kind":"step","', whole.index(b'"kind":"step","') + 1)
    for size in [*range(0, 120), *range(begin_of_second_step, len(whole))]:
        for left in tmp_path.iterdir():
            left.unlink()
        path.write_bytes(whole[:size])
        with Guard(Constraint("a", limit=1.0)).record(path):
            pass
        lines = list(read(path))
        assert lines[-1].kind == "end", size
        assert [line.hash for line in lines[: whole[:size].count(b"\n")]] == [
            json.loads(raw)["hash"] for raw in whole[:size].split(b"\n")[:-1]
        ], size
        torn = whole[:size].rpartition(b"\n")[2]
        assert [each.read_bytes() for each in tmp_path.glob("*.torn-*")] == ([torn] if torn else []), size


FULL = """
import json, resource, sys, warnings
from guardrails import *
from guardrails.ledger import verify
path, steps = sys.argv[1], int(sys.argv[2])
guard = Guard(Constraint("c", limit=1.0))
guard.record(path)
def train(n):
    for _ in range(n):
        guard.step(Rollout(costs={"c": [2.0]}))
    guard.ledger.flush()
train(10)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
train(steps)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
train(10)
guard.ledger.close()
result = verify(path)
print(json.dumps([result.ok, result.steps, result.lost, guard.ledger.lost, guard.decision.step, result.notes]))
"""


@pytest.mark.parametrize("steps", [200, 5000])
def test_a_file_that_may_not_grow_stops_no_training_and_the_loss_is_told(tmp_path, steps):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "ledger.jsonl"), str(steps)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ok, replayed, lost, counted, decided, notes = json.loads(done.stdout)
    assert ok
    assert decided == steps + 20
    assert replayed + lost == decided
    assert counted == lost
    assert done.stderr.count("cannot be written: File too large") == 1
    if steps == 200:
        assert lost == 0, "what waited was written once there was room"
    else:
        assert lost >= 2048
        assert any("could not be written and are not replayed" in note for note in notes)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_no_training_and_what_waited_is_written_once_there_is_room(small_disk, caplog):
    path = small_disk / "ledger.jsonl"
    ballast = small_disk / "ballast"
    guard = new()
    ledger = guard.record(path)
    with caplog.at_level(logging.WARNING):
        with ballast.open("wb", buffering=0) as file:
            while True:
                try:
                    if not file.write(b"x" * 1000):
                        break
                except OSError:
                    break
        for seed in range(100):
            guard.step(rollout(seed))
        ledger.flush()
    assert [record.message for record in caplog.records if "No space left" in record.message] == [
        f"The ledger {path} cannot be written: No space left on device. Training goes on; up to 2048 lines wait to be "
        "written."
    ]
    assert list(read(path))[-1].kind != "end"
    assert verify(path).problem == ""
    ballast.unlink()
    (small_disk / "room").write_bytes(b"")
    for seed in range(5):
        guard.step(rollout(seed))
    ledger.flush()
    steps = sum(line.kind == "step" for line in read(path))
    ledger.close()
    if steps < 105:  # 64 KiB may be too little for all; then the loss is told
        assert ledger.lost == 105 - steps
    assert verify(path).problem == ""


def test_a_disk_that_stays_full_to_the_end_leaves_a_sound_beginning_and_a_warning(small_disk, caplog):
    path = small_disk / "ledger.jsonl"
    guard = new()
    guard.record(path)
    with caplog.at_level(logging.WARNING):
        for seed in range(300):
            guard.step(rollout(seed % 7))
        guard.ledger.close()
    result = verify(path)
    assert result.problem == ""
    assert not result.closed
    assert result.steps + guard.ledger.lost == 300
    assert f"lacks {guard.ledger.lost} steps" in caplog.text


def test_a_torn_end_that_cannot_be_cut_off_at_once_is_cut_off_before_the_next_write(tmp_path, monkeypatch):
    write, truncate, broken = os.write, os.ftruncate, [True]

    def half(file, data):
        if broken[0] and len(data) > 100:
            write(file, bytes(data)[: len(data) // 2])
            raise OSError(5, "Input/output error")
        return write(file, data)

    def cut(file, size):
        if broken[0]:
            raise OSError(5, "Input/output error")
        truncate(file, size)

    guard = new()
    ledger = guard.record(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", cut)
    guard.step(rollout(1))
    ledger.flush()
    assert verify(tmp_path).torn_bytes > 0
    broken[0] = False
    guard.step(rollout(2))
    ledger.close()
    result = verify(tmp_path)
    assert result.ok, result
    assert result.steps == 2
