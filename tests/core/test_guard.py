import copy
import json
import logging
import math
import pickle
import threading
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails import (
    AttachError,
    CompetenceMetric,
    ConfigurationError,
    Constraint,
    Dial,
    Gate,
    Guard,
    GuardrailsError,
    Require,
    Rollout,
    RolloutError,
    StateError,
)
from guardrails.competence import RewardLevel
from guardrails.evidence import CostEvidence, Evidence
from guardrails.ledger import read
from guardrails.schedulers import (
    PID,
    Augmented,
    AugmentedLagrangian,
    Cap,
    ConstraintScheduler,
    DualAscent,
    Fixed,
    Margin,
    RateLimit,
    Smooth,
)


def two():
    return Guard(
        Constraint("speed", limit=2.0, scheduler=DualAscent(0.5)),
        Constraint("toxicity", limit=0.1, scheduler=PID()),
    )


def rows(speed, toxicity):
    return Rollout(costs={"speed": speed, "toxicity": toxicity})


def test_each_constraint_follows_its_own_violation_in_its_own_scale():
    guard = two()
    decision = guard.step(rows([4.0, 6.0], [0.0, 0.1]))
    speed, toxicity = decision.constraints["speed"], decision.constraints["toxicity"]
    assert (speed.cost, speed.limit, speed.violation) == (5.0, 2.0, 3.0)
    assert speed.multiplier == pytest.approx(0.5 * 3.0 / 2.0)
    assert not speed.satisfied
    assert toxicity.satisfied
    assert toxicity.multiplier == 0.0
    assert guard.multipliers == decision.multipliers


def test_reasons_say_what_changed_and_why():
    guard = two()
    text = guard.step(rows([4.0], [0.05])).explain()
    assert "speed tightened: mean cost 4 is above limit 2" in text
    assert "toxicity held: mean cost 0.05 is within limit 0.1" in text
    assert "speed relaxed" in guard.step(rows([0.0], [0.05])).explain()


def test_multipliers_are_readable_before_the_first_step():
    guard = Guard(Constraint("c", limit=1.0, scheduler=DualAscent(0.1, initial=0.7)))
    assert guard.multipliers == {"c": 0.7}
    assert guard.decision is None


def test_a_step_without_rows_changes_no_multiplier_and_says_so():
    guard = two()
    guard.step(rows([4.0], [0.4]))
    before = guard.multipliers
    decision = guard.step(rows([], []))
    assert guard.multipliers == before
    assert "no rows" in decision.explain()
    assert math.isnan(decision.constraints["speed"].cost)
    assert not decision.constraints["speed"].satisfied


def test_a_missing_cost_column_leaves_every_state_as_it_was():
    guard = two()
    before = guard.state_dict()
    with pytest.raises(RolloutError, match="toxicity"):
        guard.step(Rollout(costs={"speed": [9.0]}))
    assert guard.state_dict() == before


def test_a_constraint_that_is_not_there_and_costs_that_were_not_measured_are_named():
    guard = two()
    for ask in (lambda: guard.penalty("sped", 1.0), lambda: guard.sanitised("sped")):
        with pytest.raises(ConfigurationError, match=r"no constraint 'sped'\. Constraints here: speed, toxicity"):
            ask()
    with pytest.raises(RolloutError, match="no costs of 'speed' yet"):
        guard.sanitised("speed")


def test_a_nan_cost_tightens_and_is_counted():
    guard = two()
    decision = guard.step(rows([0.0, math.nan], [0.0, 0.0]))
    assert decision.constraints["speed"].invalid_rows == 1
    assert decision.constraints["speed"].multiplier > 0.0
    assert "1 of 2 costs were not finite" in decision.explain()
    assert np.isfinite(guard.sanitised("speed")).all()


class BrokenState(NamedTuple):
    multiplier: float


class Broken(ConstraintScheduler[BrokenState]):
    state_type = BrokenState

    def __init__(self, result):
        self.result = result

    def init(self):
        return BrokenState(1.0)

    def update(self, state, violation):
        if isinstance(self.result, Exception):
            raise self.result
        return BrokenState(self.result), self.result


