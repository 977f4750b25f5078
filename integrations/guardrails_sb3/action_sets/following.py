"""What would be executed of the next actions in a batch: what a critic bootstraps from that judges executed actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from guardrails_sb3.action_sets import situations
from guardrails_sb3.action_sets.acting import Acting
from guardrails_sb3.action_sets.base import Array, Bounds


class Following:
    """Holds the actions that an off-policy host's policy takes at replayed observations to the sets of its guard.

    The sets apply as where the model acts, with the widths in force, all rows in one batch, but for what a replayed
    observation does not tell: an action before, so a rate limit takes each for the first of its episode; and what an
    environment would have to be asked for. A shield takes the time it needs.

    Args:
        acting: model and sets.
    """

    def __init__(self, acting: Acting) -> None:
        self._acting, self._model = acting, acting.model

    def __call__(self, observations: Any, actions: torch.Tensor) -> torch.Tensor:
        """Return what would be executed, as the host stores it, and ``actions`` themselves where that is the same.

        Args:
            observations: tensors, as the host samples them.
            actions: ``(n_rows, ...)``, as the host stores them.
        """
        acting, model, enforcement = self._acting, self._model, self._acting.enforcement
        bounds, policy = enforcement.bounds, model.policy
        memory = enforcement.memory(len(actions))
        perceived = _arrays(observations, model.observation_space)
        situation = acting.situation(memory, lambda: situations.as_given(model, perceived), lambda: perceived)
        situation.hurried = False
        chosen: Array = actions.cpu().numpy().reshape(memory.previous.shape)
        executed = enforcement.execute(_unscaled(chosen, bounds, policy), situation, memory)
        if not memory.changed:
            return actions
        changed = torch.tensor(list(memory.changed.values()), device=actions.device).any(dim=0)
        stored = executed if bounds is None else policy.scale_action(executed)
        replaced = torch.as_tensor(stored, dtype=actions.dtype, device=actions.device).view_as(actions)
        return torch.where(changed.view(-1, *[1] * (actions.dim() - 1)), replaced, actions)


def _unscaled(actions: Array, bounds: Bounds | None, policy: Any) -> Array:
    """Return actions in the units of their space, and in it whatever rounding does."""
    if bounds is None:
        return actions
    inside: Array = np.clip(policy.unscale_action(actions), bounds.low, bounds.high).astype(bounds.low.dtype)
    return inside


def _arrays(observations: Any, space: Any) -> Any:
    """Return sampled observations as rows of ``space``: a buffer holds a discrete one as an array of one number."""
    if isinstance(observations, Mapping):
        return {key: _arrays(values, space[key]) for key, values in observations.items()}
    return observations.cpu().numpy().reshape(-1, *space.shape)
