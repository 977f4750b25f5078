"""Wrong arguments and wrong states: errors that name the cause and the cure; nothing half-loaded."""

import json
import math

import numpy as np
import pytest

from guardrails import Constraint, Guard, Rollout
from guardrails.errors import ConfigurationError, PluginError, RolloutError, StateError
from guardrails.schedulers import (
    BUILTIN,
    CRPO,
    PID,
    AdamAscent,
    AdaptiveKL,
    Anneal,
    AugmentedLagrangian,
    Cap,
    ConstraintScheduler,
    DualAscent,
    Fixed,
    LogDual,
    Margin,
    NuPI,
    RateLimit,
    Smooth,
    Warmup,
)

GAINS = [
    (PID, "kp"),
    (PID, "ki"),
    (PID, "kd"),
    (PID, "smoothing_p"),
    (PID, "smoothing_d"),
    (PID, "delay"),
    (PID, "integral_max"),
    (PID, "initial"),
    (NuPI, "kp"),
    (NuPI, "ki"),
    (NuPI, "nu"),
    (NuPI, "initial"),
    (DualAscent, "learning_rate"),
    (DualAscent, "initial"),
    (AdamAscent, "learning_rate"),
    (AdamAscent, "mean_smoothing"),
    (AdamAscent, "square_smoothing"),
    (AdamAscent, "epsilon"),
    (LogDual, "learning_rate"),
    (LogDual, "initial"),
    (LogDual, "minimum"),
    (LogDual, "maximum"),
    (AugmentedLagrangian, "penalty_coefficient"),
    (AugmentedLagrangian, "learning_rate"),
    (AugmentedLagrangian, "growth_factor"),
    (AugmentedLagrangian, "growth_increment"),
    (AugmentedLagrangian, "tolerance"),
    (AugmentedLagrangian, "penalty_max"),
    (AdaptiveKL, "initial"),
    (AdaptiveKL, "batch_size"),
    (AdaptiveKL, "horizon"),
    (AdaptiveKL, "clip"),
    (Fixed, "multiplier"),
    (Anneal, "start"),
    (Anneal, "end"),
    (Anneal, "updates"),
    (CRPO, "tolerance"),
    (CRPO, "weight"),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, 1e10, "1", True])