@pytest.mark.parametrize("result", [ValueError("boom"), math.nan, -1.0, math.inf])
def test_a_failing_scheduler_never_loosens(result, caplog):
    guard = Guard(Constraint("c", limit=1.0, scheduler=Broken(result)))
    with caplog.at_level(logging.WARNING):
        assert guard.step(Rollout(costs={"c": [0.0]})).multipliers["c"] == 1.0
        decision = guard.step(Rollout(costs={"c": [3.0]}))
    assert decision.multipliers["c"] == 3.0
    assert any(reason.verdict == "failed" for reason in decision.reasons)
    assert "Broken" in caplog.text


class Fragile(Broken):
    """Adds up violations, and raises at one above 1."""

    def __init__(self):
        pass

    def update(self, state, violation):
        if violation > 1.0:
            raise OverflowError("beyond the table")
        strength = max(0.0, state.multiplier + violation)
        return BrokenState(strength), strength


def test_a_scheduler_that_works_again_takes_back_nothing_that_was_raised_in_its_stead():
    guard = Guard(Constraint("c", limit=1.0, scheduler=Fragile()))
    costs = [4.0, 4.0, 1.5, 1.0, 0.5, 1.0]  # the sum of the violations is what a sound one would have, plus 1 at first
    found = [guard.step(Rollout(costs={"c": [cost]})).multipliers["c"] for cost in costs]
    assert found[:4] == [4.0, 7.0, 7.5, 7.5]
    assert found[4] == 7.5 - 2 * 0.5  # both fade while the cost is within its limit
    assert found[5] == found[4]
    other = Guard(Constraint("c", limit=1.0, scheduler=Fragile()))
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.penalty("c", 3.0) == guard.penalty("c", 3.0) == 2.0 * found[5]
    for cost in (4.0, 1.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        rows = Rollout(costs={"c": [cost]})
        assert other.step(rows).multipliers == guard.step(rows).multipliers
    assert "raised" in guard.state_dict()["constraints"]["c"]
    for _ in range(4):
        guard.step(Rollout(costs={"c": [0.0]}))
    assert guard.multipliers["c"] == 0.0
    assert "raised" not in guard.state_dict()["constraints"]["c"]


@pytest.mark.parametrize("raised", [-1.0, math.nan, "1", True])
def test_what_was_raised_is_read_back_only_if_it_is_a_number(raised):
    guard = Guard(Constraint("c", limit=1.0))
    state = guard.state_dict()
    state["constraints"]["c"]["raised"] = raised
    with pytest.raises(StateError, match="raised"):
        guard.load_state_dict(state)


class Begins(Broken):
    """Begins with a strength of its argument."""

    def init(self):
        return BrokenState(self.result)


@pytest.mark.parametrize("strength", [-0.5, math.nan, math.inf])
def test_a_scheduler_that_begins_with_no_multiplier_is_refused(strength):
    with pytest.raises(ConfigurationError, match=r"'c': its scheduler .* begins with a strength of"):
        Guard(Constraint("c", limit=1.0, scheduler=Begins(strength)))


class Stateless(Broken):
    """Returns a strength and no state."""

    def update(self, state, violation):
        return None, 5.0


def test_a_scheduler_that_returns_no_state_failed():
    guard = Guard(Constraint("c", limit=1.0, scheduler=Stateless(0.0)))
    decision = guard.step(Rollout(costs={"c": [3.0]}))
    assert decision.multipliers["c"] == 3.0
    assert "returned None instead of a BrokenState" in str(decision.reasons)
    guard.state_dict()
    assert guard.penalty("c", 2.0) == 3.0


@pytest.mark.parametrize(
    "wrapped",
    [lambda inner: Cap(inner, 9.0), lambda inner: RateLimit(inner, 9.0), Smooth, Margin, Augmented],
    ids=["cap", "rate_limit", "smooth", "margin", "augmented"],
)
@pytest.mark.parametrize("scheduler", [Broken(-1.0), Broken(ValueError("boom")), Stateless(0.0)])
def test_a_scheduler_that_fails_inside_another_never_loosens(scheduler, wrapped):
    guard = Guard(Constraint("c", limit=1.0, scheduler=wrapped(scheduler)))
    assert guard.step(Rollout(costs={"c": [0.0]})).multipliers["c"] == 1.0
    decision = guard.step(Rollout(costs={"c": [3.0]}))
    assert decision.multipliers["c"] == 3.0
    assert any(reason.verdict == "failed" for reason in decision.reasons)
    assert type(scheduler).__name__ in decision.explain() or "boom" in decision.explain()
    guard.load_state_dict(guard.state_dict())


def test_a_scheduler_that_fails_inside_another_says_so_for_many_too():
    capped = Cap(Broken(-1.0), 9.0)
    with pytest.raises(GuardrailsError, match=r"Broken returned strengths of array\(\[-1., -1.\]\)"):
        capped.update_many(capped.init_many(2), np.array([2.0, 0.0]))


class LeakyState(NamedTuple):
    multiplier: float
    integral: float


class Leaky(Broken):
    """Its integral is no number after a violation of 2, which its strength does not show."""

    state_type = LeakyState

    def init(self):
        return LeakyState(1.0, 1.0)

    def update(self, state, violation):
        integral = state.integral + (self.result if violation == 2.0 else violation)
        strength = max(0.0, integral)
        return LeakyState(strength, integral), strength


@pytest.mark.parametrize("wrapped", [lambda scheduler: scheduler, Smooth], ids=["by itself", "inside another"])
@pytest.mark.parametrize("result", [math.nan, -math.inf, np.float32("nan")])
def test_a_scheduler_whose_state_is_not_finite_failed(result, wrapped):
    guard = Guard(Constraint("c", limit=1.0, scheduler=wrapped(Leaky(result))))
    decision = guard.step(Rollout(costs={"c": [3.0]}))
    assert decision.multipliers["c"] == 3.0
    assert "a state whose numbers are not all finite" in decision.explain()
    guard.load_state_dict(json.loads(json.dumps(guard.state_dict(), allow_nan=False)))
    assert guard.step(Rollout(costs={"c": [3.0]})).multipliers["c"] == 5.0


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "text"), [(UnprintableError(), "cannot be shown"), (ValueError("x" * 10**6), "x" * 100)]
)
def test_an_error_of_any_message_stops_no_training_and_fills_no_ledger(error, text):
    guard = Guard(Constraint("c", limit=1.0, scheduler=Broken(error)))
    reasons = str(guard.step(Rollout(costs={"c": [3.0]})).reasons)
    assert text in reasons
    assert len(reasons) < 2000


