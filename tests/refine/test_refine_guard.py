"""Refinement as a part of a guard: weights that stand, move with competence, or follow a cost."""

import json

import numpy as np
import pytest

from guardrails import (
    AttachError,
    ConfigurationError,
    Constraint,
    Dial,
    Gate,
    Guard,
    PluginError,
    Refinement,
    Require,
    Rollout,
    RolloutError,
    StateError,
    plugins,
)
from guardrails.competence import RewardLevel
from guardrails.ledger import read, verify
from guardrails.refine import Acceptance, Degenerate, FunctionRefiner, Repetition
from guardrails.refinement import DEFAULT_WEIGHT
from guardrails.report import collect
from guardrails.schedulers import DualAscent


def strip(prompt, completion):
    return completion.strip()


def refinement(weight=0.5, **settings):
    return Refinement(FunctionRefiner(strip), weight, **settings)


def trust():
    return Gate(Require(RewardLevel(), at_least=0.5), confidence=0.5, rungs=2, name="trust")


def shared_gate():
    gate = trust()
    return Guard(refinement(gate.between(2.0, 1.0)), Dial("beta", gate.between(0.1, 0.01)))


def held(**settings):
    return refinement(Constraint("degenerate", limit=0.1, scheduler=DualAscent(0.5), cost=Degenerate()), **settings)


def test_a_weight_is_in_force_from_the_start():
    guard = Guard(refinement(0.5))
    assert guard.refinement_weight == 0.5
    decision = guard.step(Rollout(rewards=[1.0]))
    assert guard.refinement_weight == 0.5
    assert decision.metrics() == {"refinement/weight": 0.5}
    assert Guard(Refinement(FunctionRefiner(strip))).refinement_weight == DEFAULT_WEIGHT
    assert Guard(Constraint("c", limit=1.0)).refinement_weight == 0.0
    assert Guard(Constraint("c", limit=1.0)).refinement is None


def test_a_weight_between_two_ends_moves_with_competence_as_a_dial_of_its_own():
    guard = Guard(refinement(trust().between(2.0, 1.0), name="cure"))
    assert guard.refinement_weight == 2.0
    assert guard.steering == {"cure_weight"}
    weights = [guard.refinement_weight]
    for _ in range(40):
        decision = guard.step(Rollout(rewards=np.ones(64)))
        weights.append(decision.weights["cure"])
        assert decision.dials["cure_weight"] == decision.weights["cure"] == guard.refinement_weight
        assert decision.metrics()["cure/weight"] == guard.refinement_weight
    assert sorted(set(weights)) == [1.0, 1.5, 2.0]
    for _ in range(40):
        guard.step(Rollout(rewards=np.zeros(64)))
    assert guard.refinement_weight == 2.0


def test_the_multiplier_of_a_constraint_is_the_weight():
    guard = Guard(Constraint("toxicity", limit=0.1), held())
    assert [part.name for part in guard.constraints] == ["toxicity", "degenerate"]
    assert guard.steering == {"degenerate"}
    assert guard.refinement_weight == 0.0
    decision = guard.step(Rollout(costs={"toxicity": [0.0, 0.0], "degenerate": [0.0, 1.0]}))
    assert decision.weights == {"refinement": decision.multipliers["degenerate"]}
    assert guard.refinement_weight == pytest.approx(0.5 * (0.5 - 0.1) / 0.1)
    guard.step(Rollout(costs={"toxicity": [0.0, 0.0], "degenerate": [0.0, 0.0]}))
    assert guard.refinement_weight == pytest.approx(1.5)


def test_a_constraint_without_a_cost_holds_the_edit_ratio():
    guard = Guard(refinement(Constraint("edits", limit=0.2, scheduler=DualAscent(1.0))))
    decision = guard.step(Rollout(edit_ratio=[0.0, 0.6]))
    assert decision.constraints["edits"].cost == pytest.approx(0.3)
    assert guard.sanitised("edits").tolist() == [0.0, 0.6]
    own = guard.step(Rollout(edit_ratio=[0.0, 0.6], costs={"edits": [0.2, 0.2]}))
    assert own.constraints["edits"].cost == pytest.approx(0.2)
    with pytest.raises(RolloutError, match="no cost column 'edits'"):
        guard.step(Rollout(rewards=[1.0]))


