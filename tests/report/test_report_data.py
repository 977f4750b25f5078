import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import guard, record, refinement, rollout

from guardrails import Constraint, Dial, Gate, Guard, Require, Rollout
from guardrails.errors import LedgerError
from guardrails.ledger import AlteredError, lines, read
from guardrails.report import collect, page
from guardrails.report.events import Events
from guardrails.report.traces import Traces
from guardrails.schedulers import CRPO
from guardrails.watch import Watch


def decisions(run):
    return [line.decision for line in read(run) if line.kind == "step"]


def test_every_number_is_the_ledgers_to_the_bit(run):
    view, steps = collect(run), decisions(run)
    assert view.first == view.last == [each.step for each in steps]
    assert view.rows == sum(each.n_rows for each in steps)
    for part in view.constraints:
        facts = [each.constraints[part.name] for each in steps]
        assert part.cost.mean == [each.cost for each in facts]
        assert part.limit.mean == [each.limit for each in facts]
        assert part.multiplier.mean == [each.multiplier for each in facts]
        assert part.violated == [int(each.violation > 0) for each in facts]
        assert part.cost.low == part.cost.high == []
    (gate,) = view.gates
    assert gate.level.mean == [each.gates["gate"].level for each in steps]
    for index, required in enumerate(gate.requirements):
        recorded = [each.gates["gate"].requirements[index] for each in steps]
        assert required.mean.mean == [each.mean for each in recorded]
        assert required.lower.mean == [each.lower for each in recorded]
        assert required.upper.mean == [each.upper for each in recorded]
    assert view.dials[0].value.mean == [each.dials["beta"] for each in steps]


