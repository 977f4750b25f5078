import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_guards import guards, rollout

from guardrails import Constraint, Decision, Guard, LedgerError, Rollout
from guardrails.evidence import CostEvidence, Evidence
from guardrails.ledger import AlteredError, lines, read, verify
from guardrails.ledger.lines import (
    decision_data,
    decision_from,
    encode,
    encode_step,
    evidence_data,
    evidence_from,
    seal,
)
from guardrails.schedulers import DualAscent
from guardrails.watch import Watch

numbers = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308])


@given(guards(), st.lists(st.integers(0, 10_000), min_size=1, max_size=25))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_decision_of_a_random_guard_follows_again_from_its_line_to_the_bit(tmp_path_factory, guard, seeds):
    folder = tmp_path_factory.mktemp("run")
    with guard.record(folder / "ledger.jsonl"):
        decisions = [guard.step(rollout(seed)) for seed in seeds]
    result = verify(folder)
    assert result.ok, result
    assert result.steps == len(seeds)
    recorded = [line.decision for line in read(folder) if line.kind == "step"]
    assert list(map(same_bits, recorded)) == list(map(same_bits, decisions))


def same_bits(decision):
    return repr(decision)  # tells -0.0 from 0.0, and nan equals nan


@given(guards(), st.lists(st.integers(0, 10_000), min_size=2, max_size=12), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_step_is_reduce_then_decide_and_reduce_changes_nothing(guard, seeds, data):
    for seed in seeds:
        before = guard.state_dict()
        evidence = guard.reduce(rollout(seed))
        assert guard.state_dict() == before
        again = Guard(*guard.parts)
        again.load_state_dict(before)
        assert same_bits(again.step(rollout(seed))) == same_bits(guard.decide(evidence))
        assert json.dumps(again.state_dict()) == json.dumps(guard.state_dict())


@pytest.mark.parametrize("number", [int, np.float32, np.float64, np.int64])
def test_evidence_made_by_hand_of_other_numbers_than_floats_replays(tmp_path, number):
    guard = Guard(Constraint("speed", limit=1.0, scheduler=DualAscent(0.5)))
    with guard.record(tmp_path / "ledger.jsonl"):
        for invalid in (0, 1):
            guard.settle(Evidence(2, {"speed": CostEvidence(number(3), number(0), invalid, number(4))}))
    assert verify(tmp_path).ok, verify(tmp_path)
    assert guard.multipliers["speed"] > 1.0


@given(numbers)
@settings(max_examples=500)
def test_numbers_come_back_to_the_bit(value):
    coded = lines.decode(encode({"x": value}))["x"]
    assert repr(float(coded)) == repr(value)


@given(guards(), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_evidence_and_decisions_come_back_from_their_lines(guard, seed):
    evidence = guard.reduce(rollout(seed))
    decision = guard.decide(evidence)
    assert repr(evidence_from(lines.decode(encode_step(evidence_data(evidence))))) == repr(evidence)
    assert repr(decision_from(lines.decode(encode_step(decision_data(decision))))) == repr(decision)
    assert isinstance(decision, Decision)


def test_a_text_that_is_no_utf8_and_a_number_beyond_64_bits_are_spelled():
    assert lines.decode(encode_step({"x": "\udcff"})) == {"x": "\\udcff"}
    assert lines.decode(encode({"seed": 1 << 80, "x": [(math.nan, True, None)]})) == {
        "seed": str(1 << 80),
        "x": [["NaN", True, None]],
    }


def record(folder, *costs):
    guard = Guard(Constraint("c", limit=1.0, scheduler=DualAscent(0.5)))
    with guard.record(folder / "ledger.jsonl", seed=7):
        for cost in costs:
            guard.step(Rollout(costs={"c": [cost, cost]}))
    return folder / "ledger.jsonl"


def rechained(path, change):
    """Apply ``change`` to each line's data and write a ledger whose chain is right again."""
    head, out = lines.START, []
    for line in list(read(path)):
        data = change(line.kind, dict(line.data))
        body = encode({name: value for name, value in data.items() if name not in ("prev", "hash")})
        raw, head = seal(body, head)
        out.append(raw)
    path.write_bytes(b"".join(out))


def test_a_changed_multiplier_in_a_rewritten_chain_is_shown_with_both_values(tmp_path):
    path = record(tmp_path, 2.0, 3.0, 0.5)

    def change(kind, data):
        if data.get("step") == 2 and kind == "step":
            data["decision"]["constraints"]["c"]["multiplier"] = 0.25
        return data

    rechained(path, change)
    result = verify(tmp_path)
    assert result.problem == (
        "ledger.jsonl, line 3, step 2: decision.constraints.c.multiplier was recorded as 0.25, but follows from the "
        "evidence as 1.5."
    )
    assert result.lines == 3
    assert not result.ok


KEPT = []


class Thing:
    """An object whose text says where in memory it lies; none is let go, so that no two lie at one place."""

    def __init__(self):
        KEPT.append(self)

    def __float__(self):
        return math.nan


class Failing(DualAscent):
    """Fails in one of the ways that a plug-in may."""

    def __init__(self, way="raises"):
        super().__init__(0.5)
        self.way = way

    def update(self, state, violation):
        after, _ = super().update(state, violation)
        if self.way == "raises":
            raise ValueError(f"{Thing()} and {Thing()} {'are of no use ' * 50}")
        return ([Thing(), *range(100)], 1.0) if self.way == "no state" else (after, Thing())


@pytest.mark.parametrize("way", ["raises", "no state", "no strength"])
def test_a_failure_that_tells_of_an_object_in_memory_is_the_same_when_it_is_replayed(tmp_path, way):
    guard = Guard(Constraint("c", limit=1.0, scheduler=Failing(way)))
    with guard.record(tmp_path / "ledger.jsonl"):
        decision = guard.step(Rollout(costs={"c": [3.0]}))
    assert f"<{__name__}.Thing object>" in decision.reasons[0].text
    assert decision.reasons[0].verdict == "failed"
    assert verify(tmp_path, allow_imports=True).ok


LEAVES = [
    ("step",),
    ("evidence", "n_rows"),
    ("evidence", "costs", "c", "mean"),
    ("decision", "step"),
    ("decision", "n_rows"),
    ("decision", "constraints", "c", "cost"),
    ("decision", "constraints", "c", "limit"),
    ("decision", "constraints", "c", "violation"),
    ("decision", "constraints", "c", "multiplier"),
    ("decision", "constraints", "c", "invalid_rows"),
]


@pytest.mark.parametrize("leaf", LEAVES, ids=".".join)
def test_any_value_that_decides_or_was_decided_is_missed_when_changed_even_in_a_right_chain(tmp_path, leaf):
    path = record(tmp_path, 2.0, 3.0, 0.5)

    def change(kind, data):
        if kind == "step" and data["step"] == 2:
            *way, last = leaf
            at = data
            for name in way:
                at = at[name]
            at[last] += 1
        return data

    rechained(path, lambda kind, data: data)
    assert verify(tmp_path).ok, "a rewritten but unchanged ledger is sound, or this test shows nothing"
    rechained(path, change)
    assert "step 2" in verify(tmp_path).problem


def test_a_step_taken_out_of_a_rewritten_chain_is_found(tmp_path):
    path = record(tmp_path, 2.0, 3.0, 0.5)
    kept = [line for line in list(read(path)) if line.data.get("step") != 2]
    head, out = lines.START, []
    for line in kept:
        raw, head = seal(encode({k: v for k, v in line.data.items() if k not in ("prev", "hash")}), head)
        out.append(raw)
    path.write_bytes(b"".join(out))
    assert "decision.step was recorded as 3, but follows from the evidence as 2" in verify(tmp_path).problem


@pytest.mark.parametrize(
    "evidence",
    [None, {}, {"n_rows": 2, "costs": {}, "gates": {}}, {"n_rows": "x", "costs": {"c": {"mean": "a"}}, "gates": {}}, 3],
)
def test_evidence_that_is_none_is_a_finding_not_a_crash(tmp_path, evidence):
    path = record(tmp_path, 2.0)
    rechained(path, lambda kind, data: data | ({"evidence": evidence} if kind == "step" else {}))
    assert verify(tmp_path).problem


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("end", {"step": 9}, "line 3: it is numbered step 9, but is of step 1"),
        ("end", {"lost": "many"}, "line 3: it counts 'many' lost steps"),
        ("end", {"lost": -1}, "line 3: it counts -1 lost steps"),
        ("header", {"environment": ["numpy"], "seed": []}, ""),
    ],
)
def test_the_frame_of_a_rewritten_chain_is_checked_and_never_a_crash(tmp_path, kind, fields, problem):
    path = record(tmp_path, 2.0)
    rechained(path, lambda each, data: data | (fields if each == kind else {}))
    assert problem in verify(tmp_path).problem
    rechained(path, lambda each, data: data | (fields if each == kind else {"decision": {}} if each == "step" else {}))
    assert "line 2" in verify(tmp_path).problem


