"""The change detector: exact recursion, promised false alarms, promised delay."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardrails import ConfigurationError
from guardrails.competence import Break
from guardrails.competence import change as source
from guardrails.competence.change import kl_bernoulli


def rows_until_alarm(detector, batches):
    state, rows = detector.init(), 0
    for batch in batches:
        state, alarm = detector.update(state, np.sort(batch))
        rows += batch.shape[1]
        if alarm.any():
            return rows
    return None


def coins(rng, mean, batch, count):
    return ((rng.random((1, batch)) < mean).astype(float) for _ in range(count))


def test_the_evidence_follows_its_recursion():
    detector, threshold = Break([0.8]), 0.8
    batches = [[0.9, 0.8, 1.0], [0.3, 1.0], [0.7]]
    state, expected = detector.init(), np.zeros(source._FRACTIONS.size)
    for batch in batches:
        state, _ = detector.update(state, np.array([batch]))
        for index, fraction in enumerate(source._FRACTIONS):
            growth = math.prod(1 + fraction * (threshold - x) / (1 - threshold) for x in batch)
            expected[index] = (expected[index] + 1.0) * growth
    np.testing.assert_allclose(np.exp(state.log_evidence[0]), expected)


def test_the_window_keeps_the_fewest_whole_batches_that_hold_enough_rows():
    detector, state = Break([0.5], window=10), Break([0.5]).init()
    for size in (8, 3, 6, 5, 40, 2):
        state, _ = detector.update(state, np.ones((1, size)))
        kept = [rows for rows, _ in state.window]
        assert sum(kept) >= min(10, sum((8, 3, 6, 5, 40, 2))) or len(kept) == 1
        assert sum(kept[1:]) < 10
    assert kept == [40, 2]


def test_the_window_alone_can_raise_the_alarm():
    detector = Break([0.9], window=64)
    log_alarm = math.log(2 * 10_000)
    rows = 64
    for misses in range(rows):
        mean = 1 - misses / rows
        state = detector.init()._replace(log_evidence=np.full((1, 5), -1e9))
        batch = np.repeat([0.0, 1.0], [misses, rows - misses])[None]
        # Evidence this negative cannot recover in one batch, so what alarms is the window.
        _, alarm = detector.update(state._replace(log_evidence=state.log_evidence), batch)
        kl = float(kl_bernoulli(np.array(mean), np.array(0.9)))
        by_window = mean < 0.9 and rows * kl >= log_alarm
        by_evidence = np.logaddexp.reduce(np.log1p(detector._bets * (0.9 - batch)).sum(axis=2)[0]) - math.log(5)
        assert bool(alarm[0]) == (by_window or by_evidence >= log_alarm)


def test_one_stream_that_breaks_does_not_accuse_another():
    detector = Break([0.9, 0.9])
    _, alarm = detector.update(detector.init(), np.array([[0.0] * 16, [1.0] * 16]))
    assert alarm.tolist() == [True, False]


@pytest.mark.parametrize("mean", [0.0, 0.5, 0.8, 0.9])
def test_the_mean_delay_keeps_what_is_stated(mean):
    rng, detector = np.random.default_rng(0), Break([0.95])
    delays = []
    for _ in range(60):
        good = list(coins(rng, 0.99, 16, 100))
        found = rows_until_alarm(detector, [*good, *coins(rng, mean, 16, 500)])
        delays.append(found - 1600)
    stated = detector.rows_to_alarm(mean, batch=16)
    assert np.mean(delays) <= stated
    assert np.mean(delays) >= stated / 8, "so loose a statement would be of no use"


def test_no_delay_is_stated_where_nothing_is_broken():
    assert math.isinf(Break([0.95]).rows_to_alarm(0.95))
    assert math.isinf(Break([0.95]).rows_to_alarm(1.0))


def test_long_good_times_do_not_slow_the_alarm():
    detector, state = Break([0.95]), Break([0.95]).init()
    for _ in range(500):
        state, _ = detector.update(state, np.ones((1, 16)))
    late, _ = detector.update(state, np.zeros((1, 2)))
    early, _ = detector.update(detector.init(), np.zeros((1, 2)))
    # Old evidence has shrunk to nothing: M is (M + 1) times the growth, with M ≥ 0.
    assert (late.log_evidence >= early.log_evidence).all()


def test_false_alarms_are_as_rare_as_promised_at_the_worst_mean():
    rng, detector, runs, updates = np.random.default_rng(1), Break([0.8], run_length=200.0), 300, 40
    alarms = sum(rows_until_alarm(detector, coins(rng, 0.8, 8, updates)) is not None for _ in range(runs))
    promised = updates / 200.0
    assert alarms <= runs * promised + 4 * math.sqrt(runs * promised)
    assert alarms > 0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), st.data())
def test_lower_scores_never_give_less_evidence_of_a_break(scores, data):
    index = data.draw(st.integers(0, len(scores) - 1))
    lower = [*scores[:index], data.draw(st.floats(0.0, scores[index])), *scores[index + 1 :]]
    detector = Break([0.9])
    before, _ = detector.update(detector.init(), np.sort([scores]))
    after, _ = detector.update(detector.init(), np.sort([lower]))
    assert (after.log_evidence >= before.log_evidence - 1e-9).all()  # logs are summed in another order


@pytest.mark.parametrize(
    "make",
    [
        lambda: Break([]),
        lambda: Break([0.0]),
        lambda: Break([1.0]),
        lambda: Break([0.9], run_length=1.0),
        lambda: Break([0.9], window=0),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ConfigurationError):
        make()
