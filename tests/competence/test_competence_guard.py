"""A guard with gates: limits and dials move, hosts that cannot serve are refused, resuming is exact."""

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
    Require,
    Rollout,
    RolloutError,
    StateError,
)
from guardrails.competence import (
    ConstraintSatisfaction,
    CriticCalibration,
    Drift,
    FailureAvoidance,
    FromFunction,
    RewardLevel,
    TokenEntropy,
)
from guardrails.schedulers import AdaptiveKL, DualAscent, Fixed


def gate_of(name="gate", **settings):
    return Gate(Require("reward_level", at_least=0.8), name=name, **{"rungs": 4, "dwell": 0, "fall": "one"} | settings)


def good(cost=10.0, rows=64):
    return Rollout(rewards=np.ones(rows), costs={"cost": np.full(rows, cost)})


def bad(cost=10.0, rows=64):
    return Rollout(rewards=np.zeros(rows), costs={"cost": np.full(rows, cost)})


def test_the_limit_moves_with_the_gate_and_costs_meet_the_limit_then_in_force():
    gate = gate_of()
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 25.0)))
    assert guard.constraints[0].limit == 5.0
    limits = [guard.step(good(12.0)).constraints["cost"].limit for _ in range(8)]
    assert limits == sorted(limits)
    assert limits[-1] == 25.0
    assert guard.constraints[0].limit == 25.0
    decision = guard.step(bad(12.0))
    assert decision.constraints["cost"].limit == 20.0
    assert decision.constraints["cost"].violation == 12.0 - 20.0
    assert [reason.verdict for reason in decision.reasons if reason.subject == "gate"] == ["tightened"]
    assert guard.step(bad(12.0)).constraints["cost"].violation == 12.0 - 15.0


def test_a_gate_that_never_opens_trains_as_the_tight_limit_does():
    moving = Guard(Constraint("cost", limit=gate_of().between(5.0, 25.0)))
    fixed = Guard(Constraint("cost", limit=5.0))
    for cost in (7.0, 30.0, 4.0, 6.0, float("nan")):
        assert moving.step(bad(cost)).multipliers == fixed.step(bad(cost)).multipliers


def test_gains_stay_as_the_limit_moves():
    guard = Guard(Constraint("cost", limit=gate_of().between(5.0, 25.0), scheduler=DualAscent(1.0)))
    assert guard.constraints[0].violation_scale == 5.0
    for _ in range(8):
        guard.step(good(0.0))
    assert guard.constraints[0].limit == 25.0
    assert guard.constraints[0].violation_scale == 5.0
    assert guard.step(good(30.0)).multipliers["cost"] == pytest.approx(1.0)


def test_a_scheduler_on_the_ratio_to_its_target_sees_the_moving_target():
    kl = Constraint("cost", limit=gate_of().between(1.0, 3.0), sense="==", scheduler=AdaptiveKL())
    assert (kl.at(0.0).violation_scale, kl.at(1.0).violation_scale) == (1.0, 3.0)


def test_a_lower_limit_starts_at_its_higher_end():
    guard = Guard(Constraint("cost", limit=gate_of().between(8.0, 2.0), sense=">="))
    assert guard.step(bad(5.0)).constraints["cost"].violation == 3.0
    for _ in range(8):
        decision = guard.step(good(5.0))
    assert decision.constraints["cost"].violation == -3.0


@pytest.mark.parametrize(("sense", "ends"), [("<=", (25.0, 5.0)), (">=", (5.0, 25.0))])
def test_a_limit_that_starts_at_its_looser_end_is_refused(sense, ends):
    with pytest.raises(ConfigurationError, match="Give the strict value first"):
        Constraint("cost", limit=gate_of().between(*ends), sense=sense)


def test_a_moving_limit_may_start_at_zero_but_not_for_a_ratio():
    assert Constraint("cost", limit=gate_of().between(0.0, 4.0)).violation_scale == 4.0
    with pytest.raises(ConfigurationError, match="ratio"):
        Constraint("cost", limit=gate_of().between(0.0, 4.0), sense="==", scheduler=AdaptiveKL())


def test_dials_follow_their_gate():
    gate = gate_of()
    guard = Guard(Constraint("cost", limit=100.0), Dial("beta", gate.between(0.1, 0.001, scale="geometric")))
    assert guard.dials == {"beta": 0.1}
    for _ in range(8):
        decision = guard.step(good())
    assert decision.dials == guard.dials == {"beta": 0.001}
    assert decision.metrics()["beta/value"] == 0.001
    assert decision.metrics()["gate/level"] == 1.0
    assert guard.step(bad()).dials["beta"] == pytest.approx(0.1 * 0.01**0.75)