def test_a_step_without_costs_shows_the_multiplier_that_its_penalty_dial_makes():
    gate = Gate(Require(RewardLevel(1.0), at_least=0.9), rungs=1, fall="floor")
    guard = Guard(Constraint("c", limit=1.0, scheduler=Fixed(4.0)), Dial("penalty", gate.between(1.0, 0.25)))
    for _ in range(4):
        guard.step(Rollout(rewards=np.ones(64), costs={"c": np.zeros(64)}))
    assert guard.multipliers["c"] == 1.0
    decision = guard.step(Rollout(rewards=np.zeros(64), costs={"c": None}))
    assert decision.multipliers == guard.multipliers == {"c": 4.0}
    assert "λ 1 → 4 with its penalty dial" in decision.explain()


class Meddler(CompetenceMetric):
    """Writes into what it is given."""

    name = "meddler"
    requires = frozenset({"rewards"})

    def measure(self, rollout):
        rollout.costs.pop("c")
        return [0.0] * rollout.n_rows


def test_a_metric_that_takes_costs_away_changes_nothing():
    gate = Gate(Require(Meddler(), at_least=0.9))
    guard = Guard(Constraint("c", limit=1.0, scheduler=DualAscent(1.0)), Dial("penalty", gate.between(1.0, 0.25)))
    decision = guard.step(Rollout(rewards=[1.0, 1.0], costs={"c": [3.0, 5.0]}))
    assert decision.constraints["c"].cost == 4.0
    assert guard.sanitised("c").tolist() == [3.0, 5.0]