def test_the_band_holds_the_true_mean_in_95_of_100_steps(tmp_path):
    rng, guarded = np.random.default_rng(0), Guard(Constraint("cost", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        for _ in range(1000):
            guarded.step(Rollout(costs={"cost": rng.normal(3.0, 2.0, 200)}))
    (part,) = collect(tmp_path, verified=False).constraints
    held = np.mean([low <= 3.0 <= high for low, high in zip(part.lower, part.upper, strict=True)])
    # The standard error of a share of 0.95 over 1000 steps is 0.007; four of them to either side.
    assert 0.922 < held < 0.978


def test_figures_are_those_of_all_steps(run):
    view, steps = collect(run), decisions(run)
    for part in view.constraints:
        facts = [each.constraints[part.name] for each in steps]
        quarter = facts[60:]
        assert part.figures.measured == 80
        assert part.figures.violated == sum(each.violation > 0 for each in facts)
        assert part.figures.worst == max(each.violation for each in facts)
        assert part.figures.quarter == 61
        assert part.figures.quarter_cost == pytest.approx(np.mean([each.cost for each in quarter]), rel=1e-12)
        assert part.figures.last_multiplier == facts[-1].multiplier
        assert part.figures.last_limit == facts[-1].limit
    assert [part.sense for part in view.constraints] == ["<=", ">="]


def test_the_figures_at_the_end_of_a_long_run_are_those_of_its_last_step_not_of_its_last_point(tmp_path):
    gate = Gate(Require("reward_level", at_least=0.5), rungs=4, dwell=0)
    swinging = Constraint("swinging", limit=gate.between(1.0, 2.0), scheduler=CRPO())
    guarded = Guard(swinging, Constraint("rare", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        for step in range(1, 41):
            costs = {"swinging": [2.5 - step % 2 * 2.0] * 64, "rare": [float(step)] * 64 if step < 39 else None}
            guarded.step(Rollout(rewards=[float(step < 40)] * 64, costs=costs))
    view, last, before = collect(tmp_path, verified=False, points=16), *reversed(decisions(tmp_path)[-2:])
    assert (view.first[-1], view.last[-1]) == (37, 40)
    figures, rare = (part.figures for part in view.constraints)
    assert figures.last_multiplier == last.multipliers["swinging"] == 1e6
    assert figures.last_limit == last.constraints["swinging"].limit < before.constraints["swinging"].limit
    assert figures.last_cost == 2.5
    assert rare.last_cost == 38.0
    assert view.gates[0].last_level == last.gates["gate"].level < before.gates["gate"].level
    assert view.constraints[0].multiplier.mean[-1] == 5e5


@pytest.mark.parametrize("points", [1000, 8])
def test_costs_whose_sum_is_beyond_a_float_have_a_mean(tmp_path, points):
    guarded = Guard(Constraint("cost", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        for step in range(40):
            guarded.step(Rollout(costs={"cost": [0.5 if step < 16 else 1.7e308]}))
    (part,) = collect(tmp_path, points=points).constraints
    assert part.figures.quarter_cost == part.cost.mean[-1] == 1.7e308
    assert part.figures.quarter_limit == 1.0


def test_climbs_and_falls_are_told_with_the_reason_recorded(run):
    told = [(each.step, each.kind, each.text) for each in collect(run).events if each.subject == "gate"]
    kinds = {"relaxed": "climb", "tightened": "fall"}
    gates = [(each.step, each.gates["gate"]) for each in decisions(run)]
    assert told == [(step, kinds[gate.verdict], gate.text) for step, gate in gates if gate.verdict in kinds]
    assert {kind for _, kind, _ in told} == {"climb", "fall"}


def test_a_long_run_is_held_in_a_bounded_page_that_hides_no_extreme(tmp_path):
    guarded, peak = Guard(Constraint("cost", limit=0.5)), 3217
    with guarded.record(tmp_path / "ledger.jsonl"):
        for step in range(1, 5001):
            guarded.step(Rollout(costs={"cost": [9.0 if step == peak else 0.25 + step % 2 / 8]}))
    view = collect(tmp_path, verified=False, points=100)
    (part,) = view.constraints
    assert 50 <= len(view.first) <= 100
    assert view.stride == 64
    assert (view.first[0], view.last[-1]) == (1, 5000)
    assert view.first[1:] == [last + 1 for last in view.last[:-1]]
    assert view.steps == 5000
    assert max(part.cost.high) == 9.0
    place = part.cost.high.index(9.0)
    assert view.first[place] <= peak <= view.last[place]
    assert part.violated[place] == sum(part.violated) == 1
    assert part.reason_steps[place] == peak
    assert "9" in part.reasons[place]
    assert min(part.cost.low) == 0.25
    # 1000 points, the default, of the 5 traces of this constraint: what no run's length exceeds.
    assert len(page([collect(tmp_path, verified=False)])) < 400_000


def test_what_stands_still_through_a_long_run_is_drawn_where_it_stands(tmp_path):
    gate = Gate(Require("reward_level", at_least=0.5), rungs=4, dwell=0)
    guarded = Guard(Dial("beta", gate.between(0.1, 0.01)))
    with guarded.record(tmp_path / "ledger.jsonl"):
        for _ in range(300):
            guarded.step(Rollout(rewards=[0.0] * 4))
    view = collect(tmp_path, verified=False, points=20)
    assert view.stride == 16
    assert set(view.dials[0].value.mean) == {0.1}


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=200),
    st.integers(2, 9),
    st.integers(0, 200),
)
def test_points_hold_each_step_once_whatever_the_length(values, points, back):
    traces = Traces(points)
    for step, value in enumerate(values, start=1):
        traces.add(step, {("x",): value}, {"x": (0.0 if math.isnan(value) else value, str(step))})
    assert len(traces) <= points
    assert [point.first for point in traces] == list(range(1, len(values) + 1, traces.stride))
    for point in traces:
        inside = values[point.first - 1 : point.last]
        finite = [value for value in inside if math.isfinite(value)]
        cell = point.cells.get(("x",))
        assert (cell is not None) == bool(finite)
        if cell:
            assert (cell.low, cell.high, cell.count) == (min(finite), max(finite), len(finite))
            # Sums of the same numbers in another order.
            assert cell.total == pytest.approx(math.fsum(finite), rel=1e-9, abs=1e-6)
            assert cell.low <= cell.mean <= cell.high
        assert point.remarks["x"][0] == max(0.0 if math.isnan(value) else value for value in inside)
    traces.cut(back)
    assert all(point.first <= back for point in traces)
    traces.add(back + 1, {("x",): 1.0}, {})
    assert list(traces)[-1].last == back + 1


def test_steps_that_a_resume_gave_up_are_not_shown_and_said(tmp_path):
    rng, first = np.random.default_rng(0), guard()
    with first.record(tmp_path / "ledger.jsonl"):
        for step in range(1, 21):
            first.step(rollout(step, rng))
            if step == 12:
                saved = json.loads(json.dumps(first.state_dict()))
    second = guard()
    second.load_state_dict(saved)
    with second.record(tmp_path / "ledger.jsonl"):
        for step in range(13, 16):
            second.step(rollout(step, rng))
    view = collect(tmp_path)
    assert view.last == list(range(1, 16))
    assert view.constraints[0].cost.mean[-1] == second.decision.constraints["toxicity"].cost
    (resumed,) = [each for each in view.events if each.kind == "resumed"]
    assert resumed.step == 12
    assert "steps 13 to 20 were given up" in resumed.text
    assert all(each.step <= 15 for each in view.events)
    assert view.verification["ok"]


def test_steps_are_said_to_be_given_up_once_however_often_the_run_is_restarted_from_there(tmp_path):
    def resumed(state, costs):
        guarded = Guard(Constraint("cost", limit=1.0))
        guarded.load_state_dict(state)
        with guarded.record(tmp_path / "ledger.jsonl"):
            for cost in costs:
                guarded.step(Rollout(costs={"cost": [cost]}))
        return guarded.state_dict()

    fifth = resumed(Guard(Constraint("cost", limit=1.0)).state_dict(), [2.0] * 5)
    resumed(fifth, [2.0] * 5)
    resumed(fifth, [])
    resumed(fifth, [])
    resumed(fifth, [0.5] * 2)
    resumed(fifth, [])
    resumed(fifth, [0.5])
    view = collect(tmp_path)
    assert view.verification["ok"]
    assert view.last == [1, 2, 3, 4, 5, 6]
    assert [event.text.partition(" were given up")[0] for event in view.events] == [
        "went on after step 5",
        "went on after step 5; steps 6 to 10",
        "went on after step 5",
        "went on after step 5",
        "went on after step 5; steps 6 to 7",
        "went on after step 5",
    ]


def test_a_checkpoint_older_than_where_the_record_begins_gives_up_nothing_that_was_recorded(tmp_path):
    guarded = Guard(Constraint("cost", limit=1.0))
    states = [guarded.state_dict() for _ in range(4) if guarded.step(Rollout(costs={"cost": [2.0]}))]
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.load_state_dict(states[1])
        guarded.step(Rollout(costs={"cost": [2.0]}))
    view = collect(tmp_path)
    assert view.verification["ok"]
    assert [event.text for event in view.events] == ["went on after step 2"]
    assert view.first == [3]


def test_what_was_altered_ends_the_reading_and_is_told(run, tmp_path):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    lines[41] = lines[41].replace(b'"n_rows":32', b'"n_rows":31', 1)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines))
    view = collect(tmp_path)
    assert "line 42 is damaged or was altered" in view.problem
    assert view.last[-1] == 39  # the header and the refiner's note are lines too
    assert view.closed is False
    assert view.verification["problem"] == view.problem


@pytest.mark.parametrize("step", [None, "many", [1]])
def test_a_state_without_a_step_is_a_finding_not_a_crash(tmp_path, step):
    for _ in range(2):
        record(tmp_path, 3)
    head, out = lines.START, []
    for line in list(read(tmp_path)):
        data = {name: value for name, value in line.data.items() if name not in ("prev", "hash")}
        if "state" in data:
            data["state"] = {**data["state"], "step": step}
        raw, head = lines.seal(lines.encode(data), head)
        out.append(raw)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(out))
    assert "'step' or 'constraints' is missing or not valid" in collect(tmp_path).verification["unreplayed"]


@pytest.mark.parametrize("time", [-1, 1 << 62, "soon"])
def test_a_time_that_no_calendar_has_is_passed_over(tmp_path, time):
    record(tmp_path, 3)
    head, out, (first, *rest) = lines.START, [], list(read(tmp_path))
    for line in (first._replace(data={**first.data, "time": time}), *rest):
        data = {name: value for name, value in line.data.items() if name not in ("prev", "hash")}
        raw, head = lines.seal(lines.encode(data), head)
        out.append(raw)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(out))
    assert collect(tmp_path).started == rest[0].data["time"]