def test_the_penalty_dial_scales_what_is_applied_and_not_what_is_remembered():
    gate = gate_of()
    guard = Guard(Constraint("cost", limit=5.0, scheduler=Fixed(2.0)), Dial("penalty", gate.between(1.0, 0.25)))
    plain = Guard(Constraint("cost", limit=5.0, scheduler=Fixed(2.0)))
    assert guard.multipliers == {"cost": 2.0}
    for _ in range(8):
        decision = guard.step(good())
        plain.step(good())
    assert decision.multipliers == guard.multipliers == {"cost": 0.5}
    assert guard.penalty("cost", 10.0) == 0.25 * plain.penalty("cost", 10.0)
    assert guard.state_dict()["constraints"] == plain.state_dict()["constraints"]
    assert guard.step(bad()).multipliers["cost"] == pytest.approx(2.0 * (1.0 - 0.75 * 0.75))


def test_two_gates_move_on_their_own_and_need_names_of_their_own():
    reward, drift = gate_of(), Gate(Require(Drift(), at_least=0.8), name="drift gate")
    guard = Guard(Constraint("cost", limit=reward.between(5.0, 25.0)), Dial("beta", drift.between(0.1, 0.01)))
    for _ in range(8):
        guard.step(Rollout(rewards=np.ones(64), kl=np.full(64, 0.9), costs={"cost": np.ones(64)}))
    assert guard.constraints[0].limit == 25.0
    assert guard.dials == {"beta": 0.1}
    with pytest.raises(ConfigurationError, match="Two gates are named 'gate'"):
        Guard(Constraint("cost", limit=gate_of().between(5.0, 25.0)), Dial("beta", gate_of().between(1.0, 2.0)))


@pytest.mark.parametrize(
    "parts",
    [
        lambda gate: (Constraint("x", limit=1.0), Dial("x", gate.between(1.0, 2.0))),
        lambda gate: (Dial("x", gate.between(1.0, 2.0)), Dial("x", gate.between(1.0, 2.0))),
        lambda gate: (Constraint("gate", limit=gate.between(1.0, 2.0)),),
    ],
)
def test_parts_and_gates_share_one_set_of_names(parts):
    with pytest.raises(ConfigurationError, match="Two parts of the guard are named"):
        Guard(*parts(gate_of()))


def test_a_dial_needs_a_name_and_a_value_that_moves():
    with pytest.raises(ConfigurationError, match=r"gate\.between"):
        Dial("beta", 0.1)
    with pytest.raises(ConfigurationError, match="name"):
        Dial("a/b", gate_of().between(1.0, 2.0))


def test_a_host_without_the_dial_is_refused_and_left_unattached():
    guard = Guard(Dial("beta", gate_of().between(0.1, 0.01)), Dial("penalty", gate_of("other").between(1.0, 0.5)))
    with pytest.raises(
        AttachError, match=r"Dial 'beta' has nothing to turn on PPO\. Dials here: action_scale, penalty"
    ):
        guard.attach("PPO", dials=["action_scale"])
    assert guard.host is None
    guard.attach("GRPO", dials=["beta", "temperature"])
    assert guard.host == "GRPO"


def test_a_host_without_a_metrics_column_is_refused_by_name():
    gate = Gate(Require(RewardLevel(), at_least=0.5), Require("refiner_agreement", at_least=0.5))
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 25.0)))
    assert guard.requires == {"rewards", "edit_ratio"}
    with pytest.raises(
        AttachError,
        match=r"Metric 'refiner_agreement' reads column 'edit_ratio', which the SB3 host does not provide\. "
        r"Columns here: cost, costs, rewards",
    ):
        guard.check_columns({"rewards", "costs", "cost"}, "the SB3 host")
    guard.check_columns({"rewards", "edit_ratio"}, "the TRL host")


