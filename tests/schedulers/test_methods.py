"""Each method's own equation, by numbers worked out by hand or by another library."""

import math

import numpy as np
import pytest
import torch

from guardrails.schedulers import (
    CRPO,
    AdamLogDual,
    AdaptiveKL,
    Anneal,
    Augmented,
    AugmentedLagrangian,
    Cap,
    DualAscent,
    Fixed,
    LogDual,
    augmented_penalty,
    effective_multiplier,
)


def path(scheduler, violations):
    state, strengths = scheduler.init(), []
    for violation in violations:
        state, strength = scheduler.update(state, violation)
        strengths.append(strength)
    return strengths


def test_dual_ascent_sums_violations_and_stops_at_zero():
    assert path(DualAscent(0.5, initial=1.0), [2.0, -1.0, -10.0, 1.0]) == [2.0, 1.5, 0.0, 0.5]


def test_log_dual_is_gradient_ascent_on_the_logarithm():
    """Safe RLHF: SGD on -λ v over ln λ, clamped at ln λ_max. Its own code, in torch."""
    log_lambda = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([log_lambda], lr=0.1)
    violations, theirs = [0.5, 2.0, -1.0, 3.0, 3.0, 3.0, -0.2], []
    for violation in violations:
        optimizer.zero_grad()
        (-violation * log_lambda.exp()).backward()
        optimizer.step()
        with torch.no_grad():
            log_lambda.clamp_(max=math.log(5.0))
        theirs.append(log_lambda.exp().item())
    # the logarithm of λ is taken and undone in every step there
    assert path(LogDual(0.1, initial=1.0, maximum=5.0), violations) == pytest.approx(theirs, rel=1e-14)
    assert max(theirs) == pytest.approx(5.0)


def test_log_dual_rises_again_from_its_floor():
    strengths = path(LogDual(0.1, minimum=0.01), [-1e9] + [1.0] * 2000)
    assert strengths[0] == 0.01
    assert strengths[-1] == 10.0


def test_adam_log_dual_is_adam_on_the_logarithm():
    """ALGD: Adam on λ (h - Q_c) over ln λ, from ln 2. By torch."""
    log_lambda = torch.nn.Parameter(torch.tensor(math.log(math.log(2.0)), dtype=torch.float64))
    optimizer = torch.optim.Adam([log_lambda], lr=0.03, betas=(0.9, 0.99))
    violations, theirs = [0.5, 2.0, -1.0, 30.0, 3.0, 0.0, -0.2], []
    for violation in violations:
        optimizer.zero_grad()
        (-violation * log_lambda.exp()).backward()
        optimizer.step()
        theirs.append(log_lambda.exp().item())
    own = AdamLogDual(0.03, initial=math.log(2.0), mean_smoothing=0.9, square_smoothing=0.99)
    # torch adds ε to a root that is divided by √(1-β₂ᵗ) in another order, and takes the logarithm's way round
    assert path(own, violations) == pytest.approx(theirs, rel=1e-12)


def test_adam_log_dual_stays_between_its_ends():
    strengths = path(AdamLogDual(0.5, minimum=0.01, maximum=2.0, mean_smoothing=0.0), [-3.0] * 100 + [3.0] * 100)
    assert min(strengths) == 0.01
    assert strengths[-1] == 2.0


def test_augmented_dual_ascent_is_the_augmented_lagrangian():
    violations = np.random.default_rng(0).normal(0.3, 1.0, 60).tolist()
    ours, known = Augmented(DualAscent(0.1, initial=0.4), 2.0), AugmentedLagrangian(2.0, learning_rate=0.1, initial=0.4)
    assert path(ours, violations) == path(known, violations)
    assert path(Cap(ours, 0.8), violations) == path(Cap(known, 0.8), violations)
    state, same = ours.init(), known.init()
    for violation in violations:
        state, same = ours.update(state, violation)[0], known.update(same, violation)[0]
        assert ours.penalty(state, violation) == known.penalty(same, violation)


def test_adaptive_kl_moves_by_the_clipped_relative_error():
    scheduler = AdaptiveKL(0.5, batch_size=256, horizon=10_000)
    up = path(scheduler, [0.1])[0]
    assert up == 0.5 * (1 + 0.1 * 256 / 10_000)
    assert path(scheduler, [7.0])[0] == path(scheduler, [0.2])[0] == 0.5 * (1 + 0.2 * 256 / 10_000)
    assert path(scheduler, [-1.0])[0] == path(scheduler, [-0.2])[0] == 0.5 * (1 - 0.2 * 256 / 10_000)
    assert path(AdaptiveKL(0.5, minimum=0.4999, maximum=0.5), [3.0, -3.0, -3.0]) == [0.5, 0.4999, 0.4999]