class BrokenLater(AugmentedLagrangian):
    """Follows the first violation, then raises."""

    def advance(self, state, violation, ops):
        if state.multiplier > 0.0:
            raise ValueError("boom")
        return super().advance(state, violation, ops)


@pytest.mark.parametrize(("scheduler", "whole"), [(Broken(ValueError("boom")), 1.0), (BrokenLater(2.0), None)])
def test_the_loss_term_of_a_failing_scheduler_tightens_as_its_multiplier_does(scheduler, whole):
    guard = Guard(Constraint("c", limit=1.0, scheduler=scheduler))
    guard.step(Rollout(costs={"c": [1.5]}))  # v = 0.5: the one fails at once, the other has λ = 0.5 · 2 then
    before, slope = guard.penalty("c", 2.0), guard.penalty("c", 2.0 + 2**-20) - guard.penalty("c", 2.0)
    multiplier = guard.multipliers["c"]
    guard.step(Rollout(costs={"c": [4.0]}))  # v = 3
    assert guard.multipliers["c"] == multiplier + 3.0
    assert guard.penalty("c", 2.0) == before + 3.0
    raised = guard.penalty("c", 2.0 + 2**-20) - guard.penalty("c", 2.0)
    assert raised == pytest.approx(slope + 3.0 * 2**-20, rel=1e-9)
    if whole is not None:
        assert guard.penalty("c", 2.0) == guard.multipliers["c"]
    restored = Guard(Constraint("c", limit=1.0, scheduler=scheduler))
    restored.load_state_dict(guard.state_dict())
    assert restored.penalty("c", 2.0) == guard.penalty("c", 2.0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "guards nothing"),
        ((Constraint("a", limit=1.0), Constraint("a", limit=2.0)), "named 'a'"),
        (("cost",), "'cost'"),
    ],
)
def test_a_guard_of_nothing_of_strangers_or_of_twins_is_refused(parts, message):
    with pytest.raises(ConfigurationError, match=message):
        Guard(*parts)


def test_a_guard_serves_one_host_at_a_time():
    guard = two()
    guard.attach("PPO")
    with pytest.raises(AttachError, match="already attached to PPO"):
        guard.attach("GRPOTrainer")
    guard.detach()
    guard.attach("GRPOTrainer")
    assert guard.host == "GRPOTrainer"


costs = st.lists(st.floats(0.0, 1e4), min_size=1, max_size=5)


@given(before=st.lists(costs, max_size=6), after=st.lists(costs, max_size=6))
def test_resume_through_json_equals_an_uninterrupted_run_to_the_bit(before, after):
    straight, first, resumed = two(), two(), two()
    for batch in before:
        straight.step(rows(batch, batch))
        first.step(rows(batch, batch))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.multipliers == straight.multipliers
    for batch in after:
        straight.step(rows(batch, batch))
        resumed.step(rows(batch, batch))
    assert resumed.state_dict() == straight.state_dict()