@pytest.mark.parametrize("written", [None, [1]])
def test_a_step_whose_hash_is_right_and_whose_content_is_not_ends_the_reading(tmp_path, written):
    record(tmp_path, 3)
    head, out = lines.START, []
    for line in list(read(tmp_path)):
        data = {name: value for name, value in line.data.items() if name not in ("prev", "hash")}
        if data.get("step") == 3 and line.kind == "step":
            data["evidence"] = {**data["evidence"], "n_rows": written}
            data["decision"] = {**data["decision"], "reasons": [["toxicity", "relaxed", written]]}
        raw, head = lines.seal(lines.encode(data), head)
        out.append(raw)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(out))
    view = collect(tmp_path, verified=False)
    assert view.problem.startswith("ledger.jsonl, line 4: the step is malformed (TypeError")
    assert view.last == [1, 2]
    watch = Watch(tmp_path)
    watch.poll()
    with pytest.raises(AlteredError, match=r"ledger\.jsonl, line 4: the step is malformed"):
        watch.frame()


def test_a_rotated_ledger_is_read_whole(tmp_path):
    record(tmp_path, 150, max_bytes=20_000)
    assert len(list(tmp_path.glob("ledger*.jsonl"))) == 3
    assert collect(tmp_path).last == list(range(1, 151))


