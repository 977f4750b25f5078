"""Constraints measured by the safety critic itself: what it expects at replayed actions is held against the limit.

Episodes then count for gates and logs alone. It is how ALGD moves its dual variable: at gradient steps, not at the
end of episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from guardrails import Decision, Guard, Rollout
from guardrails.evidence import CostEvidence
from guardrails_sb3.safety_critic import HostCritic


class CriticDual:
    """Steps a guard on Q̄_c + κ σ at the actions of the host's batches, once per so many gradient steps.

    The estimates are by-products of the critic's learning. Their mean over batches and gradient steps, in the unit of
    an episode, is J of the decision; between decisions multipliers stand still.

    Args:
        guard: decides.
        host: has the critic.
        interval: gradient steps from one decision to the next, at least 1; where a call of the host's ``train`` ends
            beyond it, the decision waits for that.
    """

    def __init__(self, guard: Guard, host: HostCritic, interval: int) -> None:
        self._guard, self._host, self._interval = guard, host, interval
        self._sum, self._count = np.zeros(len(guard.constraints)), 0
        host.critic.estimating = True

    def decide(self) -> Decision | None:
        """Return what the guard decides, if enough gradient steps have been taken since it did last."""
        self._take()
        if self._count < self._interval:
            return None
        means = self._host.per_episode(self._sum / self._count)
        self._sum, self._count = np.zeros_like(self._sum), 0
        none = Rollout(costs={part.name: np.zeros(0) for part in self._guard.constraints})
        return self._settle(none, [float(mean) for mean in means])

    def judge(self, episodes: Rollout) -> Decision | None:
        """Let the gates judge episodes that have ended; None without gates. Multipliers stay as they are."""
        if not self._guard.gates:
            return None
        return self._settle(episodes, [float("nan")] * len(self._guard.constraints))

    def _settle(self, rollout: Rollout, means: list[float]) -> Decision:
        parts = self._guard.constraints
        costs = {part.name: CostEvidence(mean, 0.0) for part, mean in zip(parts, means, strict=True)}
        return self._guard.settle(replace(self._guard.reduce(rollout), costs=costs))

    def _take(self) -> None:
        estimates = self._host.critic.take_estimates().cpu().double().numpy()
        self._sum, self._count = self._sum + estimates.sum(axis=0), self._count + len(estimates)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what was estimated since the last decision."""
        self._take()
        return {"sum": torch.from_numpy(self._sum.copy()), "count": torch.tensor(self._count)}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned; nothing from a run whose costs were measured on episodes."""
        if "sum" in tensors:
            self._sum, self._count = tensors["sum"].numpy().copy(), int(tensors["count"])
