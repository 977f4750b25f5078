"""Every change to a finished ledger is found, wherever it is made."""

import random
import shutil

import pytest
from random_guards import rollout

from guardrails import Constraint, Dial, Gate, Guard, LedgerError, Require
from guardrails.ledger import files, verify
from guardrails.schedulers import PID, Cap

PLACES = 1000


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A ledger of three files with a header, gates, steps, notes, a seam and a closing line."""
    folder = tmp_path_factory.mktemp("original")

    def guard():
        gate = Gate(Require("reward_level", at_least=0.7), Require("drift", at_least=0.3, audit=True), dwell=0)
        limit = gate.between(1.0, 2.0)
        return Guard(Constraint("a", limit=limit, scheduler=Cap(PID(), 5.0)), Dial("penalty", gate.between(1.0, 0.5)))

    first = guard()
    with first.record(folder / "ledger.jsonl", max_bytes=12_000) as ledger:
        for seed in range(15):
            first.step(rollout(seed))
            ledger.flush()
        ledger.note("example", {"text": "<script>"})
    second = guard()
    second.load_state_dict(first.state_dict())
    with second.record(folder / "ledger.jsonl", max_bytes=12_000):
        for seed in range(15, 25):
            second.step(rollout(seed))
    assert len(files(folder)) == 3
    assert verify(folder).ok
    return folder


def flip_a_bit(data, at, draw):
    data[at] ^= 1 << draw.randrange(8)


def replace_a_byte(data, at, draw):
    data[at] = draw.choice([byte for byte in b'0123456789abcdef"{}[],:\n ' if byte != data[at]])


def insert_bytes(data, at, draw):
    data[at:at] = draw.randbytes(draw.randrange(1, 20))


def delete_bytes(data, at, draw):
    del data[at : at + draw.randrange(1, 200)]


def cut_the_end(data, at, draw):
    del data[at:]


def lines_of(data):
    return bytes(data).splitlines(keepends=True)


def delete_a_line(data, at, draw):
    rows = lines_of(data)
    del rows[draw.randrange(len(rows))]
    data[:] = b"".join(rows)


def swap_two_lines(data, at, draw):
    rows = lines_of(data)
    one, other = draw.sample(range(len(rows)), 2)
    rows[one], rows[other] = rows[other], rows[one]
    data[:] = b"".join(rows)


def repeat_a_line(data, at, draw):
    rows = lines_of(data)
    index = draw.randrange(len(rows))
    rows.insert(draw.randrange(len(rows) + 1), rows[index])
    data[:] = b"".join(rows)


CHANGES = [
    flip_a_bit,
    replace_a_byte,
    insert_bytes,
    delete_bytes,
    cut_the_end,
    delete_a_line,
    swap_two_lines,
    repeat_a_line,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_tampering_at_random_places_is_always_found(original, tmp_path, change):
    draw = random.Random(change.__name__)
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    missed = []
    for attempt in range(PLACES // len(CHANGES)):
        path = draw.choice(files(folder))
        before = path.read_bytes()
        data = bytearray(before)
        at = draw.randrange(len(data))
        change(data, at, draw)
        if bytes(data) == before:
            continue  # no change at all: bytes that came out as they were
        path.write_bytes(data)
        try:
            found = not verify(folder).ok
        except LedgerError:
            found = True
        if not found:
            missed.append((attempt, path.name, at))
        path.write_bytes(before)
    assert not missed
    assert verify(folder).ok


def test_a_missing_or_exchanged_file_is_found(original, tmp_path):
    for index, change in enumerate(("first", "middle", "last", "exchanged")):
        folder = tmp_path / change
        shutil.copytree(original, folder)
        paths = files(folder)
        if change == "exchanged":
            one, other = paths[1].read_bytes(), paths[2].read_bytes()
            paths[1].write_bytes(other)
            paths[2].write_bytes(one)
        else:
            paths[index].unlink()
        if change == "first":
            with pytest.raises(LedgerError, match="no ledger at"):
                verify(folder)
        else:
            assert not verify(folder).ok, change


def test_the_head_noted_elsewhere_tells_a_rewritten_ledger(original, tmp_path):
    head = verify(original).head
    assert verify(original, expect=head).ok
    folder = tmp_path / "rewritten"
    shutil.copytree(original, folder)
    guard = Guard(Constraint("a", limit=1.0))
    for path in files(folder):
        path.unlink()
    with guard.record(folder / "ledger.jsonl"):
        guard.step(rollout(1))
    assert verify(folder).ok
    assert "no line has the expected hash" in verify(folder, expect=head).problem


def test_an_earlier_head_is_still_found_in_a_ledger_that_has_grown(tmp_path):
    guard = Guard(Constraint("a", limit=1.0))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(rollout(1))
    noted = verify(tmp_path).head
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(rollout(2))
    result = verify(tmp_path, expect=noted)
    assert result.ok
    assert result.head != noted
