"""GAE of costs against an episode-by-episode reference, and the mixing formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardrails_sb3.advantages import gae, measurable, mix


def reference(costs, values, last, dones, gamma, lam):
    """A_t as the explicit sum Σ_k (γλ)^k δ_{t+k} within the episode, one environment and constraint at a time."""
    n_steps, n_envs, n_costs = costs.shape
    advantages = np.zeros(costs.shape)
    for env in range(n_envs):
        for k in range(n_costs):
            for t in range(n_steps):
                total, weight = 0.0, 1.0
                for u in range(t, n_steps):
                    ends = dones[u, env]
                    following = last[env, k] if u == n_steps - 1 else values[u + 1, env, k]
                    delta = costs[u, env, k] + (0.0 if ends else gamma * following) - values[u, env, k]
                    total += weight * delta
                    weight *= gamma * lam
                    if ends:
                        break
                advantages[t, env, k] = total
    return advantages


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_steps=st.integers(1, 12),
    n_envs=st.integers(1, 3),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_gae_equals_the_sum_over_each_episode(seed, n_steps, n_envs, gamma, lam):
    random = np.random.default_rng(seed)
    costs, values = random.normal(size=(2, n_steps, n_envs, 2))
    last = random.normal(size=(n_envs, 2))
    dones = random.random((n_steps, n_envs)) < 0.3
    expected = reference(costs, values, last, dones, gamma, lam)
    found = gae(costs, values, last, dones, gamma=gamma, gae_lambda=lam)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)  # float64 sums in another order


def test_mix_subtracts_upper_limits_adds_lower_ones_and_keeps_the_scale():
    rewards = np.array([[1.0, 2.0]], np.float32)
    costs = np.array([[[1.0, 10.0], [3.0, 20.0]]])
    mixed = mix(rewards, costs, [0.5, 2.0], [1.0, -1.0])
    np.testing.assert_array_equal(mixed, [[(1 - 0.5 * 1 + 2 * 10) / 3.5, (2 - 0.5 * 3 + 2 * 20) / 3.5]])


def test_mix_with_multipliers_of_zero_returns_the_rewards_bit_for_bit():
    rewards = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    costs = np.random.default_rng(1).normal(size=(50, 3, 2)) * 1e6
    np.testing.assert_array_equal(mix(rewards, costs, [0.0, 0.0], [1.0, -1.0]).astype(np.float32), rewards)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_an_unmeasurable_step_is_at_least_as_bad_as_any_measured_one_and_as_one_scale(broken):
    costs = np.array([[[1.0, 1.0]], [[broken, broken]], [[40.0, -3.0]]])
    repaired = measurable(costs, [25.0, 2.0], [1.0, -1.0])
    np.testing.assert_array_equal(repaired[:, 0, 0], [1.0, 40.0, 40.0])
    np.testing.assert_array_equal(repaired[:, 0, 1], [1.0, -3.0, -3.0])
    repaired = measurable(np.full((1, 1, 2), broken), [25.0, 2.0], [1.0, -1.0])
    np.testing.assert_array_equal(repaired[0, 0], [25.0, -2.0])


def test_finite_costs_are_left_alone_up_to_a_million_scales():
    costs = np.array([[[0.5]], [[1e300]], [[-1e300]]])
    np.testing.assert_array_equal(measurable(costs, [2.0], [1.0])[:, 0, 0], [0.5, 2e6, -2e6])
