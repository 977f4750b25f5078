import copy
import errno
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from guardrails import ConfigurationError, Constraint, Guard, LedgerError, Rollout
from guardrails.ledger import files, read, verify, writer
from guardrails.ledger.lines import START
from guardrails.ledger.reader import Reader
from guardrails.schedulers import DualAscent


def new():
    return Guard(Constraint("c", limit=1.0, scheduler=DualAscent(0.5)))


def steps(guard, n, cost=2.0):
    for _ in range(n):
        guard.step(Rollout(costs={"c": [cost]}))


def kinds(path):
    return [line.kind for line in read(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "ledger.jsonl"


def test_a_run_is_a_header_its_steps_and_a_closing_line(path):
    guard = new()
    with guard.record(path, seed=11):
        steps(guard, 3)
    header, *rest = read(path)
    assert header.data["seed"] == 11
    assert header.data["prev"] == START
    assert header.data["policy"]["constraints"]["c"]["scheduler"] == {
        "learning_rate": 0.5,
        "initial": 0.0,
        "name": "dual_ascent",
    }
    assert header.data["environment"]["training-guardrails"]
    assert [line.kind for line in rest] == ["step", "step", "step", "end"]
    assert rest[-1].data["step"] == 3
    assert rest[0].decision.reasons[0].text == "mean cost 2 is above limit 1, λ 0 → 0.5"


def test_the_header_is_on_disk_at_once_and_steps_after_a_second_or_sixty_four_or_a_checkpoint(path, monkeypatch):
    guard = new()
    now = [0.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    guard.record(path)
    assert kinds(path) == ["header"]
    steps(guard, 63)
    assert kinds(path) == ["header"]
    steps(guard, 1)
    assert len(kinds(path)) == 65
    steps(guard, 1)
    assert len(kinds(path)) == 65
    guard.state_dict()
    assert len(kinds(path)) == 66
    now[0] += 1.0
    steps(guard, 1)
    assert len(kinds(path)) == 67


def test_reading_goes_on_where_it_stopped_also_into_the_next_file(path):
    guard = new()
    guard.record(path, max_bytes=3000)
    reader = Reader(path)
    seen = [line.kind for line in reader.poll()]
    for _ in range(30):
        steps(guard, 1)
        guard.ledger.flush()
        seen += [line.kind for line in reader.poll()]
    guard.ledger.close()
    seen += [line.kind for line in reader.poll()]
    assert seen == ["header", *["step"] * 30, "end"]
    assert len(files(path)) > 3


def test_rotation_keeps_files_near_their_size_and_the_chain_whole(path):
    guard = new()
    with guard.record(path, max_bytes=4000):
        steps(guard, 300)
    sizes = [each.stat().st_size for each in files(path)]
    longest = 64 * 700  # a flush of 64 lines may go beyond the size
    assert len(sizes) > 2
    assert all(4000 <= size <= 4000 + longest for size in sizes[:-1])
    result = verify(path)
    assert result.ok
    assert result.steps == 300


@pytest.mark.parametrize("cut", [1, 17, 200])
def test_a_torn_last_line_is_set_aside_and_the_chain_goes_on(path, cut):
    guard = new()
    with guard.record(path):
        steps(guard, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    torn = whole[:-cut].rpartition(b"\n")[2]
    state = guard.state_dict()
    again = new()
    again.load_state_dict(state)
    with again.record(path):
        steps(again, 2)
    assert path.with_name("ledger.jsonl.torn-1").read_bytes() == torn
    assert kinds(path)[-4:] == ["seam", "step", "step", "end"]
    assert list(read(path))[-4].data["reason"] == "resumed"


def test_each_torn_end_is_kept(path):
    for count in (1, 2, 3):
        guard = new()
        with guard.record(path):
            pass
        with path.open("ab") as file:
            file.write(b'{"prev":"')
        assert len(list(path.parent.glob("*.torn-*"))) == count - 1
    with new().record(path):
        pass
    assert len(list(path.parent.glob("*.torn-*"))) == 3
    assert verify(path).ok


def test_a_header_cut_short_is_begun_anew(path):
    with new().record(path):
        pass
    path.write_bytes(path.read_bytes()[:50])
    guard = new()
    with guard.record(path):
        steps(guard, 1)
    assert kinds(path) == ["header", "step", "end"]
    assert verify(path).ok


def test_resume_from_an_earlier_checkpoint_is_a_seam_that_says_so_and_replays(path):
    guard = new()
    guard.record(path)
    steps(guard, 5)
    checkpoint = json.loads(json.dumps(guard.state_dict()))
    steps(guard, 4)
    guard.ledger.close()
    again = new()
    again.record(path)
    again.load_state_dict(checkpoint)
    steps(again, 3, cost=0.5)
    again.ledger.close()
    assert kinds(path).count("seam") == 1, "the seam of the fresh guard gives way to that of the loaded one"
    result = verify(path)
    assert result.ok
    assert result.steps == 12
    assert result.notes == ["ledger.jsonl, line 12: the run was resumed from step 5, after step 9"]


def test_resume_from_a_state_that_no_step_here_led_to_is_found(path):
    guard = new()
    with guard.record(path):
        steps(guard, 5)
    checkpoint = guard.state_dict()
    checkpoint["constraints"]["c"]["multiplier"] = checkpoint["constraints"]["c"]["state"]["multiplier"] = 0.0
    again = new()
    again.load_state_dict(checkpoint)
    with again.record(path):
        steps(again, 1)
    assert "from a state that no step recorded here led to" in verify(path).problem


@pytest.mark.parametrize("again", [False, True])
def test_a_checkpoint_loaded_before_the_first_step_begins_the_record(path, again):
    first = new()
    steps(first, 2)
    second = new()
    with second.record(path) as ledger:
        if again:  # closed and opened anew, still without a step
            ledger.note("a note", 1)
            ledger.close()
            ledger = second.record(path)
        second.load_state_dict(first.state_dict())
        steps(second, 3)
        ledger.close()
    result = verify(path)
    assert result.ok
    assert result.steps == 3
    assert result.notes == [f"ledger.jsonl, line {4 if again else 2}: the record begins at step 2"]


def test_a_foreign_checkpoint_loaded_after_a_step_is_found(path):
    first = new()
    steps(first, 2)
    second = new()
    with second.record(path):
        steps(second, 1)
        second.load_state_dict(first.state_dict())
        steps(second, 1)
    assert "line 3: the run was resumed at step 2 from a state that no step recorded" in verify(path).problem


def test_a_new_run_into_the_same_ledger_begins_from_a_fresh_state(path):
    for _ in range(2):
        guard = new()
        with guard.record(path):
            steps(guard, 2)
    result = verify(path)
    assert result.ok
    assert result.notes == ["ledger.jsonl, line 5: the run was resumed from step 0, after step 2"]


def test_a_second_guard_of_this_process_takes_the_ledger_over(path):
    first, second = new(), new()
    first.record(path)
    steps(first, 1)
    second.record(path)
    steps(second, 1)
    assert first.ledger.closed
    second.ledger.close()
    assert kinds(path) == ["header", "step", "end", "seam", "step", "end"]


def test_a_ledger_that_another_process_writes_is_refused(path):
    code = (
        "import sys, time\nfrom guardrails import *\nguard = Guard(Constraint('c', limit=1.0))\n"
        f"guard.record({str(path)!r})\nprint('ready', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        before = path.read_bytes()
        with pytest.raises(LedgerError, match="in use by another process"):
            new().record(path)
        assert path.read_bytes() == before
    finally:
        other.communicate("", timeout=60)
    with new().record(path):
        pass
    assert kinds(path) == ["header", "end", "seam", "end"], "the other process closed its run when it ended"


FOREIGN = {
    "text": b"a log\nof something else\n",
    "no newline": b"notes of mine",
    "json lines": b'{"step": 1}\n{"step": 2}\n',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_ledger_is_left_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="is no ledger"):
        new().record(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_ledger_of_a_newer_schema_is_neither_continued_nor_verified(path, monkeypatch):
    from guardrails.ledger import header

    monkeypatch.setattr(header, "SCHEMA", 99)
    with new().record(path):
        pass
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="schema 99"):
        new().record(path)
    with pytest.raises(LedgerError, match="Upgrade training-guardrails"):
        verify(path)
    assert path.read_bytes() == before


def test_a_step_after_closing_is_not_recorded_and_says_so_once(path, caplog):
    guard = new()
    guard.record(path).close()
    with caplog.at_level(logging.WARNING):
        steps(guard, 3)
    assert [record.message for record in caplog.records if "not recorded" in record.message] == [
        f"The ledger {path} was closed; what is decided from now on is not recorded."
    ]
    assert kinds(path) == ["header", "end"]


def test_a_deleted_ledger_is_reported_and_training_goes_on(path, caplog):
    guard = new()
    guard.record(path)
    path.unlink()
    with caplog.at_level(logging.WARNING):
        steps(guard, 130)
        guard.ledger.close()
    assert "it was deleted" in caplog.text
    assert guard.ledger.lost == 130
    assert guard.multipliers["c"] == pytest.approx(130 * 0.5)


def test_runs_whose_names_look_like_parts_of_one_another_stay_apart(tmp_path):
    for name, most in (("seed", 1 << 28), ("seed.1", 1 << 28), ("seed", 500)):  # the first, continued, cannot rotate
        guard = new()
        with guard.record(tmp_path / f"{name}.jsonl", max_bytes=most):
            steps(guard, 3)
    assert verify(tmp_path / "seed.jsonl").ok
    assert verify(tmp_path / "seed.jsonl").steps == 6
    assert verify(tmp_path / "seed.1.jsonl").ok
    assert verify(tmp_path / "seed.1.jsonl").steps == 3
    assert kinds(tmp_path / "seed.1.jsonl") == ["header", "step", "step", "step", "end"]


def test_steps_that_each_process_lost_are_added_up(path, monkeypatch):
    monkeypatch.setattr(writer, "_MOST_WAITING", 5)
    monkeypatch.setattr(writer, "FLUSH_LINES", 1)
    state, full = new().state_dict(), []
    write = writer.Ledger._write

    def refuse(ledger, data):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(ledger, data)

    monkeypatch.setattr(writer.Ledger, "_write", refuse)
    counts = []
    for _ in range(3):
        guard = new()
        guard.load_state_dict(state)
        guard.record(path)
        steps(guard, 2)
        full.append(True)
        steps(guard, 7)
        full.clear()
        steps(guard, 2)
        state = guard.state_dict()
        guard.ledger.close()
        counts.append(guard.ledger.lost)
        assert verify(path).lost == sum(counts)
    assert all(counts)
    found = verify(path)
    assert found.ok
    assert found.steps + found.lost == 33


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_writes_nothing_of_its_parents_ledger(path):
    guard = new()
    guard.record(path)
    steps(guard, 3)
    child = os.fork()
    if child == 0:
        guard.ledger.flush()
        guard.ledger.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert kinds(path) == ["header"]
    guard.ledger.close()
    assert kinds(path) == ["header", "step", "step", "step", "end"]


def test_a_guard_that_is_dropped_closes_its_ledger(path):
    guard = new()
    guard.record(path)
    steps(guard, 1)
    del guard
    import gc

    gc.collect()
    assert kinds(path) == ["header", "step", "end"]


def test_an_ordinary_end_of_the_process_closes_the_ledger(path):
    code = (
        "from guardrails import *\nguard = Guard(Constraint('c', limit=1.0))\n"
        f"guard.record({str(path)!r})\nguard.step(Rollout(costs={{'c': [2.0]}}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert kinds(path) == ["header", "step", "end"]
    assert verify(path).ok


def test_recording_costs_a_step_little(tmp_path):
    """Loose bounds against accidents; benchmarks/ledger.py has the figures."""
    import numpy as np

    costs = {f"c{i}": np.random.default_rng(i).random(256) for i in range(5)}
    rollout = Rollout(costs=costs)

    def seconds(guard):
        best = 1.0
        for _ in range(10):
            begun = time.process_time()
            for _ in range(100):
                guard.step(rollout)
            best = min(best, (time.process_time() - begun) / 100)
        return best

    plain, recorded = (Guard(*(Constraint(name, limit=0.5) for name in costs)) for _ in range(2))
    recorded.record(tmp_path / "ledger.jsonl")
    assert seconds(recorded) - seconds(plain) <= 150e-6  # three times the promise, for machines that are busy


@pytest.mark.parametrize("settings", [{"seed": "7"}, {"seed": 0.5}, {"max_bytes": "1 MB"}, {"max_bytes": 0}])
def test_settings_of_a_record_that_mean_nothing_are_refused_before_anything_is_written(path, settings):
    (name,) = settings
    with pytest.raises(ConfigurationError, match=f"record: {name} is .*; give"):
        Guard(Constraint("c", limit=1.0)).record(path, **settings)
    assert not path.exists()


def test_a_seed_may_be_a_whole_number_of_numpy(path):
    with Guard(Constraint("c", limit=1.0)).record(path, seed=np.int64(7)):
        pass
    assert next(read(path)).data["seed"] == 7


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))])
def test_a_copy_of_a_guard_that_records_records_nothing_and_leaves_the_ledger_alone(path, copied):
    guard = Guard(Constraint("cost", limit=1.0))
    ledger = guard.record(path)
    guard.attach("a host")
    guard.step(Rollout(costs={"cost": [2.0]}))
    twin = copied(guard)
    assert twin.state_dict() == guard.state_dict()
    assert twin.ledger is None
    assert twin.host is None
    twin.step(Rollout(costs={"cost": [2.0]}))
    del twin
    gc.collect()
    guard.step(Rollout(costs={"cost": [3.0]}))
    ledger.close()
    assert verify(path).steps == 2
    with pytest.raises(TypeError, match="one writer"):
        copy.copy(ledger)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda guard: guard.state_dict(),
        lambda guard: guard.ledger.flush(),
        lambda guard: guard.ledger.note("a note", 1),
        lambda guard: guard.ledger.seam("resumed"),
    ],
    ids=["state_dict", "flush", "note", "seam"],
)
def test_threads_break_no_chain_and_do_not_wait_for_each_other_for_ever(path, meddle):
    guard = Guard(Constraint("cost", limit=1.0))
    over = threading.Event()
    ledger = guard.record(path)

    def train():
        for _ in range(1500):
            guard.step(Rollout(costs={"cost": [0.5]}))
        over.set()

    def disturb():
        while not over.is_set():
            meddle(guard)

    threads = [threading.Thread(target=each, daemon=True) for each in (train, disturb)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    ledger.close()
    found = verify(path)
    assert found.ok
    assert (found.steps, found.lost) == (1500, 0)


@pytest.mark.parametrize(
    ("meddle", "noted"),
    [(lambda guard: guard.ledger.flush(), []), (lambda guard: guard.ledger.note("a note", 1), ["note"])],
    ids=["flush", "note"],
)
def test_what_arrives_while_lines_are_written_waits_for_the_next_writing(path, meddle, noted, monkeypatch):
    guard = new()
    ledger = guard.record(path)
    writing, write = threading.Event(), writer.Ledger._write

    def slow(self, data):
        writing.set()
        time.sleep(0.3)
        write(self, data)

    steps(guard, 3)
    monkeypatch.setattr(writer.Ledger, "_write", slow)
    training = threading.Thread(target=guard.state_dict)
    training.start()
    assert writing.wait(10)
    meddle(guard)
    training.join()
    ledger.close()
    assert kinds(path) == ["header", "step", "step", "step", *noted, "end"]
    assert verify(path).ok


class Slow(DualAscent):
    begun = threading.Event()

    def update(self, state, violation):
        self.begun.set()
        time.sleep(0.3)
        return super().update(state, violation)


def test_a_state_taken_by_another_thread_is_of_one_step():
    guard = Guard(*(Constraint(name, limit=1.0, scheduler=Slow(0.5)) for name in ("first", "second")))
    Slow.begun.clear()
    training = threading.Thread(target=guard.step, args=(Rollout(costs={"first": [2.0], "second": [2.0]}),))
    training.start()
    assert Slow.begun.wait(10)
    state = guard.state_dict()
    training.join()
    assert (state["step"], [part["multiplier"] for part in state["constraints"].values()]) == (1, [0.5, 0.5])