def test_only_what_steers_the_refinement_reads_the_edit_ratio():
    guard = Guard(Constraint("speed", limit=1.0), refinement())
    with pytest.raises(RolloutError, match="no cost column 'speed'"):
        guard.step(Rollout(edit_ratio=[0.5]))


def test_an_edit_ratio_that_could_not_be_measured_is_a_violation():
    guard = Guard(refinement(Constraint("edits", limit=0.2, scheduler=DualAscent(1.0))))
    decision = guard.step(Rollout(edit_ratio=[0.0, float("nan")]))
    assert decision.constraints["edits"].invalid_rows == 1
    assert guard.refinement_weight > 0.0


def test_the_penalty_dial_turns_multipliers_and_so_a_weight_that_is_one():
    gate = trust()
    guard = Guard(held(), Dial("penalty", gate.between(1.0, 0.5)))
    fixed = Guard(refinement(0.5), Dial("penalty", trust().between(1.0, 0.5)))
    for _ in range(40):
        decision = guard.step(Rollout(rewards=np.ones(64), costs={"degenerate": [0.15] * 64}))
        fixed.step(Rollout(rewards=np.ones(64)))
    assert decision.dials["penalty"] == 0.5
    assert guard.refinement_weight == decision.multipliers["degenerate"] == pytest.approx(0.5 * 40 * 0.5 * 0.5)
    assert fixed.refinement_weight == 0.5


@pytest.mark.parametrize("make", [held, lambda: refinement(trust().between(2.0, 1.0))])
def test_a_saved_guard_goes_on_as_if_it_had_not_stopped(make):
    rollouts = [Rollout(rewards=np.ones(64), costs={"degenerate": [0.15] * 64}) for _ in range(12)]
    whole, first, second = Guard(make()), Guard(make()), Guard(make())
    for rollout in rollouts[:6]:
        whole.step(rollout)
        first.step(rollout)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.refinement_weight == whole.refinement_weight
    for rollout in rollouts[6:]:
        assert repr(second.step(rollout)) == repr(whole.step(rollout))
    with pytest.raises(StateError, match=r"another guard|has gates"):
        Guard(refinement()).load_state_dict(first.state_dict())


@pytest.mark.parametrize("make", [refinement, held, lambda: refinement(trust().between(2.0, 1.0))])
def test_a_recorded_run_replays_and_says_what_refined(tmp_path, make):
    guard = Guard(make(), Constraint("toxicity", limit=0.1))
    with guard.record(tmp_path / "ledger.jsonl") as ledger:
        for step in range(6):
            rows = {"degenerate": [0.3] * 64, "toxicity": [0.05 * step] * 64}
            decision = guard.step(Rollout(rewards=np.ones(64), costs=rows))
            assert decision.weights == {"refinement": guard.refinement_weight}
        ledger.note("refinement", {"step": 6, "rows": 64, "refined": 5, "accepted": 4})
    result = verify(tmp_path)
    assert result.ok, result
    header, *lines = read(tmp_path)
    written = header.data["policy"]["refinement"]
    assert written["refiner"] == {"name": "function", "function": {"function": f"{__name__}:strip"}}
    assert written["when"] == "always"
    assert [line.decision.weights for line in lines if line.kind == "step"][-1] == decision.weights
    view = collect(tmp_path)
    assert view.refinement.accepted == 4
    assert [dial.name for dial in view.dials] == (["refinement_weight"] if "refinement_weight" in guard.dials else [])


def test_a_weight_altered_in_the_record_is_found_out(tmp_path):
    guard = Guard(refinement(0.5))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(rewards=[1.0]))
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text().replace('"weight":0.5', '"weight":0.7'))  # of the header's policy
    assert not verify(tmp_path).ok