@pytest.mark.parametrize(
    ("metric", "column"),
    [
        (Drift(1.0), "kl"),
        (TokenEntropy(1.0), "entropy"),
        (FromFunction(lambda kl: 1.0 - kl, "kl", name="near"), "kl"),
    ],
    ids=["drift", "token_entropy", "function"],
)
def test_a_cost_of_a_columns_name_is_what_a_host_without_the_column_provides(metric, column):
    gate = Gate(Require(metric, at_least=0.5))
    guard = Guard(Constraint(column, limit=gate.between(5.0, 25.0)))
    guard.check_columns({"rewards", "costs", column}, "the GRPO host")
    decision = guard.step(Rollout(rewards=[0.0, 0.0], costs={column: [0.25, 0.75]}))
    assert decision.gates["gate"].requirements[0].failure == ""
    assert decision.gates["gate"].requirements[0].mean == 0.5
    own = guard.step(Rollout(costs={column: [9.0, 9.0]}, **{column: [0.25, 0.75]}))
    assert own.gates["gate"].requirements[0].mean == 0.5


@pytest.mark.parametrize(
    "metric",
    [ConstraintSatisfaction("lengths", 5.0), FailureAvoidance(cost="lengths", level=5.0), CriticCalibration("lengths")],
)
def test_a_column_of_a_costs_name_is_what_a_host_without_the_cost_provides(metric):
    gate = Gate(Require(metric, at_least=0.5))
    guard = Guard(Constraint("cost", limit=gate.between(5.0, 25.0)))
    guard.check_columns({"lengths", "infos", "costs", "cost"}, "the PPO host")
    infos = [{"predicted_cost": 4.0}, {"predicted_cost": 5.0}]
    decision = guard.step(Rollout(lengths=[4.0, 6.0], infos=infos, costs={"cost": [0.0, 0.0]}))
    assert decision.gates["gate"].requirements[0].failure == ""
    assert decision.gates["gate"].requirements[0].mean == 0.5
    own = guard.step(Rollout(lengths=[9.0, 9.0], infos=infos, costs={"cost": [0.0, 0.0], "lengths": [4.0, 6.0]}))
    assert own.gates["gate"].requirements[0].mean == 0.5


def test_a_missing_cost_leaves_the_gates_as_they_were():
    guard = Guard(Constraint("cost", limit=gate_of().between(5.0, 25.0)))
    before = json.dumps(guard.state_dict())
    with pytest.raises(RolloutError, match="cost column 'cost'"):
        guard.step(Rollout(rewards=np.ones(512)))
    assert json.dumps(guard.state_dict()) == before


def two_part_guard():
    gate = gate_of(rungs=10)
    return Guard(
        Constraint("cost", limit=gate.between(5.0, 25.0)),
        Dial("beta", gate.between(0.1, 0.01, scale="geometric")),
        Dial("penalty", gate.between(1.0, 0.5)),
    )


def test_resuming_equals_going_on_bit_for_bit():
    rng = np.random.default_rng(0)
    rollouts = [
        Rollout(rewards=rng.random(16) ** (0.1 if 20 < i < 50 else 0.01), costs={"cost": rng.normal(12.0, 5.0, 16)})
        for i in range(80)
    ]
    straight = two_part_guard()
    whole = [straight.step(rollout) for rollout in rollouts]
    assert len({decision.gates["gate"].rung for decision in whole}) > 3
    first = two_part_guard()
    for rollout in rollouts[:37]:
        first.step(rollout)
    second = two_part_guard()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.constraints == first.constraints or second.constraints[0].limit == first.constraints[0].limit
    assert (second.dials, second.multipliers) == (first.dials, first.multipliers)
    assert repr([second.step(rollout) for rollout in rollouts[37:]]) == repr(whole[37:])
    assert json.dumps(second.state_dict()) == json.dumps(straight.state_dict())


def test_a_state_of_other_gates_is_refused_and_nothing_of_it_is_loaded():
    guard = two_part_guard()
    for _ in range(10):
        guard.step(good())
    saved = guard.state_dict()
    other = Guard(Constraint("cost", limit=gate_of("another").between(5.0, 25.0)))
    before = json.dumps(other.state_dict())
    with pytest.raises(StateError, match="has gates"):
        other.load_state_dict(saved)
    with pytest.raises(StateError, match="has gates"):
        Guard(Constraint("cost", limit=5.0)).load_state_dict(saved)
    with pytest.raises(StateError, match="has gates"):
        two_part_guard().load_state_dict({key: value for key, value in saved.items() if key != "gates"})
    assert json.dumps(other.state_dict()) == before


def test_the_gates_can_be_read_at_any_time():
    guard = two_part_guard()
    assert (
        guard.gates["gate"].text == "rung 0 of 10: waiting for reward_level, 0.000 ≥ 0.8 needed, nothing measured yet"
    )
    decision = guard.step(good(rows=8))
    assert guard.gates["gate"] == decision.gates["gate"]
    assert decision.gates["gate"].text in decision.explain()
