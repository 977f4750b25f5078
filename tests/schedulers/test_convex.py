"""Dual methods reach the primal and the dual solution of convex programs, at the rate theory gives."""

import numpy as np
import pytest
from problems import (
    BANDIT,
    DEGENERATE,
    DEGENERATE_BANDIT,
    DEGENERATE_LP,
    INACTIVE,
    INACTIVE_BANDIT,
    KNAPSACK,
    MIXED,
    SINGLE,
    TRUST_REGION,
)

from guardrails.schedulers import PID, AdamAscent, AdaptiveKL, AugmentedLagrangian, Cap, DualAscent, LogDual, NuPI

# Converged runs end at rounding error: sums of a few terms of order 1, so 1e-9 leaves room and hides nothing.
ROUNDING = 1e-9

# ε = 0.1 bounds Adam's gain by η / ε = 1, below 2 / m; with ε → 0 its step never shrinks and it only hovers.
DUAL_METHODS = [
    DualAscent(0.3, initial=0.5),
    AdamAscent(0.1, initial=0.5, epsilon=0.1, square_smoothing=0.9),
    NuPI(0.2, 0.3, nu=0.5, initial=0.5),
    PID(0.2, 0.3, 0.0, smoothing_p=0.5),
    PID(0.2, 0.2, 0.2, smoothing_p=0.5),
    Cap(DualAscent(0.3), 10.0),
]
POSITIVE_METHODS = [*DUAL_METHODS, LogDual(0.1, initial=0.5, minimum=1e-3, maximum=100.0)]
names = dict(ids=lambda each: repr(each)[:40])


def solve_qp(scheduler, problem, updates):
    """Let one scheduler run every constraint, the primal solved exactly in between."""
    n = len(problem.b)
    states, multipliers, path = scheduler.init_many(n), np.full(n, scheduler.strength(scheduler.init())), []
    for _ in range(updates):
        states, multipliers = scheduler.update_many(states, problem.violations(problem.minimiser(multipliers)))
        path.append(multipliers)
    return problem.minimiser(multipliers), multipliers, np.array(path)


@pytest.mark.parametrize("scheduler", POSITIVE_METHODS, **names)
def test_quadratic_program_reaches_primal_and_dual_solution(scheduler):
    x, multipliers, _ = solve_qp(scheduler, SINGLE, 1500)
    assert multipliers == pytest.approx(SINGLE.dual, abs=ROUNDING)
    assert x == pytest.approx(SINGLE.primal, abs=ROUNDING)


@pytest.mark.parametrize("scheduler", DUAL_METHODS, **names)
def test_quadratic_program_with_active_and_inactive_constraints(scheduler):
    x, multipliers, _ = solve_qp(scheduler, MIXED, 3000)
    assert multipliers == pytest.approx(MIXED.dual, abs=ROUNDING)
    assert multipliers[1] == 0.0
    assert x == pytest.approx(MIXED.primal, abs=ROUNDING)


@pytest.mark.parametrize("scheduler", DUAL_METHODS, **names)
@pytest.mark.parametrize("problem", [INACTIVE, DEGENERATE], ids=["inactive", "degenerate"])
def test_a_constraint_that_costs_nothing_ends_with_multiplier_zero(scheduler, problem):
    x, multipliers, _ = solve_qp(scheduler, problem, 3000)
    assert multipliers == pytest.approx(0.0, abs=0.0 if problem is INACTIVE else ROUNDING)
    assert x == pytest.approx(problem.primal, abs=ROUNDING)


def test_log_dual_ends_at_its_floor_when_the_constraint_is_inactive():
    _, multipliers, _ = solve_qp(LogDual(0.5, minimum=1e-3), INACTIVE, 5000)
    assert multipliers == pytest.approx(1e-3, abs=0.0)


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.7])
def test_dual_ascent_contracts_by_one_minus_rate_times_curvature(rate):
    _, _, path = solve_qp(DualAscent(rate, initial=1.0), SINGLE, 12)
    errors = path[:, 0] - SINGLE.dual[0]
    # 1e-15: λ is 1.7 and known to its last bits, which differ between processors; the errors shrink from 0.09 to 1e-11
    assert errors[1:] == pytest.approx((1.0 - rate * SINGLE.curvature[0, 0]) * errors[:-1], rel=1e-6, abs=1e-15)


