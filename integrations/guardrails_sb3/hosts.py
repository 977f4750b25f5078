"""Which algorithms can be guarded, and by what: each family of hosts has a callback of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from guardrails import AttachError, Guard
from guardrails.competence import CriticCalibration
from guardrails.constraint import PENALTY
from guardrails.critic import Ensemble
from guardrails.parts import sort
from guardrails_sb3 import seams
from guardrails_sb3.costs import PREDICTED
from guardrails_sb3.off_policy import OffPolicyGuard
from guardrails_sb3.on_policy import OnPolicyGuard
from guardrails_sb3.population import PopulationGuard
from guardrails_sb3.replay_critic import ReplayCritic
from guardrails_sb3.rollout_critic import RolloutCritic
from guardrails_sb3.safety_critic import horizon

HostGuard = OnPolicyGuard | OffPolicyGuard | PopulationGuard


def callback(
    model: BaseAlgorithm,
    guard: Guard,
    cost_critic: bool | Ensemble,
    steps: int | None,
    dual_interval: int | None = None,
) -> HostGuard:
    """Return the callback that guards a host, with its critics.

    Args:
        model: a host that `check` has passed.
        guard: decides the multipliers.
        cost_critic: see `guardrails_sb3.wrap`.
        steps: of an episode, if the user has given them.
        dual_interval: see `guardrails_sb3.wrap`.

    Raises:
        AttachError: if a safety critic is to be used and the horizon is not known, or the host's internals are not.
    """
    settings = cost_critic if isinstance(cost_critic, Ensemble) else Ensemble()
    if isinstance(model, OffPolicyAlgorithm):
        learned = ReplayCritic(model, guard, settings, horizon(model, steps)) if guard.constraints else None
        return OffPolicyGuard(model, guard, learned, dual_interval)
    if isinstance(model, OnPolicyAlgorithm):
        asked = isinstance(cost_critic, Ensemble) and bool(guard.constraints)
        critic = RolloutCritic(model, guard, settings, horizon(model, steps)) if asked else None
        return OnPolicyGuard(model, guard, cost_critic=bool(cost_critic), critic=critic)
    return PopulationGuard(model, guard)


def check(model: Any, guard: Any, cost_critic: Any, dual_interval: Any = None) -> None:
    """Raise AttachError unless ``model`` can be guarded by ``guard`` with such a critic and such decisions."""
    name = type(model).__name__
    if not isinstance(model, BaseAlgorithm):
        raise AttachError(f"wrap takes a Stable-Baselines3 model such as PPO('MlpPolicy', env), not {name}.")
    if not isinstance(guard, Guard):
        raise AttachError(f"wrap takes a Guard as its second argument, not {type(guard).__name__}.")
    population = seams.is_population(model)
    if not isinstance(model, (OnPolicyAlgorithm, OffPolicyAlgorithm)) and not population:
        raise AttachError(
            f"{name} collects no rollouts that a guard could act on. Use PPO, A2C, TRPO, RecurrentPPO or "
            "MaskablePPO, one of SAC, TD3, DDPG, DQN, TQC, CrossQ and QRDQN, or ARS."
        )
    acts = guard.constraints or guard.action_sets or guard.refinement is not None
    if not acts and set(guard.dials) <= {PENALTY}:
        raise AttachError(
            f"This Guard has no Constraint, and its dial '{PENALTY}' scales nothing without. Give it a Constraint."
        )
    _check_critic(model, guard, cost_critic)
    _check_interval(model, guard, dual_interval)
    if population and guard.action_sets:
        raise AttachError(
            f"{name} evaluates candidates that are not the model itself, so action sets would not reach them. Wrap its "
            "environments in SafeActions, or use another algorithm."
        )
    guard.check_columns(_columns(model, guard), f"the {name} host")
    _check_metrics(model, guard, cost_critic)
    if model.env is None:
        raise AttachError(f"This {name} has no environment to learn in. Give load(path, env=env) or call set_env(env).")
    seams.check(model)


def _check_critic(model: BaseAlgorithm, guard: Guard, cost_critic: Any) -> None:
    name = type(model).__name__
    if not isinstance(cost_critic, (bool, Ensemble)):
        raise AttachError(f"wrap: cost_critic is {cost_critic!r}; give True, False or an Ensemble.")
    if isinstance(model, OffPolicyAlgorithm) and not cost_critic and guard.constraints:
        raise AttachError(
            f"{name} learns from single transitions, so its constraints act through a learned critic alone. Leave "
            "cost_critic as it is, or give an Ensemble."
        )
    if seams.is_population(model) and isinstance(cost_critic, Ensemble):
        raise AttachError(f"{name} judges whole episodes and has no use for a safety critic. Leave cost_critic out.")


def _check_metrics(model: BaseAlgorithm, guard: Guard, cost_critic: Any) -> None:
    """Raise AttachError if a metric judges the predictions of a safety critic that there will not be."""
    if isinstance(model, OffPolicyAlgorithm) or isinstance(cost_critic, Ensemble):
        return
    for metric in (each.measured for gate in sort(guard.parts).gates.values() for each in gate.requires):
        if isinstance(metric, CriticCalibration) and metric.predicted.partition("/")[0] == PREDICTED:
            learned = "" if seams.is_population(model) else "Give wrap(..., cost_critic=Ensemble()). "
            raise AttachError(
                f"Metric '{metric.name}' reads info['{metric.predicted}'], what a safety critic predicted of each "
                f"episode, and this {type(model).__name__} learns none. {learned}CriticCalibration(predicted=...) "
                "reads another key, which the environment has to give at the end of each episode."
            )


def _check_interval(model: BaseAlgorithm, guard: Guard, interval: Any) -> None:
    if interval is None:
        return
    if not isinstance(model, OffPolicyAlgorithm) or not guard.constraints:
        raise AttachError(
            "wrap: dual_interval counts the gradient steps of an off-policy algorithm that learns a safety critic for "
            "its constraints, and there is none here. Leave it out: the guard then decides on episodes."
        )
    if not isinstance(interval, (int, np.integer)) or isinstance(interval, bool) or interval < 1:
        raise AttachError(f"wrap: dual_interval is {interval!r}; give a whole number of gradient steps, at least 1.")


def _columns(model: BaseAlgorithm, guard: Guard) -> set[str]:
    """Return the names of the columns that a host provides to metrics."""
    columns = {"rewards", "costs", "lengths", "infos", *(part.name for part in guard.constraints)}
    if seams.is_population(model):
        return columns
    if not isinstance(model.observation_space, spaces.Dict):
        columns.add("observations")
    return columns | {"actions"}
