"""evaluate_guarded: what a guarded model achieves and costs, with bounds on how far that may be chance."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from guardrails import AttachError, Constraint, Guard
from guardrails.competence import EmpiricalBernstein
from guardrails.schedulers.base import check_number, whole_number
from guardrails_sb3.action_sets import pictures, situations
from guardrails_sb3.action_sets.acting import MASKS, Acting, Predict
from guardrails_sb3.action_sets.base import Situation
from guardrails_sb3.action_sets.deployment import SafeActions
from guardrails_sb3.action_sets.enforcement import EPISODE, Memory
from guardrails_sb3.cost_value import own_randomness
from guardrails_sb3.costs import cost_reader
from guardrails_sb3.dials import ACTION_SCALE, Dials, scales_actions
from guardrails_sb3.wrap import attachment_of

FloatArray = npt.NDArray[np.float64]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes and its confidence interval.

    Args:
        mean: over the episodes.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_guarded` found, per episode.

    Intervals of means are percentile bootstraps: approximate, and too narrow for a handful of episodes. Those of
    violation rates are empirical-Bernstein confidence sequences: they hold for any number of episodes.

    Args:
        n_episodes: how many.
        deterministic: whether the policy's most likely action was taken, or one was drawn.
        confidence: of each interval.
        reward: the undiscounted return, as the environment gives it.
        length: steps.
        costs: undiscounted cost of each constraint; an episode that could not be measured counts as in training.
        violation_rates: share of the episodes whose own cost is beyond the limit in force, or not measurable.
        interventions: steps on which a set changed the action, by set, and on which any did under ``"total"``.
    """

    n_episodes: int
    deterministic: bool
    confidence: float
    reward: Estimate
    length: Estimate
    costs: Mapping[str, Estimate]
    violation_rates: Mapping[str, Estimate]
    interventions: Mapping[str, Estimate]

    def __str__(self) -> str:
        lines = [f"{self.n_episodes} episodes, {'deterministic' if self.deterministic else 'drawn'} actions"]
        named = {"return": self.reward, "length": self.length}
        named |= {f"cost {name}": each for name, each in self.costs.items()}
        named |= {f"violation rate {name}": each for name, each in self.violation_rates.items()}
        named |= {f"interventions {name}": each for name, each in self.interventions.items()}
        return "\n".join(lines + [f"  {name:32} {each}" for name, each in named.items()])


@dataclass
class _Episodes:
    """Sums of the episodes that ended."""

    rewards: list[float]
    lengths: list[int]
    costs: list[FloatArray]
    interventions: list[Mapping[str, int]]


def evaluate_guarded(
    model: BaseAlgorithm,
    env: Any,
    guard: Guard | None = None,
    *,
    n_episodes: int = 20,
    deterministic: bool = True,
    confidence: float = 0.95,
    seed: int | None = None,
) -> Evaluation:
    """Let ``model`` act in ``env``, held to the sets of its guard, and say what came of it.

    The number of episodes of each environment of a vector is fixed beforehand, so that those with short episodes
    do not count for more. Model, guard, statistics of ``VecNormalize`` and random generators outside ``env`` are left
    as they were. Where ``env`` is one that the model learns in, or wraps one, the episodes that were running in the
    model's environments are given up: the next ``learn`` begins them anew, as after ``model.set_env``.

    Args:
        model: wrapped or not.
        env: an environment, or a vector of them; observations are normalised as those that the model learned
            from where it has a ``VecNormalize`` and ``env`` has none.
        guard: says costs, limits and sets, with the widths in force. Default: the one the model is wrapped with.
        n_episodes: in all, ≥ 2.
        deterministic: take the policy's most likely action.
        confidence: of each interval, in (0, 1).
        seed: of environments and drawn actions.

    Raises:
        AttachError: if there is no guard, another than the one the model is wrapped with, or it asks for what
            this model or environment lacks; if ``env`` is one that the model learns in, within ``learn``; if it has
            a `SafeActions` that would scale actions once more.
        ConfigurationError: if a number is out of range.

    Example:
        >>> print(evaluate_guarded(model, env, n_episodes=50))  # doctest: +SKIP
    """
    n_episodes = whole_number("evaluate_guarded", "n_episodes", n_episodes, low=2)
    check_number("evaluate_guarded", "confidence", confidence, low=0.0, high=1.0 - 1e-12, open_low=True)
    acting, propose = _acting(model, guard)
    vector = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    if vector.action_space != model.action_space:
        raise AttachError(f"The model acts in {model.action_space}, but this environment in {vector.action_space}.")
    _check_scaled_once(model, acting.enforcement.guard, vector)
    with _left_alone(model, vector, seed), _given_up(model, vector):
        episodes = _run(acting, propose, vector, n_episodes, deterministic)
    return _summary(acting.enforcement.guard.constraints, episodes, deterministic, confidence)


