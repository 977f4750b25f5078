"""A plant with the traits of a training run in one number: J, which the reward pushes up and λ down."""

from __future__ import annotations

import numpy as np

from guardrails.schedulers import ConstraintScheduler

DISTURBANCES = {
    "step": "pull doubles at 80",
    "drift": "pull grows from 1 to 5",
    "noise": "J measured ± 50%",
    "delay": "λ acts 4 updates late",
}


def plant(scheduler: ConstraintScheduler, disturbance: str, updates: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Return J / limit and λ over the updates: ln J moves by 0.15 (w - λ) / (1 + λ), with the pull w = 2 J^-1/2.

    J starts at 5 limits and cannot exceed them; at the limit the pull is balanced by λ = 2.
    """
    rng = np.random.default_rng(0)
    log_cost, state = np.log(5.0), scheduler.init()
    in_force = [scheduler.strength(state)] * 4
    costs, multipliers = [], []
    for t in range(updates):
        cost = float(np.exp(log_cost))
        measured = cost * rng.gamma(4.0) / 4.0 if disturbance == "noise" else cost
        state, lam = scheduler.update(state, measured - 1.0)
        in_force.append(lam)
        acting = in_force[-4] if disturbance == "delay" else lam
        pull = 2.0
        if disturbance == "step" and t >= 80:
            pull = 4.0
        if disturbance == "drift":
            pull = 1.0 + 4.0 * t / updates
        log_cost = min(log_cost + 0.15 * (pull * cost**-0.5 - acting) / (1.0 + acting), np.log(5.0))
        costs.append(cost)
        multipliers.append(lam)
    return np.array(costs), np.array(multipliers)
