"""Every private name of Stable-Baselines3 that this adapter relies on, and a check that it is there.

Nothing else in the package touches a name of the host that begins with an underscore.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.her import HerReplayBuffer

from guardrails import AttachError

INIT_CALLBACK = "_init_callback"
EXCLUDED_FROM_SAVE = "_excluded_save_params"
SAMPLE_ACTION = "_sample_action"
EVALUATED = "_trigger_callback"
"""Method of a population host that is called after each step of one environment while a candidate is evaluated."""

GREEDY = "_predict"
"""Method of a discrete host's network that acts by its output."""

_METHODS = (INIT_CALLBACK, EXCLUDED_FROM_SAVE)
_ATTRIBUTES = ("_last_obs", "_last_episode_starts", "_custom_logger")
_OFF_POLICY = ("_n_updates",)
_DRAW, _DRAW_REAL, _DRAW_VIRTUAL = "_get_samples", "_get_real_samples", "_get_virtual_samples"


def check(model: BaseAlgorithm) -> None:
    """Raise AttachError, naming the host's version, if a private name this adapter needs is gone."""
    missing = [name for name in _METHODS if not callable(getattr(model, name, None))]
    further = _OFF_POLICY if isinstance(model, OffPolicyAlgorithm) else (EVALUATED,) if is_population(model) else ()
    missing += [name for name in (*_ATTRIBUTES, *further) if not hasattr(model, name)]
    if missing:
        raise AttachError(
            f"{type(model).__name__} of Stable-Baselines3 {stable_baselines3.__version__} has no {', '.join(missing)}: "
            "its internals have moved. Install stable-baselines3>=2.9,<3 or upgrade training-guardrails."
        )


def is_population(model: Any) -> bool:
    """Whether a host evaluates candidates by their returns, as sb3-contrib's ARS does."""
    return callable(getattr(model, "evaluate_candidates", None)) and hasattr(model, "n_eval_episodes")


def last_observations(model: BaseAlgorithm) -> Any:
    """Return the observations that follow the last finished rollout step, as the policy sees them."""
    return cast(Any, model)._last_obs


def episode_starts(model: BaseAlgorithm) -> npt.NDArray[np.bool_]:
    """Return which environments begin an episode at the next step, ``(n_envs,)`` bool."""
    return np.asarray(cast(Any, model)._last_episode_starts, dtype=bool)


def underway(model: BaseAlgorithm) -> npt.NDArray[np.bool_]:
    """Return which environments are in the midst of an episode, ``(n_envs,)`` bool.

    Off-policy the last transition of the replay buffer tells, on-policy the end of the last rollout unless it was cut
    off; where they do not, all of them may be.
    """
    if last_observations(model) is None:
        return np.zeros(model.n_envs, dtype=bool)
    if not isinstance(model, OffPolicyAlgorithm):
        whole = cast(Any, model).rollout_buffer.full
        return ~episode_starts(model) if whole else np.ones(model.n_envs, dtype=bool)
    buffer: Any = model.replay_buffer
    if not hasattr(buffer, "dones") or not buffer.size():
        return np.ones(model.n_envs, dtype=bool)
    return ~np.asarray(buffer.dones[buffer.pos - 1], dtype=bool)


def updates(model: BaseAlgorithm) -> int:
    """Return how many gradient steps an off-policy host has taken."""
    return int(cast(Any, model)._n_updates)


def drawing(buffer: ReplayBuffer) -> dict[str, bool]:
    """Return the methods that ``buffer.sample`` hands its rows to, and whether with the rows' environments.

    Raises:
        AttachError: if the class draws its rows in a way of its own.
    """
    kind = cast(Any, type(buffer))
    if getattr(kind, _DRAW_REAL, None) is cast(Any, HerReplayBuffer)._get_real_samples:
        return {_DRAW_REAL: True, _DRAW_VIRTUAL: True}
    own = [cast(Any, known)._get_samples for known in (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)]
    if getattr(kind, _DRAW, None) not in own:
        raise foreign_drawing(buffer)
    return {_DRAW: False}


def foreign_drawing(buffer: ReplayBuffer) -> AttachError:
    """Return the error of a replay buffer that hands its rows to none of the methods of `drawing`."""
    return AttachError(
        f"{type(buffer).__name__} draws its batches in a way of its own, so the costs of their rows cannot be told. "
        "Use ReplayBuffer, DictReplayBuffer, NStepReplayBuffer or HerReplayBuffer of Stable-Baselines3 "
        f"{stable_baselines3.__version__}, or a subclass that leaves {_DRAW} as it is and takes every batch from it."
    )


def next_environments(n_rows: int, n_envs: int) -> npt.NDArray[np.int64]:
    """Return the environments that a buffer is about to draw for its rows from numpy's generator, left as it is."""
    generator = np.random.RandomState()
    generator.set_state(np.random.get_state())
    return generator.randint(0, n_envs, size=n_rows)


def log_folder(model: BaseAlgorithm) -> str | None:
    """Return the folder the user has the host log to; None where there is none, or a temporary one."""
    if model.tensorboard_log is None and not cast(Any, model)._custom_logger:
        return None
    return model.logger.get_dir()
