"""Population hosts (ARS): the penalty is taken off the return of each candidate.

Augmented random search moves its weights along the perturbations that were worth more, so a constraint
acts where the worth of a candidate is told. It has no gradients, and nothing is learned besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from guardrails import AttachError, Guard
from guardrails_sb3 import seams
from guardrails_sb3.costs import Episodes, cost_reader
from guardrails_sb3.telemetry import record


class PopulationGuard(BaseCallback):
    """Measures every episode of every candidate, asks the guard once per generation, and lowers the returns.

    A candidate with the mean episode cost J is worth R - n Σ ψ(J - d), with R the sum over its n episodes:
    λ (J - d) for most schedulers, the augmented Lagrangian's quadratic for that one. The guard sees a row for
    each episode of the generation, whose candidates lie around the policy, with the sums of costs and of the rewards
    as the environment gave them (before ``VecNormalize``).

    Args:
        model: the host.
        guard: decides the multipliers.
    """

    critic = None
    """There is no safety critic here."""

    def __init__(self, model: BaseAlgorithm, guard: Guard) -> None:
        super().__init__()
        self.guard = guard
        self._host: Any = model
        self._names = [part.name for part in guard.constraints]
        self._readers = [cost_reader(part) for part in guard.constraints]
        self._episodes = Episodes(model.n_envs, self._names)
        self._released = False

    def overlays(self) -> dict[str, Callable[..., Any]]:
        """Return the methods of the model that have to be replaced, and by what."""
        original, trigger = self._host.evaluate_candidates, getattr(self._host, seams.EVALUATED)

        def evaluate_candidates(candidate_weights: Any, callback: Any, async_eval: Any) -> torch.Tensor:
            if self._released:
                returns: torch.Tensor = original(candidate_weights, callback, async_eval)
                return returns
            if async_eval is not None:
                raise AttachError(
                    "ARS evaluates candidates in processes of its own here, whose costs do not reach the guard. Call "
                    "learn without async_eval."
                )
            self._episodes = Episodes(self._host.n_envs, self._names)
            return self._lowered(original(candidate_weights, callback, async_eval))

        def evaluated(_locals: Mapping[str, Any], _globals: Any, *args: Any, **kwargs: Any) -> None:
            if not self._released:
                self._add(_locals)
            trigger(_locals, _globals, *args, **kwargs)

        return {"evaluate_candidates": evaluate_candidates, seams.EVALUATED: evaluated}

    def _add(self, seen: Mapping[str, Any]) -> None:
        """Add a step of one environment; the host counts an episode when its monitor says so."""
        env, info = seen["i"], seen["info"]
        ended = bool(seen["done"]) and (not seen["is_monitor_wrapped"] or "episode" in info)
        normalizer = self._host.get_vec_normalize_env()
        reward = seen["reward"] if normalizer is None else normalizer.get_original_reward()[env]
        self._episodes.costs[env] += [read(info) for read in self._readers]
        self._episodes.returns[env] += float(reward)
        self._episodes.lengths[env] += 1.0
        if ended:
            self._episodes.end(env, info)
            self._episodes.begin(np.arange(self._host.n_envs) == env)
            if self._episodes.ended % self._host.n_eval_episodes == 0:  # the next candidate resets all environments
                self._episodes.begin(np.ones(self._host.n_envs, dtype=bool))

    def _lowered(self, returns: torch.Tensor) -> torch.Tensor:
        """Return the returns of all candidates less their penalties."""
        n_episodes = self._host.n_eval_episodes
        decision = self.guard.step(self._episodes.take())
        for part in self.guard.constraints:
            means = self.guard.sanitised(part.name).reshape(-1, n_episodes).mean(axis=1)
            penalties = [n_episodes * part.violation_scale * self.guard.penalty(part.name, mean) for mean in means]
            returns = returns - torch.as_tensor(penalties, dtype=returns.dtype, device=returns.device)
        record(self._host.logger, decision, {})
        return returns

    def _on_step(self) -> bool:
        return True

    def install(self) -> None:
        """Do nothing: there are no networks or buffers to follow."""

    def check(self) -> None:
        """Do nothing: there is nothing that could have been replaced."""

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context in which nothing of this is in the model, which is always so."""
        return nullcontext()

    def release(self) -> None:
        """Do nothing from now on, also inside a ``learn`` call that is under way."""
        self._released = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return nothing: a generation leaves no more behind than the guard's state."""
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        """Do nothing: see `tensors`."""