def test_a_run_that_goes_on_with_another_configuration_says_so(tmp_path):
    record(tmp_path, 2.0, 2.0)
    first = Guard(Constraint("c", limit=1.0))
    for limit in (1.0, 100.0, 100.0, 1.0):
        guard = Guard(Constraint("c", limit=limit))
        guard.load_state_dict(first.state_dict())
        with guard.record(tmp_path / "ledger.jsonl"):
            guard.step(Rollout(costs={"c": [2.0]}))
    found = verify(tmp_path)
    assert found.ok
    told = [note.split(":")[0] for note in found.notes if "configuration is another" in note]
    seams = [f"ledger.jsonl, line {line.number}" for line in read(tmp_path) if line.kind == "seam"]
    assert told == [seams[0], seams[1], seams[3]]  # the record's own guard has another scheduler


@pytest.mark.parametrize(("step", "counted", "problem"), [(2, 2, ""), (2, 0, "counts none"), (900, 0, "counts none")])
def test_a_seam_behind_lost_steps_has_to_count_them(tmp_path, step, counted, problem):
    path = record(tmp_path, 2.0, 2.0)
    header, *_, last, _ = read(path)
    start = {key: value for key, value in header.data.items() if key not in ("kind", "time", "prev", "hash")}
    start["state"] = start["state"] | {"step": last.data["step"] + step}
    end = {"kind": "end", "time": 0, "step": last.data["step"] + step, "lost": counted}
    seam = {"kind": "seam", "time": 0, "reason": "lost", "lost": counted, **start}
    kept = path.read_bytes().splitlines(keepends=True)[:-1]
    head = last.hash
    for each in (seam, end):
        raw, head = seal(encode(each), head)
        kept.append(raw)
    path.write_bytes(b"".join(kept))
    found = verify(tmp_path)
    assert problem in found.problem
    assert found.ok is not bool(problem)
    if not problem:
        assert found.lost == counted


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that is there and cannot be read")
def test_a_ledger_that_cannot_be_read_is_no_altered_one():
    for ask in (verify, lambda run: list(read(run))):
        with pytest.raises(LedgerError, match="/proc/self/mem cannot be read") as caught:
            ask("/proc/self/mem")
        assert not isinstance(caught.value, AlteredError)