def test_dual_ascent_diverges_beyond_twice_the_inverse_curvature():
    _, _, stable = solve_qp(DualAscent(1.9 / 1.25), SINGLE, 400)
    _, _, unstable = solve_qp(DualAscent(2.1 / 1.25), SINGLE, 400)
    assert abs(stable[-1, 0] - SINGLE.dual[0]) < ROUNDING
    assert abs(unstable[-1, 0] - SINGLE.dual[0]) > 0.1


def solve_augmented(scheduler, problem, updates):
    n = len(problem.b)
    states, path = scheduler.init_many(n), []
    for _ in range(updates):
        x = problem.augmented_minimiser(states.dual, states.penalty_coefficient[0])
        states, _ = scheduler.update_many(states, problem.violations(x))
        path.append(states.dual)
    return x, states, np.array(path)


@pytest.mark.parametrize("rho", [0.5, 2.0, 50.0])
def test_augmented_lagrangian_contracts_by_the_inverse_of_one_plus_rho_curvature(rho):
    _, _, path = solve_augmented(AugmentedLagrangian(rho, initial=1.0), SINGLE, 5)
    errors = path[:, 0] - SINGLE.dual[0]
    # 1e-4: with ρ = 50 the last error is 1e-9, of which rounding leaves five digits
    assert errors[1:] / errors[:-1] == pytest.approx(1.0 / (1.0 + rho * SINGLE.curvature[0, 0]), rel=1e-4)


@pytest.mark.parametrize("problem", [SINGLE, MIXED, INACTIVE, DEGENERATE], ids=["single", "mixed", "inactive", "degen"])
@pytest.mark.parametrize("scheduler", [AugmentedLagrangian(1.0), AugmentedLagrangian(30.0)], **names)
def test_augmented_lagrangian_reaches_primal_and_dual_solution(scheduler, problem):
    x, states, _ = solve_augmented(scheduler, problem, 200)
    assert states.dual == pytest.approx(problem.dual, abs=ROUNDING)
    assert states.multiplier == pytest.approx(problem.dual, abs=ROUNDING)
    assert x == pytest.approx(problem.primal, abs=ROUNDING)


def test_a_violation_scale_multiplies_the_multiplier_and_leaves_the_solution():
    """L = f + Σ λ g / scale, so λ is in units of the scale."""
    scale, scheduler = 25.0, DualAscent(5.0)
    state, lam = scheduler.init(), 0.0
    for _ in range(4000):
        x = SINGLE.minimiser(np.array([lam / scale]))
        state, lam = scheduler.update(state, float(SINGLE.violations(x)[0]) / scale)
    assert lam / scale == pytest.approx(SINGLE.dual[0], abs=ROUNDING)


def test_two_one_sided_constraints_reach_the_signed_multiplier_of_a_target():
    """aᵀx = b as ≤ and ≥: λ⁺ - λ⁻ is the equality multiplier, here negative."""
    a, b, q = np.array([1.0, 2.0]), 1.0, np.array([0.3, 0.1])
    expected = (-a @ q - b) / (a @ a)
    scheduler = DualAscent(0.1)
    upper, lower, lam = scheduler.init(), scheduler.init(), 0.0
    for _ in range(500):
        residual = float(a @ -(q + lam * a)) - b
        upper, plus = scheduler.update(upper, residual)
        lower, minus = scheduler.update(lower, -residual)
        lam = plus - minus
    assert expected < 0
    assert lam == pytest.approx(expected, abs=ROUNDING)


def test_dual_ascent_on_a_linear_program_keeps_the_textbook_bounds():
    """Constant step η, T updates, λ₀ = 0: the averaged primal is feasible up to λ_T / ηT, and the best
    dual value is within ‖λ*‖² / 2ηT + ηG² / 2 of the optimum; the averaged
    primal value is at most ηG² / 2 above it (Nedić & Ozdaglar 2009)."""
    eta, updates = 0.01, 4000
    _, dual, optimum = KNAPSACK.solution()
    scheduler = DualAscent(eta)
    states, lam = scheduler.init_many(2), np.zeros(2)
    primal, best, largest = [], -np.inf, 0.0
    for _ in range(updates):
        x = KNAPSACK.minimiser(lam)
        best = max(best, KNAPSACK.dual_value(lam))
        violations = KNAPSACK.A @ x - KNAPSACK.b
        largest = max(largest, float(violations @ violations))
        states, lam = scheduler.update_many(states, violations)
        primal.append(x)
    average = np.mean(primal, axis=0)
    assert (KNAPSACK.A @ average - KNAPSACK.b <= lam / (eta * updates) + ROUNDING).all()
    assert 0.0 <= optimum - best <= dual @ dual / (2 * eta * updates) + eta * largest / 2
    assert -dual @ lam / (eta * updates) - ROUNDING <= KNAPSACK.c @ average - optimum <= eta * largest / 2
    # λ itself hovers within a step of the solution
    assert lam == pytest.approx(dual, abs=2 * eta * np.sqrt(largest))