def _acting(model: BaseAlgorithm, guard: Guard | None) -> tuple[Acting, Predict]:
    """Return model and sets, and the ``predict`` that proposes actions without them."""
    attachment = attachment_of(model)
    if attachment is not None:
        own = attachment.callback.guard
        if guard is not None and guard is not own:
            raise AttachError(
                f"This {type(model).__name__} is wrapped with another guard. Leave out guard=, or unwrap(model) first."
            )
        acting = attachment.acting.acting
        acting.enforcement.refresh()  # a state may have been loaded since the last decision
        return acting, attachment.acting.propose
    if guard is None:
        raise AttachError(
            f"This {type(model).__name__} is not wrapped. Give evaluate_guarded the guard to judge it by."
        )
    turning = Dials(model, guard).overlays()
    return Acting(model, guard), turning.get("predict", model.predict)


def _check_scaled_once(model: BaseAlgorithm, guard: Guard, env: VecEnv) -> None:
    """Raise AttachError if the dial that scales actions would do so here and in the environment."""
    if scales_actions(guard) and attachment_of(model) is None and any(env.env_is_wrapped(SafeActions)):
        raise AttachError(
            f"evaluate_guarded scales actions by the dial '{ACTION_SCALE}' and holds them to the sets, and SafeActions "
            "around this environment would do so once more. Give it the environment without."
        )


@contextmanager
def _left_alone(model: BaseAlgorithm, env: VecEnv, seed: int | None) -> Iterator[None]:
    normalizer, drawn = unwrap_vec_normalize(env), np.random.get_state()
    explored = model.action_space.np_random.bit_generator.state
    updating = normalizer is not None and normalizer.training
    if normalizer is not None:
        normalizer.training = False
    if seed is not None:
        env.seed(seed)
    try:
        with own_randomness(seed or 0, model.device):
            np.random.seed(seed or 0)
            yield
    finally:
        np.random.set_state(drawn)
        model.action_space.np_random.bit_generator.state = explored
        if normalizer is not None:
            normalizer.training = updating


@contextmanager
def _given_up(model: BaseAlgorithm, env: VecEnv) -> Iterator[None]:
    """Have the next ``learn`` begin its episodes anew, if it is the model's own environments that ``env`` steps."""
    if model.env is None or _innermost(model.env).isdisjoint(_innermost(env)):
        yield
        return
    if _learning(model):
        raise AttachError(
            f"evaluate_guarded would step the environments in which this {type(model).__name__} is learning right now, "
            "and its running episodes would go on from wherever that leads. Give it an environment of its own."
        )
    try:
        yield
    finally:
        model.set_env(model.env)


def _innermost(env: VecEnv) -> set[int]:
    """Return the identities of the environments below all wrappers, or of their vector if they are elsewhere."""
    inner = env.unwrapped
    return {id(each.unwrapped) for each in getattr(inner, "envs", [inner])}