@pytest.mark.parametrize(("kind", "argument"), GAINS, ids=lambda each: getattr(each, "__name__", each))
def test_gains_that_mean_nothing_are_refused_by_name(kind, argument, bad):
    with pytest.raises(ConfigurationError, match=f"{kind.__name__}: {argument} is .*; give a") as error:
        kind(**{argument: bad})
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AugmentedLagrangian(0.0), r"penalty_coefficient is 0\.0; give a finite number in \(0"),
        (lambda: AugmentedLagrangian(5.0, penalty_max=1.0), "penalty_max 1 is below penalty_coefficient 5"),
        (lambda: AugmentedLagrangian(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: DualAscent(0.0), "learning_rate is 0.0"),
        (lambda: LogDual(minimum=2.0, maximum=1.0), "minimum 2 is above maximum 1. Swap them"),
        (lambda: LogDual(initial=0.0), r"initial 0 is outside \[minimum, maximum\] = \[0.001, 10\]"),
        (lambda: LogDual(initial=11.0), "Move it inside or widen the range"),
        (lambda: AdaptiveKL(minimum=1.0, maximum=0.5), "minimum 1 is above maximum 0.5"),
        (lambda: AdaptiveKL(batch_size=100, horizon=10), "could turn β negative. Raise horizon"),
        (lambda: PID(delay=2.5), "delay is 2.5; give a whole number"),
        (lambda: PID(smoothing_p=1.0), r"smoothing_p is 1\.0; give a finite number in \[0, 1\)\."),
        (lambda: PID(kp=10**400), r"kp is 10+; give a finite number in \[0, 1e\+09\]\."),
        (lambda: PID(integral_max=0.2, initial=0.3), r"PID: initial 0.3 is above integral_max 0.2.*Lower the one"),
        (lambda: Constraint("c", limit=10**400), r"limit is 10+; give a finite number in \[0, inf\)\."),
        (lambda: Anneal(shape="step"), "give 'linear' or 'cosine'"),
        (lambda: Anneal(updates=0), "updates is 0"),
        (lambda: Cap(PID(), 0.0), "maximum is 0.0"),
        (lambda: Cap(PID, 1.0), r"Cap wraps a scheduler, not <class .*give an instance such as PID\(\)"),
        (lambda: Smooth("pid"), "Smooth wraps a scheduler, not 'pid'"),
        (lambda: Smooth(PID(), 1.0), "smoothing is 1.0"),
        (lambda: RateLimit(PID(), 0.0), "max_change is 0.0"),
        (lambda: Margin(PID(), -0.1), "margin is -0.1"),
        (lambda: Warmup(PID(), 0), "updates is 0"),
        (lambda: PID().init_many(0), "PID: n is 0"),
    ],
)
def test_impossible_settings_name_cause_and_cure(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


@pytest.mark.parametrize("violations", [[0.0, 0.0, 0.0], 0.0, [[0.0, 0.0]]], ids=["too many", "scalar", "matrix"])
def test_violations_of_the_wrong_shape_are_refused(violations):
    with pytest.raises(RolloutError, match="for 2 constraints"):
        PID().update_many(PID().init_many(2), np.array(violations))


class TestConstraint:
    def test_a_limit_of_zero_needs_a_scale(self):
        with pytest.raises(ConfigurationError, match=r"limit of 0 has no scale .* Give scale="):
            Constraint("c", limit=0.0)
        assert Constraint("c", limit=0.0, scale=0.5).violation_scale == 0.5

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
    def test_a_scale_that_measures_nothing_is_refused(self, scale):
        with pytest.raises(ConfigurationError, match="scale is"):
            Constraint("c", limit=1.0, scale=scale)

    @pytest.mark.parametrize("sense", ["==", "<="])
    def test_a_kl_target_must_be_positive(self, sense):
        with pytest.raises(ConfigurationError, match=r"limit is -0\.1"):
            Constraint("kl", limit=-0.1, sense=sense, scheduler=AdaptiveKL())
        with pytest.raises(ConfigurationError, match=r"AdaptiveKL works on the ratio .* Give a limit above 0"):
            Constraint("kl", limit=0.0, scale=1.0, sense=sense, scheduler=AdaptiveKL())

    @pytest.mark.parametrize("scheduler", [kind for kind in BUILTIN.values() if kind is not AdaptiveKL])
    def test_a_target_is_refused_where_the_method_bounds_one_side(self, scheduler):
        with pytest.raises(ConfigurationError, match=f"{scheduler.__name__} bounds a cost from one side.*AdaptiveKL"):
            Constraint("c", limit=1.0, sense="==", scheduler=scheduler())

    def test_a_target_is_held_from_both_sides(self):
        guard = Guard(Constraint("kl", limit=0.1, sense="==", scheduler=AdaptiveKL(0.5)))
        above = guard.step(Rollout(costs={"kl": [0.2]}))
        assert above.multipliers["kl"] > 0.5
        assert "above target 0.1" in above.explain()
        below = guard.step(Rollout(costs={"kl": [0.05]}))
        assert below.multipliers["kl"] < above.multipliers["kl"]
        assert "below target 0.1" in below.explain()
        unmeasured = guard.step(Rollout(costs={"kl": [math.nan]}))
        assert unmeasured.multipliers["kl"] > below.multipliers["kl"]

    @pytest.mark.parametrize("name", BUILTIN)
    def test_schedulers_are_found_by_name(self, name):
        constraint = Constraint("c", limit=1.0, scheduler=name)
        assert type(constraint.scheduler) is BUILTIN[name]

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(PluginError, match=r"no scheduler 'pdi'. Did you mean 'pid'"):
            Constraint("c", limit=1.0, scheduler="pdi")

    def test_a_plug_ins_scheduler_is_found_by_name(self):
        import guardrails
        from guardrails import plugins

        class Mine(DualAscent):
            name = "acme.mine"

        class Needy(DualAscent):
            name = "acme.needy"

            def __init__(self, rate):
                super().__init__(rate)

        class Plugin:
            @guardrails.hookimpl
            def guardrails_schedulers(self):
                return [Mine, Needy]

        plugins.register(Plugin(), name="acme")
        try:
            assert isinstance(Constraint("c", limit=1.0, scheduler="acme.mine").scheduler, Mine)
            with pytest.raises(ConfigurationError, match=r"cannot be made without arguments .* Give an instance"):
                Constraint("c", limit=1.0, scheduler="acme.needy")
        finally:
            plugins.unregister("acme")

    def test_loss_term_is_dimensionless_and_has_the_constraints_sign(self):
        guard = Guard(
            Constraint("a", limit=2.0, scheduler=Fixed(3.0)),
            Constraint("b", limit=2.0, sense=">=", scheduler=Fixed(3.0)),
            Constraint("c", limit=2.0, scheduler=AugmentedLagrangian(2.0, initial=1.0)),
        )
        assert guard.penalty("a", 3.0) == 3.0 * 0.5
        assert guard.penalty("b", 3.0) == 3.0 * -0.5
        assert guard.penalty("c", 3.0) == ((1.0 + 2.0 * 0.5) ** 2 - 1.0) / 4.0


@pytest.mark.parametrize("kind", BUILTIN.values())
def test_state_of_another_scheduler_is_refused(kind):
    other = Fixed() if kind is not Fixed else DualAscent()
    with pytest.raises(StateError, match=f"saved by {type(other).__name__}, not {kind.__name__}. Configure"):
        kind().load(other.dump(other.init()))


def test_state_of_a_newer_schema_asks_for_an_upgrade():
    saved = PID().dump(PID().init())
    with pytest.raises(StateError, match=r"has schema 2; this version reads up to 1\. Upgrade"):
        PID().load({**saved, "schema": 2})


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "0", True, {}, 10**400, [0.0]])
def test_a_damaged_field_is_named(bad):
    saved = PID().dump(PID().init())
    with pytest.raises(StateError, match="Field 'integral'"):
        PID().load({**saved, "integral": bad})


