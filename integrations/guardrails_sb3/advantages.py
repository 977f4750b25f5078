"""Cost advantages, and how multipliers mix them into the advantages the host trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def gae(
    costs: FloatArray,
    values: FloatArray,
    last_values: FloatArray,
    dones: npt.NDArray[np.bool_],
    *,
    gamma: float,
    gae_lambda: float,
) -> FloatArray:
    """Generalised advantage estimation (Schulman et al. 2016) of several costs at once.

    A_t = δ_t + γ λ n_t A_{t+1} with δ_t = c_t + γ n_t V_{t+1} - V_t, where n_t is 0 if step t ended its
    episode and 1 otherwise. A step that was cut short by a time limit carries γ V(terminal observation)
    in its cost already, as Stable-Baselines3 does with rewards.

    Args:
        costs: ``(n_steps, n_envs, n_constraints)``.
        values: V at the observation of each step, same shape.
        last_values: ``(n_envs, n_constraints)``, V at the observations after the last step.
        dones: ``(n_steps, n_envs)``, whether a step ended its episode.
        gamma: discount γ in [0, 1].
        gae_lambda: λ in [0, 1]; 1 gives discounted costs-to-go less V.

    Returns:
        ``(n_steps, n_envs, n_constraints)`` float64.
    """
    goes_on = 1.0 - dones[..., None]
    following = np.concatenate([values[1:], last_values[None]])
    advantages: FloatArray = costs + gamma * goes_on * following - values
    decay = gamma * gae_lambda * goes_on
    for step in range(len(costs) - 2, -1, -1):
        advantages[step] += decay[step] * advantages[step + 1]
    return advantages


def mix(
    rewards: npt.NDArray[np.float32], costs: FloatArray, multipliers: Sequence[float], signs: Sequence[float]
) -> FloatArray:
    """Return A = (A_r - Σ λ_i s_i A_{c_i}) / (1 + Σ λ_i).

    Args:
        rewards: A_r, ``(n_steps, n_envs)``.
        costs: A_c, ``(n_steps, n_envs, n_constraints)``.
        multipliers: λ_i ≥ 0.
        signs: s_i, 1 for an upper limit and -1 for a lower one, of which the policy should give more.
    """
    lam = np.asarray(multipliers, dtype=np.float64)
    mixed: FloatArray = (rewards - costs @ (lam * np.asarray(signs))) / (1.0 + lam.sum())
    return mixed


def measurable(costs: FloatArray, scales: Sequence[float], signs: Sequence[float]) -> FloatArray:
    """Return ``costs`` with every step that could not be measured set to a cost that cannot loosen.

    A NaN or infinite step cost becomes the worst cost of the rollout or one whole violation scale,
    whichever is worse, so that failing to measure never looks safer than measuring. Finite costs beyond
    a million scales are clipped there, which keeps the float32 value network finite.

    Args:
        costs: ``(n_steps, n_envs, n_constraints)``.
        scales: violation scale of each constraint, in the cost's unit.
        signs: 1 for an upper limit, -1 for a lower one.
    """
    sign, scale = np.asarray(signs), np.asarray(scales)
    finite = np.isfinite(costs)
    if not finite.all():
        signed = np.where(finite, costs * sign, -np.inf)
        worst = np.maximum(signed.max(axis=(0, 1)), scale)
        costs = np.where(finite, costs, worst * sign)
    return np.clip(costs, -1e6 * scale, 1e6 * scale)