def _learning(model: BaseAlgorithm) -> bool:
    """Whether this is called from within the model's ``learn``, of which the model itself keeps no note."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "learn" and frame.f_locals.get("self") is model:
            return True
        frame = frame.f_back
    return False


def _run(acting: Acting, propose: Predict, env: VecEnv, n_episodes: int, deterministic: bool) -> _Episodes:
    enforcement, n_envs = acting.enforcement, env.num_envs
    readers = [cost_reader(part) for part in enforcement.guard.constraints]
    own = unwrap_vec_normalize(env)
    to_come = np.array([(n_episodes + index) // n_envs for index in range(n_envs)])
    ended = _Episodes([], [], [], [])
    rewards, lengths, costs = np.zeros(n_envs), np.zeros(n_envs, dtype=int), np.zeros((n_envs, len(readers)))
    memory = enforcement.memory(n_envs)
    observations, infos, state = env.reset(), env.unwrapped.reset_infos, None
    while to_come.any():
        situation = _situation(acting, memory, env, observations, infos)
        arguments = {"state": state, "episode_start": memory.fresh, "deterministic": deterministic}
        if situations.takes_masks(acting.model) and env.has_attr(MASKS):
            arguments[MASKS] = np.stack(env.env_method(MASKS))
        actions, state = acting.act(propose, situation.perceived, situation, memory, **arguments)
        observations, step_rewards, dones, infos = env.step(actions)
        enforcement.report(memory, dones, infos)
        rewards += step_rewards if own is None else own.get_original_reward()
        lengths += 1
        costs += [[read(info) for read in readers] for info in infos]
        for index in map(int, np.flatnonzero(dones)):
            if to_come[index]:
                to_come[index] -= 1
                ended.rewards.append(float(rewards[index]))
                ended.lengths.append(int(lengths[index]))
                ended.costs.append(costs[index].copy())
                ended.interventions.append(infos[index][EPISODE])
            rewards[index] = lengths[index] = 0
            costs[index] = 0.0
    return ended


def _situation(acting: Acting, memory: Memory, env: VecEnv, observations: Any, infos: Any) -> Situation:
    own, model = unwrap_vec_normalize(env), acting.model
    given = pictures.as_given(env, observations if own is None else own.get_original_obs())
    if own is None:
        perceived = situations.as_perceived(model, observations)
    else:
        perceived = pictures.as_fed(model.observation_space, observations)
    resets = env.unwrapped.reset_infos
    informed = [resets[i] if fresh else infos[i] for i, fresh in enumerate(memory.fresh.tolist())]
    return acting.situation(memory, lambda: given, lambda: perceived, lambda: informed, env.env_method)


def _summary(
    constraints: Sequence[Constraint], episodes: _Episodes, deterministic: bool, confidence: float
) -> Evaluation:
    columns = {part.name: np.array([row[index] for row in episodes.costs]) for index, part in enumerate(constraints)}
    measured = {part.name: part.sanitise(columns[part.name]) for part in constraints}
    kept = {part.name: [part.violation(cost) <= 0.0 for cost in columns[part.name].tolist()] for part in constraints}
    changed = {name: [each[name] for each in episodes.interventions] for name in episodes.interventions[0]}

    def means(values: Any) -> Estimate:
        return _bootstrap(np.asarray(values, dtype=np.float64), confidence)

    return Evaluation(
        n_episodes=len(episodes.rewards),
        deterministic=deterministic,
        confidence=confidence,
        reward=means(episodes.rewards),
        length=means(episodes.lengths),
        costs={name: means(costs) for name, costs in measured.items()},
        violation_rates={name: _rate(np.array(each, dtype=np.float64), confidence) for name, each in kept.items()},
        interventions={name: means(counts) for name, counts in changed.items()},
    )


def _bootstrap(values: FloatArray, confidence: float) -> Estimate:
    """Return the mean and its percentile bootstrap interval (Efron 1979)."""
    drawn = np.random.default_rng(0).integers(0, len(values), size=(_RESAMPLES, len(values)))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values[drawn].mean(axis=1), [tail, 1.0 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def _rate(kept: FloatArray, confidence: float) -> Estimate:
    """Return the share of rows that were not kept, with the bounds of a confidence sequence at either side."""
    sequence = EmpiricalBernstein()
    state = sequence.init()
    for score in kept:
        state = sequence.update(state, np.array([score]))
    error = (1.0 - confidence) / 2.0
    return Estimate(1.0 - float(kept.mean()), 1.0 - sequence.upper(state, error), 1.0 - sequence.lower(state, error))
