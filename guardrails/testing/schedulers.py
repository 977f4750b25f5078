"""The suite that a constraint scheduler must pass; authors subclass it in their own tests."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from guardrails.constraint import Constraint
from guardrails.errors import StateError
from guardrails.guard import Guard
from guardrails.rollout import FloatArray, Rollout
from guardrails.schedulers import Cap, ConstraintScheduler, unstack

_STEPS = 60


class SchedulerContract:
    """Pytest suite for a `ConstraintScheduler`: what `Guard` and the adapters rely on.

    Subclass it under a name that pytest collects and list the schedulers, one line each. Every test
    runs for every one of them.

    Example:
        >>> from guardrails.schedulers import DualAscent
        >>> class TestSchedulers(SchedulerContract):
        ...     schedulers = [DualAscent(0.1), DualAscent(10.0)]
    """

    schedulers: ClassVar[Sequence[ConstraintScheduler[Any]]] = ()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run each test once per scheduler."""
        _require(bool(self.schedulers), f"{type(self).__name__} must set 'schedulers', a list of instances to test.")
        metafunc.parametrize("scheduler", self.schedulers, ids=[_label(each) for each in self.schedulers])

    def test_strength_is_finite_and_never_negative(self, scheduler: ConstraintScheduler[Any]) -> None:
        """Hosts divide by 1 + Σ λ and write λ to JSON."""
        for stream in _streams().values():
            for violation, strength in zip(stream, _strengths(scheduler, stream), strict=True):
                good = isinstance(strength, float) and math.isfinite(strength) and strength >= 0.0
                _require(
                    good, f"strength {strength!r} after a violation of {violation!r}; a finite float ≥ 0 is needed."
                )

    def test_strength_in_force_is_the_one_returned(self, scheduler: ConstraintScheduler[Any]) -> None:
        """A resumed run applies `strength(state)` before its first update."""
        state = scheduler.init()
        for violation in _streams()["noise"]:
            state, strength = scheduler.update(state, violation)
            _require(
                scheduler.strength(state) == strength,
                f"update() returned {strength!r}, but strength(state) is {scheduler.strength(state)!r}.",
            )

    def test_init_and_update_are_pure(self, scheduler: ConstraintScheduler[Any]) -> None:
        """One scheduler object serves many constraints, and a step can be replayed."""
        first, states = _run(scheduler, _streams()["noise"]), []
        state = scheduler.init()
        for violation in _streams()["noise"]:
            before = repr(state)
            after, _ = scheduler.update(state, violation)
            again, _ = scheduler.update(state, violation)
            _require(repr(state) == before, "update() changed the state it was given; return a new one.")
            _require(repr(after) == repr(again), "update() gave two answers to the same input; keep no state in self.")
            states.append(state := after)
        _require(repr(states) == repr(first), "a second run over the same violations went differently.")

    def test_state_survives_json_bit_for_bit(self, scheduler: ConstraintScheduler[Any]) -> None:
        """A checkpoint must bring back the very same floats."""
        for state in [scheduler.init(), *_run(scheduler, _streams()["noise"])]:
            loaded = _through_json(scheduler, state)
            _require(repr(loaded) == repr(state), f"{state!r} came back from JSON as {loaded!r}.")

    def test_resuming_anywhere_equals_not_stopping(self, scheduler: ConstraintScheduler[Any]) -> None:
        """N + M updates equal N, save, load, M."""
        stream = _streams()["noise"]
        whole = _run(scheduler, stream)
        for stop in range(len(stream)):
            state = _through_json(scheduler, whole[stop])
            for violation in stream[stop + 1 :]:
                state, _ = scheduler.update(state, violation)
            _require(repr(state) == repr(whole[-1]), f"a run resumed after update {stop + 1} ended differently.")

    def test_foreign_newer_and_damaged_states_are_refused(self, scheduler: ConstraintScheduler[Any]) -> None:
        """Loading the wrong state must fail aloud, not train on with a wrong multiplier."""
        good = scheduler.dump(_run(scheduler, _streams()["noise"])[-1])
        needed = "multiplier" if "multiplier" in good else scheduler.state_type._fields[0]
        damaged: dict[str, Any] = {
            "of another scheduler": {**good, "scheduler": "AnotherScheduler"},
            "of a newer schema": {**good, "schema": scheduler.schema + 1},
            "without a schema": {name: value for name, value in good.items() if name != "schema"},
            f"without its {needed}": {name: value for name, value in good.items() if name != needed},
            "with a foreign field": {**good, "foreign": 0.0},
            "with a multiplier of NaN": {**good, "multiplier": math.nan},
            "with a negative multiplier": {**good, "multiplier": -1.0},
            "with a multiplier of text": {**good, "multiplier": "1.0"},
            "that is a list": [good],
        }
        for what, data in damaged.items():
            try:
                scheduler.load(data)
            except StateError:
                continue
            raise AssertionError(f"load() took a state {what}; it must raise StateError.")

    def test_a_larger_violation_never_gives_a_smaller_strength(self, scheduler: ConstraintScheduler[Any]) -> None:
        """Where the scheduler promises it (``monotone``), from any state it can be in."""
        if not scheduler.monotone:
            return
        probes = sorted({-1e300, -1e9, -1.0, -0.1, -1e-12, 0.0, 1e-12, 1e-4, 0.1, 0.5, 1.0, 3.0, 30.0, 1e9, 1e300})
        for state in [scheduler.init(), *_run(scheduler, _streams()["noise"])]:
            strengths = [scheduler.update(state, violation)[1] for violation in probes]
            _require(strengths == sorted(strengths), f"from {state!r}, strengths {strengths} for violations {probes}.")

    def test_many_constraints_in_one_call_equal_one_by_one(self, scheduler: ConstraintScheduler[Any]) -> None:
        """`update_many` is `update`, row by row and bit for bit."""
        violations = np.array(list(_streams().values())).T
        n = violations.shape[1]
        many, single = scheduler.init_many(n), [scheduler.init()] * n
        for row in violations:
            many, strengths = scheduler.update_many(many, row)
            single = [scheduler.update(state, float(v))[0] for state, v in zip(single, row, strict=True)]
            _require(
                repr(unstack(many)) == repr(single), f"update_many gave {unstack(many)!r}, update gave {single!r}."
            )
            expected = [scheduler.strength(state) for state in single]
            _require(strengths.tolist() == expected, f"update_many returned {strengths.tolist()}, update {expected}.")

    def test_a_cap_holds_and_scheduling_goes_on_below_it(self, scheduler: ConstraintScheduler[Any]) -> None:
        """`Cap` relies on `track`: with the strength it returned itself, a scheduler is left as it was."""
        for state, violation in zip(_run(scheduler, _streams()["noise"]), _streams()["noise"], strict=True):
            after, strength = scheduler.update(state, violation)
            tracked = scheduler.track(state, after, strength)
            _require(repr(tracked) == repr(after), f"track() with its own strength changed {after!r} to {tracked!r}.")
        capped = _strengths(Cap(scheduler, 0.5), _streams()["noise"])
        _require(max(capped) <= 0.5, f"capped at 0.5, it reached {max(capped)!r}.")

    def test_scaling_costs_and_limit_together_changes_nothing(self, scheduler: ConstraintScheduler[Any]) -> None:
        """The same gains serve a limit of 0.05 and one of 25. A factor of 2¹⁰ scales floats exactly."""
        runs = []
        for factor in (1.0, 1024.0):
            guard = Guard(Constraint("cost", limit=0.25 * factor, scheduler=scheduler))
            costs = [factor * 0.25 * (1.0 + violation) for violation in _streams()["noise"]]
            runs.append([guard.step(Rollout(costs={"cost": [cost]})).multipliers["cost"] for cost in costs])
        _require(runs[0] == runs[1], f"multipliers {runs[0][:5]} became {runs[1][:5]} when all was scaled.")