def test_steps_without_a_refinement_are_recorded_as_before(tmp_path):
    guard = Guard(Constraint("c", limit=1.0))
    with guard.record(tmp_path / "ledger.jsonl"):
        guard.step(Rollout(costs={"c": [0.5]}))
    assert "weights" not in (tmp_path / "ledger.jsonl").read_text()


def test_a_host_that_cannot_refine_is_told_so():
    guard = Guard(refinement())
    with pytest.raises(AttachError, match="Refinement 'refinement' has nothing to correct on PPO"):
        guard.attach("PPO")
    assert guard.host is None
    guard.attach("GRPOTrainer", refines=True)
    assert guard.host == "GRPOTrainer"


def test_the_weights_own_dial_is_no_knob_of_the_host():
    guard = shared_gate()
    with pytest.raises(AttachError, match="Dial 'beta' has nothing to turn"):
        guard.attach("GRPOTrainer", refines=True)
    guard.attach("GRPOTrainer", dials=["beta"], refines=True)


def test_one_gate_moves_weight_and_dials_together():
    assert list(shared_gate().gates) == ["trust"]
    assert shared_gate().requires == {"rewards"}


def lists(prompt, completion):
    return completion + "."


lists.name = "acme.closing"


def shouting(prompt, completion):
    return completion.isupper()


shouting.name = "acme.shouting"


@pytest.fixture
def acme():
    import guardrails

    class Acme:
        @guardrails.hookimpl
        def guardrails_refiners(self):
            return [lists]

        @guardrails.hookimpl
        def guardrails_detectors(self):
            return [shouting]

    yield plugins.register(Acme(), name="acme")
    plugins.unregister("acme")


def test_refiner_and_detector_go_by_name(acme):
    part = Refinement("acme.closing", 0.5, "acme.shouting")
    assert part.corrects.refine(["Hello"], ["Good day"]) == ["Good day."]
    assert part.detects(prompts=["Hello"] * 2, completions=["GOOD DAY", "Good day"]) == [1.0, 0.0]
    assert type(Refinement("acme.closing", when="degenerate").detects) is Degenerate
    with pytest.raises(PluginError, match=r"no refiner 'acme\.closin'\. Did you mean 'acme\.closing'"):
        Refinement("acme.closin")
    with pytest.raises(ConfigurationError, match="when 'unparsable' cannot be made without arguments"):
        Refinement("acme.closing", when="unparsable")
    with pytest.raises(ConfigurationError, match="refiner 'function' cannot be made without arguments"):
        Refinement("function")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: refinement(-0.1), "Refinement 'refinement': weight is -0.1"),
        (lambda: refinement(float("nan")), "weight is nan"),
        (lambda: refinement("much"), "weight is 'much'"),
        (lambda: refinement(name="a/b"), "without '/'"),
        (lambda: refinement(accept=0.5), "accept is 0.5"),
        (lambda: refinement(changed_only=1), "changed_only is 1"),
        (lambda: Refinement(strip), "FunctionRefiner\\(function\\) makes one"),
        (lambda: Refinement(FunctionRefiner(strip), when=strip), "Predicate\\(function\\) makes one"),
        (lambda: Guard(refinement(), refinement(name="other")), "has 2 refinements"),
        (lambda: Guard(refinement(name="c"), Constraint("c", limit=1.0)), "Two parts of the guard are named 'c'"),
        (lambda: Guard(held(), Constraint("degenerate", limit=1.0)), "are named 'degenerate'"),
        (
            lambda: Guard(refinement(trust().between(1, 2)), Constraint("refinement_weight", limit=1.0)),
            "named 'refinement_weight'",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_refinement_is_frozen_and_keeps_what_it_was_given():
    accept = Acceptance(similarity=0.5)
    part = refinement(when=Repetition(2), accept=accept, changed_only=True)
    assert (part.when.n, part.accept, part.changed_only) == (2, accept, True)
    with pytest.raises(AttributeError):
        part.weight = 2.0
