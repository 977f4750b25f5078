"""What a model knows of the situation it acts in, read for the sets that ask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

from guardrails import AttachError
from guardrails_sb3 import seams
from guardrails_sb3.action_sets import pictures
from guardrails_sb3.action_sets.base import Array, Observations, SafeSet
from guardrails_sb3.action_sets.shield import CriticShield


def ranker(model: BaseAlgorithm) -> Callable[[Observations], Array] | None:
    """Return the function that ranks each of a model's discrete actions, or None where it cannot be had.

    Q-values of DQN and mean quantiles of QR-DQN, as they are chosen by; log-probabilities of policies without memory.
    """
    if not isinstance(model.action_space, spaces.Discrete):
        return None
    policy: Any = model.policy
    network = getattr(policy, "q_net", None) or getattr(policy, "quantile_net", None)
    if network is not None:
        return _evaluated(policy, lambda observations: _chosen_by(network, observations))
    if hasattr(policy, "get_distribution") and not hasattr(policy, "lstm_actor"):
        return _evaluated(policy, lambda observations: policy.get_distribution(observations).distribution.logits)
    return None


def _evaluated(policy: Any, score: Callable[[Any], torch.Tensor]) -> Callable[[Observations], Array]:
    def rank(observations: Observations) -> Array:
        with torch.no_grad():
            ranking: Array = score(policy.obs_to_tensor(observations)[0]).cpu().numpy()
        return ranking

    return rank


def _chosen_by(network: Any, observations: Any) -> torch.Tensor:
    """Return the values by which ``network`` chooses its action, with whatever hooks on it make of them."""
    outputs: list[torch.Tensor] = []
    handle = network.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        getattr(network, seams.GREEDY)(observations)
    finally:
        handle.remove()
    values = outputs[-1]
    return values if values.dim() == 2 else values.mean(dim=1)


def takes_masks(model: BaseAlgorithm) -> bool:
    """Return whether the model masks its own distribution, as MaskablePPO does."""
    return "action_masks" in inspect.signature(type(model).predict).parameters


def check(model: BaseAlgorithm, sets: tuple[SafeSet, ...], critic: object) -> None:
    """Raise AttachError if a set asks for what this model cannot tell."""
    name = type(model).__name__
    for part in sets:
        if isinstance(part, CriticShield) and part.risk is None and critic is None:
            raise AttachError(
                f"{part.owner} has no risk to judge by: {name} has no safety critic here. Give it risk=, a function, "
                "or guard the model with a Constraint and a safety critic."
            )
        if part.ranks and ranker(model) is None:
            raise AttachError(
                f"{part.owner} replaces a refused action by the one {name} prefers most, which {name} does not tell. "
                "Give fallback=, the action to take instead."
            )
        normalizer = model.get_vec_normalize_env()
        if part.observes and normalizer is not None and normalizer.observation_space not in _known(model):
            raise AttachError(
                f"{part.owner} reads observations, but a wrapper around VecNormalize changes their space from "
                f"{normalizer.observation_space} to {model.observation_space}. Put that wrapper below VecNormalize."
            )


def _known(model: BaseAlgorithm) -> tuple[spaces.Space[Any], ...]:
    """Return the spaces of observations between which and the model nothing stands but what can be undone."""
    env = model.env
    transposed = isinstance(env, VecTransposeImage)
    return (model.observation_space, env.venv.observation_space) if transposed else (model.observation_space,)


def check_alone(sets: tuple[SafeSet, ...], critic: object) -> None:
    """Raise AttachError if a set asks for what only a model can tell, where there is none."""
    for part in sets:
        if part.ranks:
            raise AttachError(
                f"{part.owner} replaces a refused action by the one the policy prefers most, but there is no policy "
                "here. Give model=, or the set a fallback=."
            )
        if isinstance(part, CriticShield) and part.risk is None and critic is None:
            raise AttachError(f"{part.owner} has no risk to judge by. Give critic=, or the set a risk=.")


def given(model: BaseAlgorithm, perceived: Observations) -> Observations:
    """Return the observations that follow the last step, as the environments gave them.

    Args:
        model: the host.
        perceived: the same, as its policy gets them.
    """
    normalizer = model.get_vec_normalize_env()
    return pictures.as_given(model.env, perceived if normalizer is None else normalizer.get_original_obs())


def as_given(model: BaseAlgorithm, perceived: Observations) -> Observations:
    """Return observations as the environment gives them, from what the policy gets.

    Undoes ``VecNormalize``, and where pictures have their channels first for the policy alone, that too.
    """
    normalizer = model.get_vec_normalize_env()
    if isinstance(perceived, Mapping):
        perceived = {key: np.asarray(values) for key, values in perceived.items()}
    else:
        perceived = np.asarray(perceived)
    return pictures.as_given(model.env, perceived if normalizer is None else normalizer.unnormalize_obs(perceived))


def as_perceived(
    model: BaseAlgorithm | None, given: Observations, normalizer: VecNormalize | None = None
) -> Observations:
    """Return observations as the policy gets them: pictures channels first, and normalised as the model learned.

    Args:
        model: the host; None leaves pictures as they are.
        given: rows of observations.
        normalizer: has the statistics; None takes those of the model's environments, if they have any.
    """
    if model is not None:
        normalizer = model.get_vec_normalize_env() if normalizer is None else normalizer
        given = pictures.as_fed(model.observation_space, given)
    return given if normalizer is None else normalizer.normalize_obs(given)


def check_normalised(model: BaseAlgorithm | None, sets: tuple[SafeSet, ...]) -> None:
    """Raise AttachError if a set asks for what the policy perceives, which was normalised and cannot be any more."""
    for part in sets:
        perceives = part.ranks or isinstance(part, CriticShield)
        if perceives and (model is None or model.get_vec_normalize_env() is None):
            raise AttachError(
                f"{part.owner} is judged by what the policy perceives, and the model was trained under VecNormalize, "
                "whose statistics are not at hand. Give normalizer=VecNormalize.load(path, venv), with the file that "
                "its save() wrote and a vector of environments like this one."
            )