@given(batch=st.lists(st.floats(0.0, 100.0), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_permuting_rows_changes_no_decision(batch, seed):
    shuffled = np.random.default_rng(seed).permutation(batch)
    one, other = two().step(rows(batch, batch)), two().step(rows(shuffled, shuffled))
    for name in one.constraints:  # float64 sums depend on order in the last bits only
        assert other.multipliers[name] == pytest.approx(one.multipliers[name], rel=1e-12, abs=1e-12)


def damaged(change):
    state = two().state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(schema=99), "schema 99.*Upgrade"),
        (lambda s: s.pop("schema"), "not the state of a Guard"),
        (lambda s: s.pop("constraints"), "damaged"),
        (lambda s: s.update(step=-1), "damaged"),
        (lambda s: s.update(step=True), "damaged"),
        (lambda s: s.update(schema=True), "not the state of a Guard"),
        (lambda s: s["constraints"].pop("speed"), r"not in it: \['speed'\]"),
        (lambda s: s["constraints"].update(x=s["constraints"]["speed"]), r"only in it: \['x'\]"),
        (lambda s: s["constraints"]["speed"].update(scheduler="PID"), "saved with PID, but this guard uses DualAscent"),
        (lambda s: s["constraints"]["toxicity"].update(multiplier=math.nan), "multiplier of constraint 'toxicity'"),
        (lambda s: s["constraints"]["toxicity"].update(multiplier=10**400), "multiplier of constraint 'toxicity'"),
        (lambda s: s["constraints"]["toxicity"].update(multiplier=True), "multiplier of constraint 'toxicity'"),
        (lambda s: s["constraints"]["toxicity"]["state"].pop("integral"), "PID"),
        (lambda s: s["constraints"]["toxicity"]["state"].update(integral=None), "integral"),
    ],
)
def test_a_foreign_newer_or_damaged_state_is_refused_and_nothing_of_it_is_loaded(change, message):
    guard = two()
    guard.step(rows([9.0], [0.9]))
    before = guard.state_dict()
    with pytest.raises(StateError, match=message):
        guard.load_state_dict(damaged(change))
    assert guard.state_dict() == before


def test_a_state_that_is_no_mapping_is_refused():
    with pytest.raises(StateError, match="not the state"):
        two().load_state_dict([1, 2])


def test_fixed_strength_ignores_the_cost():
    guard = Guard(Constraint("c", limit=1.0, scheduler=Fixed(0.3)))
    assert guard.step(Rollout(costs={"c": [50.0]})).multipliers == {"c": 0.3}


@pytest.mark.parametrize("rollout", [{"cost": [1.0]}, None, [1.0]])
def test_a_step_on_something_else_than_a_rollout_is_refused(rollout):
    guard = Guard(Constraint("cost", limit=1.0))
    with pytest.raises(RolloutError, match="takes a Rollout"):
        guard.step(rollout)
    assert guard.state_dict()["step"] == 0


@pytest.mark.parametrize("given", ["rows", "evidence"])
def test_another_thread_sees_a_decision_as_a_whole_or_not_at_all(tmp_path, given):
    seen, threads = [], []

    class Watched(DualAscent):
        def update(self, state, violation):
            threads.append(threading.Thread(target=lambda: seen.append(guard.state_dict())))
            threads[-1].start()
            threads[-1].join(0.05)
            return super().update(state, violation)

    guard = Guard(*(Constraint(name, limit=1.0, scheduler=Watched(0.5)) for name in "ab"))
    with guard.record(tmp_path / "ledger.jsonl"):
        if given == "rows":
            decision = guard.step(Rollout(costs={"a": [3.0], "b": [3.0]}))
        else:
            decision = guard.settle(Evidence(0, {name: CostEvidence(3.0, 0.0) for name in "ab"}))
        for thread in threads:
            thread.join()
    assert decision.multipliers == guard.multipliers == {"a": 1.0, "b": 1.0}
    assert len(seen) == 2
    assert all(state == guard.state_dict() for state in seen)
    assert [line.kind for line in read(tmp_path / "ledger.jsonl")].count("step") == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda guard: pickle.loads(pickle.dumps(guard))])
def test_a_copy_of_a_guard_goes_a_way_of_its_own(copied):
    guard = Guard(Constraint("c", limit=1.0, scheduler=DualAscent(1.0)))
    guard.step(Rollout(costs={"c": [3.0]}))
    before = json.dumps(guard.state_dict())
    twin = copied(guard)
    assert json.dumps(twin.state_dict()) == before
    assert twin.step(Rollout(costs={"c": [4.0]})).multipliers["c"] == 5.0
    assert json.dumps(guard.state_dict()) == before


def test_a_decision_on_evidence_tells_what_failed(caplog):
    class Broken(DualAscent):
        def update(self, state, violation):
            raise ZeroDivisionError

    Guard(Constraint("a", limit=1.0, scheduler=Broken())).settle(Evidence(0, {"a": CostEvidence(3.0, 0.0)}))
    assert "Broken raised ZeroDivisionError" in caplog.text