def test_no_ledger_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(LedgerError, match="no ledger at"):
        collect(tmp_path)
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(LedgerError, match="no complete line"):
        collect(tmp_path)


def test_a_step_without_rows_leaves_a_gap(tmp_path):
    guarded = Guard(Constraint("cost", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.step(Rollout(costs={"cost": [2.0, 4.0]}))
        guarded.step(Rollout(costs={"cost": []}))
        guarded.step(Rollout(costs={"cost": [0.5]}))
    (part,) = collect(tmp_path).constraints
    assert part.cost.mean == [3.0, None, 0.5]
    assert part.lower[1] is part.upper[1] is None
    assert (part.figures.measured, part.figures.violated) == (2, 1)


def test_what_fails_at_every_step_is_one_event(tmp_path):
    rng = np.random.default_rng(0)
    made = guard()
    with made.record(tmp_path / "ledger.jsonl"):
        for step in range(1, 41):
            rows = rollout(step, rng)
            if 11 <= step <= 30:
                rows.infos[0].pop("polite")
            made.step(rows)
    (failed,) = [each for each in collect(tmp_path).events if each.kind == "failed"]
    assert (failed.step, failed.last, failed.times, failed.subject) == (11, 30, 20, "politeness")
    assert "KeyError" in failed.text


def test_events_without_end_keep_the_beginning_and_the_end():
    events = Events(kept=3)
    for step in range(1, 11):
        events.add(step, "climb", "gate", f"step {step}")
    assert [each.step for each in events.listed()] == [1, 2, 3, 8, 9, 10]
    assert events.left_out == 4


def test_refinements_are_counted_and_examples_kept(tmp_path):
    made = guard()
    with made.record(tmp_path / "ledger.jsonl") as ledger:
        made.step(rollout(1, np.random.default_rng(0)))
        for step in range(30):
            ledger.note("refinement", refinement(step, before=f"text {step}"))
        for malformed in (None, 7, [], {"rows": "many", "examples": 3}, {"examples": [None, {"before": ["x"]}]}):
            ledger.note("refinement", malformed)
        ledger.note("something else", {"rows": 99})
    refined = collect(tmp_path).refinement
    assert (refined.rows, refined.refined, refined.accepted) == (30 * 32, 30 * 5, 30 * 4)
    assert len(refined.examples) == 12
    assert refined.examples[0].before == "text 0"
    assert refined.examples[-2].before == "text 29"
    assert refined.examples[0].after == "the cat sat down"


def test_a_run_without_a_refiner_has_none(tmp_path):
    guarded = Guard(Constraint("cost", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.step(Rollout(costs={"cost": [2.0]}))
    assert collect(tmp_path).refinement is None