@pytest.mark.parametrize("decision", [None, 3, {"reasons": [1]}, {"reasons": [["c", "failed", "x"]], "gates": 1}])
def test_a_decision_that_is_none_ends_a_watch_in_words(tmp_path, decision):
    path = record(tmp_path, 2.0)
    rechained(path, lambda kind, data: data | ({"decision": decision} if kind == "step" else {}))
    with pytest.raises(AlteredError, match="line 2: its decision is malformed"):
        Watch(tmp_path).poll()


def forged(data):
    """Return the body of a step whose decision is another, and what was decided, for bytes after it."""
    real, fake = encode(data["decision"]), json.loads(json.dumps(data["decision"]))
    fake["constraints"]["c"]["multiplier"] = 0.0
    return {**data, "decision": fake}, real


def under_another_name(data):
    fake, real = forged(data)
    return encode(fake)[:-1] + b',"x\\"decision":' + real + b"}"


def twice(data):
    fake, real = forged(data)
    return encode(fake)[:-1] + b',"decision":' + real + b"}"


def twice_and_first(data):
    fake, real = forged(data)
    return encode(fake).replace(b'"evidence":', b'"decision":' + real + b',"evidence":')


def within_it(data):
    fake, real = forged(data)
    return encode(fake)[:-2] + b',"decision":' + real + b"}}"


def with_a_field_besides(data):
    return encode({**{name: data[name] for name in ("kind", "time", "step", "evidence")}, "why": "", **data})


def in_another_order(data):
    return encode({name: data[name] for name in ("kind", "time", "evidence", "step", "decision")})


def spelled_otherwise(data):
    return encode(data).replace(b'"decision"', b'"d\\u0065cision"')


def with_spaces(data):
    return encode(data).replace(b',"decision":', b' ,"decision":')


def with_more_evidence(data):
    return encode({**data, "evidence": {**data["evidence"], "note": "nobody measured this"}})


def with_another_number(data):
    return encode(data).replace(b'"spread":0.0', b'"spread":0.00')


FORGERIES = [
    under_another_name,
    twice,
    twice_and_first,
    within_it,
    with_a_field_besides,
    in_another_order,
    spelled_otherwise,
    with_spaces,
    with_more_evidence,
    with_another_number,
]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_a_step_that_readers_could_take_for_another_is_found_even_in_a_right_chain(tmp_path, forge):
    path = record(tmp_path, 2.0, 3.0, 0.5)
    head, out = lines.START, []
    for line in list(read(path)):
        data = {name: value for name, value in line.data.items() if name not in ("prev", "hash")}
        raw, head = seal(forge(data) if line.kind == "step" else encode(data), head)
        out.append(raw)
    path.write_bytes(b"".join(out))
    found = verify(tmp_path)
    assert not found.ok
    assert "line 2" in found.problem


@pytest.mark.parametrize(
    ("kind", "field"), [("header", b'"policy":{},'), ("end", b'"step":9,'), ("note", b'"data":1,')]
)
def test_a_field_that_stands_twice_is_found_in_any_line(tmp_path, kind, field):
    guard = Guard(Constraint("c", limit=1.0))
    with guard.record(tmp_path / "ledger.jsonl") as ledger:
        guard.step(Rollout(costs={"c": [2.0]}))
        ledger.note("a note", 2)
    head, out = lines.START, []
    for line in list(read(tmp_path)):
        body = encode({name: value for name, value in line.data.items() if name not in ("prev", "hash")})
        name = field[: field.index(b":") + 1]
        raw, head = seal(body.replace(name, field + name, 1) if line.kind == kind else body, head)
        out.append(raw)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(out))
    assert "a field stands in it twice" in verify(tmp_path).problem
