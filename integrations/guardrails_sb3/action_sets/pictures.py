"""Pictures: environments give channels last, as a rule, and policies get them first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_wrapper

from guardrails_sb3.action_sets.base import Array, Observations


def as_given(env: VecEnv | None, observations: Observations) -> Observations:
    """Return rows of observations with every picture as the environments of ``env`` give it.

    Undoes ``VecTransposeImage``, wherever in the chain of wrappers it is. Frames that are stacked stay so; what is as
    it was given already comes back as it is.
    """
    transposer = None if env is None else unwrap_vec_wrapper(env, VecTransposeImage)
    if transposer is None or transposer.skip:
        return observations
    space = transposer.observation_space
    if not isinstance(space, spaces.Dict):
        return _channels_last(observations, space)
    pictures = set(transposer.image_space_keys)
    return {
        key: _channels_last(values, space[key]) if key in pictures else values for key, values in observations.items()
    }


def as_fed(space: spaces.Space[object], observations: Observations) -> Observations:
    """Return rows of observations with every picture as a policy gets it whose observations are of ``space``."""
    if isinstance(space, spaces.Dict) and isinstance(observations, Mapping):
        return {key: maybe_transpose(np.asarray(values), space[key]) for key, values in observations.items()}
    return maybe_transpose(np.asarray(observations), space)


def _channels_last(pictures: Array, space: spaces.Space[object]) -> Array:
    """Return pictures with their channels last; they may have them first, as ``space`` has."""
    first = pictures.shape[2:] == (space.shape or ())[1:]
    return np.moveaxis(pictures, 1, -1) if first else pictures