def test_a_history_of_another_length_is_refused():
    """A changed delay would compare with a measurement of another age."""
    long = PID(delay=8)
    state = long.init()
    for _ in range(8):
        state, _ = long.update(state, 1.0)
    with pytest.raises(StateError, match="delay=5 keeps at most 5 numbers"):
        PID(delay=5).load(long.dump(state))
    with pytest.raises(StateError, match="history"):
        long.load({**long.dump(state), "history": 0.0})
    with pytest.raises(StateError, match="history"):
        long.load({**long.dump(state), "history": [0.0, math.nan]})


@pytest.mark.parametrize("data", [None, [], "state", {}, {"multiplier": 0.0}])
def test_what_is_no_state_is_refused(data):
    with pytest.raises(StateError, match=r"not the state of a scheduler.*Pass what PID\.dump returned"):
        PID().load(data)


def test_a_guard_is_never_half_loaded():
    def build():
        return Guard(Constraint("a", limit=1.0, scheduler=DualAscent(0.1)), Constraint("b", limit=1.0, scheduler=PID()))

    donor, guard = build(), build()
    for _ in range(3):
        donor.step(Rollout(costs={"a": [5.0], "b": [5.0]}))
    guard.step(Rollout(costs={"a": [2.0], "b": [2.0]}))
    before = json.dumps(guard.state_dict())
    saved = donor.state_dict()
    saved["constraints"]["b"]["state"]["integral"] = "damaged"  # "a" comes first and is sound
    with pytest.raises(StateError):
        guard.load_state_dict(saved)
    assert json.dumps(guard.state_dict()) == before


def test_a_scheduler_is_printed_as_it_is_written():
    for scheduler in (PID(2.0, delay=3), Cap(LogDual(), 3.0), Anneal(shape="cosine")):
        assert repr(eval(repr(scheduler))) == repr(scheduler)


def test_the_protocol_cannot_be_instantiated_half_written():
    class Half(ConstraintScheduler):
        def init(self):
            return None

    with pytest.raises(TypeError, match="update"):
        Half()