def test_linear_annealing_arrives_and_stays():
    assert path(Anneal(1.0, 3.0, updates=4), [9.0, -9.0, 0.0, 1.0, 1.0, 1.0]) == [1.5, 2.0, 2.5, 3.0, 3.0, 3.0]


def test_cosine_annealing_starts_and_ends_flat():
    expected = [1.0 + (1.0 - math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)]
    assert path(Anneal(1.0, 3.0, updates=4, shape="cosine"), [0.0] * 4) == pytest.approx(expected, rel=1e-15)
    assert Anneal(1.0, 3.0, updates=4).init().multiplier == 1.0


def test_fixed_does_not_move():
    assert path(Fixed(0.7), [1e9, -1e9]) == [0.7, 0.7]


def test_crpo_optimises_the_cost_alone_while_violated():
    strengths = path(CRPO(0.1), [0.05, 0.1, 0.2, 0.0])
    assert strengths == [0.0, 0.0, 1e6, 0.0]
    reward, cost, lam = np.array([1.0, -2.0]), np.array([0.5, -0.5]), strengths[2]
    mixed = (reward - lam * cost) / (1.0 + lam)
    # 3e-6: the reward's share of the advantage, 1 / (1 + Λ), times its size
    assert mixed == pytest.approx(-cost, abs=3e-6)


def test_augmented_lagrangian_gives_the_effective_multiplier_and_updates_its_dual():
    scheduler = AugmentedLagrangian(2.0, learning_rate=0.5)
    state, strength = scheduler.update(scheduler.init(), 1.0)
    assert (strength, state.dual) == (2.0, 0.5)
    state, strength = scheduler.update(state, 1.0)
    assert (strength, state.dual) == (2.5, 1.0)
    state, strength = scheduler.update(state, -1.0)
    assert (strength, state.dual) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("growth", "expected"),
    [({}, [1, 1, 1, 1, 1]), ({"growth_factor": 2.0}, [2, 4, 4, 1, 2]), ({"growth_increment": 1.0}, [2, 3, 3, 1, 2])],
    ids=["fixed", "multiplicative", "additive"],
)
def test_penalty_coefficient_grows_while_infeasible_holds_within_tolerance_and_is_reset(growth, expected):
    scheduler = AugmentedLagrangian(1.0, tolerance=0.01, **growth)
    state, coefficients = scheduler.init(), []
    for violation in (1.0, 1.0, 0.005, 0.0, 1.0):
        state, _ = scheduler.update(state, violation)
        coefficients.append(state.penalty_coefficient)
    assert coefficients == expected


def test_penalty_coefficient_stops_at_its_maximum():
    scheduler = AugmentedLagrangian(1.0, growth_factor=10.0, penalty_max=50.0)
    state = scheduler.init()
    for _ in range(5):
        state, _ = scheduler.update(state, 1.0)
    assert state.penalty_coefficient == 50.0


@pytest.mark.parametrize("multiplier", [0.0, 0.7])
@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_augmented_penalty_has_the_effective_multiplier_as_its_gradient(multiplier, rho):
    g = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64, requires_grad=True)
    penalty = augmented_penalty(g, multiplier, rho)
    expected = (torch.relu(multiplier + rho * g) ** 2 - multiplier**2) / (2 * rho)
    assert torch.equal(penalty, expected)
    (gradient,) = torch.autograd.grad(penalty.sum(), g)
    effective = effective_multiplier(g, multiplier, rho)
    torch.testing.assert_close(gradient, effective, rtol=1e-15, atol=1e-15)  # 2ρ/2ρ rounds once
    assert torch.equal(effective, torch.relu(multiplier + rho * g))
    assert torch.autograd.gradcheck(lambda x: augmented_penalty(x, multiplier, rho), (g,))


def test_augmented_penalty_of_a_float_equals_that_of_a_tensor():
    for violation in (-3.0, 0.0, 0.4):
        assert augmented_penalty(violation, 0.5, 2.0) == augmented_penalty(
            torch.tensor(violation, dtype=torch.float64), 0.5, 2.0
        )


def test_loss_term_of_a_scheduler_follows_its_state():
    augmented = AugmentedLagrangian(2.0, learning_rate=0.25, initial=0.5)
    state, strength = augmented.update(augmented.init(), 1.0)
    cost = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    augmented.penalty(state, cost).backward()
    assert strength == 2.5
    assert cost.grad.item() == 0.75 + 2.0 * 1.5  # λ + ρ v with the new λ = 0.5 + 0.25
    dual = DualAscent(0.5)
    state, strength = dual.update(dual.init(), 4.0)
    assert dual.penalty(state, 1.5) == strength * 1.5
