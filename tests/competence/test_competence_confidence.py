"""Confidence sequences: agreement with their definitions and published bounds, coverage, and laws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import gammainc, gammaln

from guardrails import ConfigurationError
from guardrails.competence import Betting, EmpiricalBernstein
from guardrails.competence import confidence as source
from guardrails.competence.confidence import bernstein_boundary, rows_until_certain, spending

SCORES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60).map(np.array)


def run(sequence, batches):
    state = sequence.init()
    for batch in batches:
        state = sequence.update(state, np.asarray(batch, dtype=float))
    return state


@pytest.mark.parametrize("variance", [0.0, 0.3, 5.0, 80.0, 1e4, 1e7])
@pytest.mark.parametrize("error", [0.3, 0.05, 1e-6])
def test_the_boundary_solves_its_equation_from_above(variance, error):
    def log_mixture(u):
        return np.logaddexp.reduce(source._LOG_WEIGHTS + source._TILTS * u - source._PSI * variance) + math.log(error)

    exact = brentq(log_mixture, 0.0, 1e6, xtol=1e-12)
    found = float(bernstein_boundary(variance, -math.log(error)))
    assert exact * (1 - 1e-9) <= found <= exact * (1 + 1e-6), "never below the root, and close to it"


def gamma_exponential_boundary(variance, error, best_at, c=1.0):
    """Howard et al. 2021, the gamma-exponential mixture, tuned for V = ``best_at`` as its authors do."""
    log_inverse = math.log(1 / (2 * error))
    rho = best_at / (2 * log_inverse + math.log(1 + 2 * log_inverse)) / c**2
    v = variance / c**2 + rho
    lead = rho * math.log(rho) - gammaln(rho) - math.log(gammainc(rho, rho)) + gammaln(v)

    def excess(u):
        x = u / c + v
        return lead + math.log(gammainc(v, x)) - v * math.log(x) + x - rho + math.log(error)

    return brentq(excess, 0.0, 1e4)


def test_the_reference_is_the_published_one():
    # The figure that the test suite of its authors' library (confseq 0.0.11) holds it to.
    assert gamma_exponential_boundary(100.0, 0.05, 100.0, c=2.0) == pytest.approx(33.02017, abs=1e-5)


@pytest.mark.parametrize("variance", [1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
def test_the_boundary_is_close_to_the_published_gamma_exponential_mixture(variance):
    # Two mixtures that weigh the tilts differently cannot agree everywhere: ours serves V from 0.1 to 10,000.
    ours = float(bernstein_boundary(variance, math.log(1 / 0.025)))
    assert 0.85 <= ours / gamma_exponential_boundary(variance, 0.025, 30.0) <= 1.12


def test_each_tilt_bounds_every_bounded_score():
    """Fan et al. 2015: exp(λξ - ψ(λ)ξ²) ≤ 1 + λξ for ξ ≥ -1, the inequality that all rests on."""
    deviations = np.linspace(-1.0, 1.0, 2001)[:, None]
    left = np.exp(source._TILTS * deviations - source._PSI * deviations**2)
    assert (left <= 1.0 + source._TILTS * deviations + 1e-12).all()
    assert np.exp(source._LOG_WEIGHTS).sum() == pytest.approx(1.0)


def test_the_bernstein_bound_is_what_its_docstring_says():
    batches = [[1.0, 0.5], [0.0, 1.0, 0.75], [1.0]]
    state = run(EmpiricalBernstein(0.9), batches)
    centres, seen = [], []
    for batch in batches:
        centres += [(sum(seen) + 8 * 0.9) / (len(seen) + 8)] * len(batch)
        seen += batch
    variance = sum((x - c) ** 2 for x, c in zip(seen, centres, strict=True))
    width = float(bernstein_boundary(variance, math.log(2.0))) / len(seen)
    assert EmpiricalBernstein(0.9).lower(state, 0.5) == pytest.approx(max(0.0, np.mean(seen) - width))
    assert EmpiricalBernstein(0.9).upper(state, 0.5) == pytest.approx(min(1.0, np.mean(seen) + width))


def test_the_betting_bound_is_the_largest_refuted_candidate():
    rng = np.random.default_rng(0)
    scores = rng.beta(8, 2, size=150)
    betting = Betting(20)
    state = run(betting, [scores[:50], scores[50:]])
    capital = {
        m: np.mean([np.prod([1 - f + f * x / m for x in scores]) for f in source._FRACTIONS])
        for m in np.arange(1, 20) / 20
    }
    refuted = [m for m, k in capital.items() if k >= 20.0]
    assert betting.lower(state, 0.05) == pytest.approx(max(refuted))
    mirrored = run(betting, [1.0 - scores])
    assert betting.upper(state, 0.05) == pytest.approx(1.0 - betting.lower(mirrored, 0.05))


@pytest.mark.parametrize(("make", "streams"), [(EmpiricalBernstein, 600), (lambda: Betting(20), 300)])
@pytest.mark.parametrize("mean", [0.5, 0.95])
def test_a_bound_looked_at_after_every_batch_fails_no_more_often_than_stated(make, streams, mean):
    rng = np.random.default_rng(1)
    error, sequence, failed = 0.1, make(), 0
    for _ in range(streams):
        state = sequence.init()
        for _ in range(40):
            state = sequence.update(state, (rng.random(10) < mean).astype(float))
            # Betting refutes a candidate it is equal to; its grid holds both means.
            if sequence.lower(state, error) > mean - 1e-9:
                failed += 1
                break
    # Binomial: at the stated rate, more than this has probability below 1e-4.
    assert failed <= streams * error + 4 * math.sqrt(streams * error * (1 - error))
    assert failed > 0, "a bound that never fails is wider than it need be"


def test_the_bernstein_bound_holds_for_the_running_average_of_a_mean_that_moves():
    rng = np.random.default_rng(2)
    sequence, error, failed, streams = EmpiricalBernstein(), 0.1, 0, 300
    for _ in range(streams):
        state, truth, low = sequence.init(), 0.0, False
        for batch in range(1, 61):
            # Moves against the bound: high after bad luck, low after good luck.
            lucky = state.rows and state.total > truth
            mean = 0.3 if lucky else 0.9
            truth += 10 * mean
            state = sequence.update(state, (rng.random(10) < mean).astype(float))
            low = low or sequence.lower(state, error) > truth / (10 * batch)
        failed += low
    assert failed <= streams * error + 4 * math.sqrt(streams * error * (1 - error))


@given(SCORES, st.floats(0.001, 0.5))
def test_bounds_enclose_the_mean_within_0_and_1(scores, error):
    for sequence in (EmpiricalBernstein(), Betting(10)):
        state = run(sequence, [scores])
        # Betting bounds lie on a grid of tenths, so its lower one may touch the mean but not pass it.
        assert 0.0 <= sequence.lower(state, error) <= scores.mean() + 1e-12
        assert scores.mean() - 1e-12 <= sequence.upper(state, error) <= 1.0


@given(SCORES, st.floats(0.001, 0.5))
def test_less_error_gives_wider_bounds(scores, error):
    for sequence in (EmpiricalBernstein(), Betting(10)):
        state = run(sequence, [scores])
        assert sequence.lower(state, error / 2) <= sequence.lower(state, error)
        assert sequence.upper(state, error / 2) >= sequence.upper(state, error)


@given(SCORES, st.data())
def test_betting_bounds_rise_when_a_score_rises(scores, data):
    index = data.draw(st.integers(0, len(scores) - 1))
    higher = scores.copy()
    higher[index] = data.draw(st.floats(float(scores[index]), 1.0))
    betting = Betting(20)
    before, after = run(betting, [scores]), run(betting, [higher])
    assert betting.lower(after, 0.1) >= betting.lower(before, 0.1)
    assert betting.upper(after, 0.1) >= betting.upper(before, 0.1)


@given(SCORES, st.randoms(use_true_random=False))
def test_rows_of_a_batch_may_trade_places(scores, random):
    order = list(range(len(scores)))
    random.shuffle(order)
    for sequence in (EmpiricalBernstein(), Betting(10)):
        one, other = run(sequence, [scores]), run(sequence, [scores[order]])
        assert sequence.lower(one, 0.1) == sequence.lower(other, 0.1)


@given(SCORES, st.integers(0, 60))
def test_betting_does_not_depend_on_how_scores_are_batched(scores, cut):
    one, other = run(Betting(10), [scores]), run(Betting(10), [scores[:cut], scores[cut:]])
    np.testing.assert_allclose(one.high, other.high, rtol=1e-9, atol=1e-9)  # sums of logs in another order


def test_without_scores_nothing_is_known():
    for sequence in (EmpiricalBernstein(), Betting(10)):
        assert (sequence.lower(sequence.init(), 0.1), sequence.upper(sequence.init(), 0.1)) == (0.0, 1.0)


@settings(max_examples=30)
@given(st.floats(0.55, 0.999), st.floats(0.05, 0.5))
def test_the_rows_foretold_are_enough(mean, threshold):
    variance, log_inverse_error = mean * (1 - mean), math.log(50)
    rows = rows_until_certain(np.array([mean - threshold]), np.array([variance]), np.array([log_inverse_error]))[0]
    width = float(bernstein_boundary(rows * variance, log_inverse_error)) / rows
    assert mean - width >= threshold - 1e-9


def test_a_mean_below_the_threshold_is_never_certain():
    assert np.isinf(rows_until_certain(np.array([-0.01]), np.array([0.1]), np.array([3.0]))).all()


def test_all_attempts_together_spend_the_error_once():
    spent = spending(0.05, np.arange(1, 100_001)).sum()
    assert 0.04999 < spent < 0.05


@pytest.mark.parametrize("bad", [[1.5], [-0.1], [math.nan], [[0.5]]])
def test_scores_outside_the_unit_interval_are_refused(bad):
    for sequence in (EmpiricalBernstein(), Betting(10)):
        with pytest.raises(ConfigurationError, match="bounds hold for such only"):
            sequence.update(sequence.init(), np.array(bad))


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0, math.nan])
def test_an_error_that_is_no_probability_is_refused(error):
    with pytest.raises(ConfigurationError, match="error"):
        EmpiricalBernstein().lower(run(EmpiricalBernstein(), [[1.0]]), error)


@pytest.mark.parametrize("resolution", [2.5, 1, math.nan])
def test_a_resolution_that_is_no_number_of_candidates_is_refused(resolution):
    with pytest.raises(ConfigurationError, match="Betting: resolution"):
        Betting(resolution)
