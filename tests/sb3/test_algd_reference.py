"""ALGD part by part against `algd_reference`, which is numpy, float64 and derived by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
from algd_reference import (
    MLP,
    energy,
    evaluate,
    penalty,
    relu,
    score_target,
    silu,
    ve_sigmas,
    ve_step,
)

LIMIT, MULTIPLIER, RHO = 0.3, 0.7, 2.5


def perceptrons(draw, number, sizes, activation):
    def layers():
        return [
            (draw.normal(size=(n_in, n_out)) / math.sqrt(n_in), 0.3 * draw.normal(size=n_out))
            for n_in, n_out in pairwise(sizes)
        ]

    return [MLP(layers(), activation) for _ in range(number)]


def landscape(draw):
    """Two reward critics and four cost critics of observation (3) and action (2), as the paper has them, smaller."""
    return perceptrons(draw, 2, [5, 16, 16, 1], relu), perceptrons(draw, 4, [5, 16, 16, 16, 1], silu)


def reference_energy(critics, cost_critics, observations, actions, **settings):
    settings = {"limit": LIMIT, "multiplier": MULTIPLIER, "rho": RHO} | settings
    return energy(*evaluate(critics, observations, actions), *evaluate(cost_critics, observations, actions), **settings)


# The reference itself: derivatives against differences, and what is known in closed form.


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_the_references_derivative_by_the_actions_is_that_of_its_energy(rho):
    draw = np.random.default_rng(0)
    critics, cost_critics = landscape(draw)
    observations, actions = draw.normal(size=(64, 3)), draw.uniform(-1.0, 1.0, size=(64, 2))
    _, slopes = reference_energy(critics, cost_critics, observations, actions, rho=rho)
    for column in range(2):
        step = np.zeros(2)
        step[column] = 1e-6
        above = reference_energy(critics, cost_critics, observations, actions + step, rho=rho)[0]
        below = reference_energy(critics, cost_critics, observations, actions - step, rho=rho)[0]
        # central differences of a function of order 1: rounding 1e-16 / 1e-6, curvature 1e-12; a kink is not met
        np.testing.assert_allclose(slopes[:, column], (above - below) / 2e-6, atol=1e-8)


def test_the_augmented_penalty_is_the_plain_one_for_a_vanishing_rho():
    violations = np.linspace(-0.5, 0.5, 11)
    value, slope = penalty(violations, MULTIPLIER, 1e-9)
    plain, plain_slope = penalty(violations, MULTIPLIER, 0.0)
    np.testing.assert_allclose(value, plain, atol=1e-6)  # ρ/2 · g², and cancellation in λ² of 1e-16 / 1e-9
    np.testing.assert_allclose(slope, plain_slope, atol=1e-8)


def test_the_score_target_is_the_score_of_the_smoothed_boltzmann_distribution():
    """∇ log E exp(-L(a + σε)/β); for L = k a²/2 that is the Gaussian of variance β/k + σ²."""
    draw = np.random.default_rng(0)
    stiffness, beta, sigma = 2.0, 0.5, 0.4
    places = np.linspace(-1.0, 1.0, 5)[:, None]
    near = places + sigma * draw.normal(size=(200_000, 5, 1))
    found = score_target(0.5 * stiffness * near[..., 0] ** 2, stiffness * near, beta)
    exact = -places / (beta / stiffness + sigma**2)
    # 200,000 weighted samples whose deviation is about 2: four standard errors
    np.testing.assert_allclose(found, exact, atol=4 * 2 / math.sqrt(200_000))


def test_the_reverse_steps_of_the_reference_draw_from_the_distribution_whose_score_they_follow():
    """With the exact score of N(0, s²) smoothed by σ_t, many small VE steps leave the variance s²."""
    draw = np.random.default_rng(0)
    sigmas, own = ve_sigmas(400), 0.5
    latents = math.hypot(own, sigmas[-1]) * draw.normal(size=20_000)
    for t in range(399, -1, -1):
        latents = ve_step(latents, -latents / (own**2 + sigmas[t] ** 2), sigmas, t, draw.normal(size=20_000))
    # four standard errors of a variance, √(2/n), and a step bias of the order Δσ²
    assert latents.var() == pytest.approx(own**2, rel=4 * math.sqrt(2 / 20_000) + 0.02)