def _streams() -> dict[str, list[float]]:
    """Return violations of the kinds that occur and of the kinds that break things, equally long."""
    noise: FloatArray = np.random.default_rng(0).gamma(0.5, 3.0, _STEPS) - 1.0
    quiet, extremes = [0.0, -0.0, 5e-324], [1e300, -1e300, 1e300, 1.0, -1e300, 1e9, -1e9, 1.7e308, -1.7e308, 0.0]
    return {
        "noise": noise.tolist(),
        "violated": [5.0] * _STEPS,
        "kept": [-1.0] * _STEPS,
        "windup": [30.0] * (_STEPS // 2) + [-1.0] * (_STEPS - _STEPS // 2),
        "nothing": quiet * (_STEPS // len(quiet)),
        "extremes": extremes * (_STEPS // len(extremes)),
    }


def _run(scheduler: ConstraintScheduler[Any], stream: Sequence[float]) -> list[Any]:
    states, state = [], scheduler.init()
    for violation in stream:
        state, _ = scheduler.update(state, violation)
        states.append(state)
    return states


def _strengths(scheduler: ConstraintScheduler[Any], stream: Sequence[float]) -> list[float]:
    strengths, state = [], scheduler.init()
    for violation in stream:
        state, strength = scheduler.update(state, violation)
        strengths.append(strength)
    return strengths


def _through_json(scheduler: ConstraintScheduler[Any], state: Any) -> Any:
    return scheduler.load(json.loads(json.dumps(scheduler.dump(state), allow_nan=False)))


def _label(scheduler: ConstraintScheduler[Any]) -> str:
    return repr(scheduler).replace("::", ":")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
