"""Every private name of Stable-Baselines3 that this adapter relies on, and a check that it is there.

Nothing else in the package touches a name of the host that begins with an underscore.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback

from guardrails import AttachError

INIT_CALLBACK = "_init_callback"
EXCLUDED_FROM_SAVE = "_excluded_save_params"

_METHODS = (INIT_CALLBACK, EXCLUDED_FROM_SAVE)
_ATTRIBUTES = ("_last_obs", "_last_episode_starts", "_custom_logger")


def check(model: BaseAlgorithm) -> None:
    """Raise AttachError, naming the host's version, if a private name this adapter needs is gone."""
    missing = [name for name in _METHODS if not callable(getattr(model, name, None))]
    missing += [name for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing:
        raise AttachError(
            f"{type(model).__name__} of Stable-Baselines3 {stable_baselines3.__version__} has no {', '.join(missing)}: "
            "its internals have moved. Install stable-baselines3>=2.9,<3 or upgrade training-guardrails."
        )


def last_observations(model: BaseAlgorithm) -> Any:
    """Return the observations that follow the last finished rollout step, as the policy sees them."""
    return cast(Any, model)._last_obs


def episode_starts(model: BaseAlgorithm) -> npt.NDArray[np.bool_]:
    """Return which environments begin an episode at the next step, ``(n_envs,)`` bool."""
    return np.asarray(cast(Any, model)._last_episode_starts, dtype=bool)


def log_folder(model: BaseAlgorithm) -> str | None:
    """Return the folder the user has the host log to; None where there is none, or a temporary one."""
    if model.tensorboard_log is None and not cast(Any, model)._custom_logger:
        return None
    return model.logger.get_dir()


def with_callback(first: BaseCallback, callback: Any) -> BaseCallback | list[BaseCallback]:
    """Return the callbacks of one ``learn`` call with ``first`` at their head.

    Args:
        first: the callback that must run before the user's.
        callback: what the user passed to ``learn``: None, a callback, a list of them, or a function.
    """
    if callback is None:
        return first
    if isinstance(callback, list):
        return [first, *callback]
    return [first, callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]