def test_augmented_lagrangian_solves_a_linear_program_to_both_solutions():
    expected, dual, _ = KNAPSACK.solution()
    scheduler = AugmentedLagrangian(5.0)
    states, x = scheduler.init_many(2), np.zeros(3)
    for _ in range(30):
        x = KNAPSACK.augmented_minimiser(states.dual, 5.0, x)
        states, _ = scheduler.update_many(states, KNAPSACK.A @ x - KNAPSACK.b)
    assert x == pytest.approx(expected, abs=1e-6)  # what L-BFGS-B reaches on the inner problem
    assert states.dual == pytest.approx(dual, abs=1e-5)  # times ρ


def test_augmented_lagrangian_finds_a_dual_solution_where_it_is_not_unique():
    _, _, optimum = DEGENERATE_LP.solution()
    scheduler = AugmentedLagrangian(2.0)
    states, x = scheduler.init_many(4), np.zeros(2)
    for _ in range(30):
        x = DEGENERATE_LP.augmented_minimiser(states.dual, 2.0, x)
        states, _ = scheduler.update_many(states, DEGENERATE_LP.A @ x - DEGENERATE_LP.b)
    assert x == pytest.approx([0.5, 0.5], abs=1e-6)
    assert DEGENERATE_LP.dual_value(states.dual) == pytest.approx(optimum, abs=1e-5)


def solve_bandit(scheduler, problem, updates):
    state = scheduler.init()
    lam = scheduler.strength(state)
    for _ in range(updates):
        state, lam = scheduler.update(state, problem.cost(lam) - problem.limit)
    return lam


@pytest.mark.parametrize("scheduler", POSITIVE_METHODS, **names)
def test_regularised_bandit_reaches_the_softmax_solution(scheduler):
    lam = solve_bandit(scheduler, BANDIT, 4000)
    assert lam == pytest.approx(BANDIT.dual(), abs=ROUNDING)
    assert BANDIT.policy(lam) @ BANDIT.costs == pytest.approx(BANDIT.limit, abs=ROUNDING)


@pytest.mark.parametrize("scheduler", DUAL_METHODS, **names)
@pytest.mark.parametrize("problem", [INACTIVE_BANDIT, DEGENERATE_BANDIT], ids=["inactive", "degenerate"])
def test_bandit_that_keeps_its_limit_by_itself_needs_no_multiplier(scheduler, problem):
    assert solve_bandit(scheduler, problem, 4000) == pytest.approx(0.0, abs=ROUNDING)


@pytest.mark.parametrize("initial", [0.02, 20.0], ids=["from below", "from above"])
def test_adaptive_kl_finds_the_coefficient_of_the_trust_region_from_both_sides(initial):
    scheduler = AdaptiveKL(initial, batch_size=1000, horizon=10_000)
    state, beta = scheduler.init(), initial
    for _ in range(3000):
        state, beta = scheduler.update(state, TRUST_REGION.kl(beta) / TRUST_REGION.target - 1.0)
    assert beta == pytest.approx(TRUST_REGION.dual(), abs=ROUNDING)


def linear_game(scheduler, updates):
    """min -x subject to x ≤ 1 by gradient steps: λ* = 1, x* = 1, and no curvature to damp anything."""
    x, state, lam, distance = 0.0, scheduler.init(), 0.0, []
    for _ in range(updates):
        x -= 0.1 * (-1.0 + lam)
        state, lam = scheduler.update(state, x - 1.0)
        distance.append(np.hypot(x - 1.0, lam - 1.0))
    return distance


@pytest.mark.parametrize("scheduler", [NuPI(1.0, 0.1, nu=0.0), PID(1.0, 0.1, 0.0, smoothing_p=0.0)], **names)
def test_proportional_control_damps_the_oscillation_of_dual_ascent(scheduler):
    assert min(linear_game(DualAscent(0.1), 600)[-100:]) > 0.1
    assert max(linear_game(scheduler, 600)[-100:]) < ROUNDING
