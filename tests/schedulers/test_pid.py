"""PID against the paper's own algorithm, and what it adds: no windup, no kick at the start."""

import numpy as np
import pytest

from guardrails.schedulers import PID, NuPI


class PaperController:
    """Algorithm 2 of Stooke et al. 2020 as printed, with the smoothing of its appendix, in the paper's symbols.

    J_C,prev starts at the first J_C: the paper leaves its start open, and from 0 the first cost is all rise.
    """

    def __init__(self, k_p, k_i, k_d, alpha, beta, delay, d):
        self.k_p, self.k_i, self.k_d, self.alpha, self.beta, self.delay, self.d = k_p, k_i, k_d, alpha, beta, delay, d
        self.integral, self.delta_ema, self.costs = 0.0, 0.0, []

    def control(self, j_c):
        delta = j_c - self.d
        self.delta_ema = self.alpha * self.delta_ema + (1 - self.alpha) * delta
        self.costs.append(j_c if not self.costs else self.beta * self.costs[-1] + (1 - self.beta) * j_c)
        previous = self.costs[max(0, len(self.costs) - 1 - self.delay)]
        derivative = max(0.0, self.costs[-1] - previous)
        self.integral = max(0.0, self.integral + delta)
        return max(0.0, self.k_p * self.delta_ema + self.k_i * self.integral + self.k_d * derivative)


@pytest.mark.parametrize(("alpha", "beta", "delay"), [(0.0, 0.0, 1), (0.95, 0.95, 10), (0.7, 0.3, 4)])
@pytest.mark.parametrize("gains", [(0.1, 0.01, 0.01), (1.0, 0.1, 0.5), (0.0, 0.1, 0.0), (0.0, 0.0, 2.0)])
def test_follows_the_papers_equations(gains, alpha, beta, delay):
    limit = 25.0
    costs = np.random.default_rng(0).gamma(2.0, 14.0, 300) * np.linspace(1.5, 0.5, 300)
    paper = PaperController(*gains, alpha, beta, delay, d=limit)
    pid = PID(*gains, smoothing_p=alpha, smoothing_d=beta, delay=delay, integral_max=1e9)
    state = pid.init()
    for cost in costs:
        state, lam = pid.update(state, float(cost - limit))
        # the paper sums violations and scales by K_I after; the order rounds differently
        assert lam == pytest.approx(paper.control(cost), rel=1e-9, abs=1e-9)


def test_first_measurement_is_no_rise():
    pid = PID(0.0, 0.0, 1.0)
    state, lam = pid.update(pid.init(), 30.0)
    assert lam == 0.0
    assert pid.update(state, 40.0)[1] > 0.0


RECOVERY = {0.5: 190, 1.0: 90}
"""Updates within which λ is back under 1% of its peak, with the default gains, by how far J falls below the
limit: the integral unwinds from at most 10 by 0.1 |v| per update, and K_P |v| is subtracted at once."""


@pytest.mark.parametrize("below", RECOVERY)
@pytest.mark.parametrize("violation", [0.1, 1.0, 5.0, 30.0, 1e6])
def test_recovers_from_a_thousand_violated_updates(violation, below):
    pid = PID()
    state, lam, peak = pid.init(), 0.0, 0.0
    for _ in range(1000):
        state, lam = pid.update(state, violation)
        peak = max(peak, lam)
    for _ in range(RECOVERY[below]):
        state, lam = pid.update(state, -below)
    assert peak > 0
    assert lam < 0.01 * peak


def test_without_its_cap_the_integral_winds_up():
    """The trap of the peers: the same recovery takes more than ten times as long."""
    pid = PID(integral_max=1e9)
    state = pid.init()
    for _ in range(1000):
        state, peak = pid.update(state, 5.0)
    for _ in range(10 * RECOVERY[1.0]):
        state, lam = pid.update(state, -1.0)
    assert lam > 0.5 * peak


def test_a_large_first_violation_leaves_no_integral_to_unwind():
    """While P alone carries λ beyond the cap, the integral rests."""
    pid = PID(1.0, 0.1, 0.0, smoothing_p=0.0, integral_max=10.0)
    state = pid.init()
    for _ in range(50):
        state, lam = pid.update(state, 30.0)
    assert state.integral == 0.0
    assert lam == 30.0
    state, _ = pid.update(state, 4.0)
    assert state.integral == pytest.approx(0.4)


def test_integral_fills_up_to_the_cap_and_no_further():
    pid = PID(1.0, 0.1, 0.0, smoothing_p=0.0, integral_max=10.0)
    state = pid.init()
    for _ in range(500):
        state, lam = pid.update(state, 4.0)
    assert lam == pytest.approx(10.0)
    assert state.integral == pytest.approx(6.0)


def test_incremental_and_positional_control_agree_away_from_zero():
    """NuPI is PI control in increments: with no smoothing both differ by the constant K_P v₀ only."""
    violations = np.random.default_rng(1).uniform(0.5, 1.0, 50)
    pid, nupi = PID(0.3, 0.2, 0.0, smoothing_p=0.0, integral_max=1e9), NuPI(0.3, 0.2, nu=0.0, initial=0.3)
    a, b = pid.init(), nupi.init()
    for violation in violations:
        a, positional = pid.update(a, violation)
        b, incremental = nupi.update(b, violation)
        assert incremental - positional == pytest.approx(0.3 - 0.3 * violations[0], abs=1e-12)


def test_a_run_may_start_strict_and_earns_what_it_is_relaxed_by():
    """λ = I₀ before the first update; kept limits take K_I |v| off it at each, and none below 0."""
    pid = PID(0.0, 0.05, 0.0, initial=0.3)
    state = pid.init()
    assert pid.strength(state) == 0.3
    course = []
    for _ in range(10):
        state, lam = pid.update(state, -1.0)
        course.append(lam)
    assert course == pytest.approx([0.25, 0.2, 0.15, 0.1, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0], abs=1e-12)
