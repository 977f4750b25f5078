"""The score loss of ALGD at the optimizer step of an untouched SAC, beside the penalty that guarded actors get."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from guardrails import AttachError
from guardrails_sb3.algd.policy import DiffusionPolicy
from guardrails_sb3.algd.score import energy, score_loss, score_target
from guardrails_sb3.off_policy_seams import ActorSeams, Learn
from guardrails_sb3.safety_critic import HostCritic

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 1e-9
"""Weight below which a sample adds nothing to its target in single precision."""


class DiffusionSeams(ActorSeams):
    """SAC with a `DiffusionPolicy`: its score network learns the slope of the energy at the points it visits.

    Just before the host steps the actor's optimizer, the gradient of w (φ(s, a_τ, τ) - φ*)² joins that of the host's
    loss. a_τ is what the score network was asked about at step τ, uniform, of the very sampling that made the actions
    of the host's loss. It is held constant: a gradient through it would move the path to where the score is easily met.
    φ* is made of N samples a_τ + σ_τ ε, not cut to the action's bounds. Noise comes from a generator of its own.

    Args:
        model: the host.
        host_critic: judges.
        learn: see `Learn`.
        training: whether the host is inside ``train``.

    Raises:
        AttachError: if the host adapts an entropy coefficient, which the policy has no entropy for.
    """

    def __init__(self, model: Any, host_critic: HostCritic, learn: Learn, training: Callable[[], bool]) -> None:
        super().__init__(model, host_critic, learn, training)
        if getattr(model, "ent_coef_optimizer", None) is not None:
            raise AttachError(
                f"This {type(model).__name__} adapts its entropy coefficient to a policy whose entropy is not known, "
                "so what it adapts to means nothing. Build it with ent_coef=0.0."
            )
        self._actor, self._settings = model.policy.actor, model.policy.score_matching
        self._spreads = torch.tensor(self._actor.schedule.spreads, device=model.device)
        self._generator = torch.Generator(model.device).manual_seed(int(model.seed or 0))
        self._losses: tuple[torch.Tensor | float, int] = 0.0, 0

    def install(self) -> None:
        """Put hooks in."""
        super().install()
        self._handles.append(self._actor.optimizer.register_step_pre_hook(self._guide))

    def _guide(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        path = self._actor.path
        if not self._training() or path is None:
            return
        n_rows, n_actions = path.actions.shape[1:]
        device, generator = path.actions.device, self._generator
        steps = torch.randint(len(self._spreads), (n_rows,), generator=generator, device=device)
        visited = path.actions[steps, torch.arange(n_rows, device=device)]
        noise = torch.randn(self._settings.samples, n_rows, n_actions, generator=generator, device=device)
        samples = visited + self._spreads[steps].unsqueeze(-1) * noise
        target = score_target(*self._slopes(path.observations, samples), self._settings.beta)
        with torch.enable_grad():
            loss = score_loss(self._actor.scores(path.observations, visited, steps), target)
            torch.autograd.backward(self._settings.weight * loss)
        self._losses = self._losses[0] + loss.detach(), self._losses[1] + 1

    def _slopes(self, observations: Any, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return energies ``(N, n_rows)`` and their gradients by the actions ``(N, n_rows, n_actions)``.

        Gradients that the target would weigh by less than single precision resolves are left at 0, and not computed.
        """
        host, asked = self._host_critic, [self._critic.at(observations)]
        if acting := host.acting:
            asked.append(host.critic.at(observations))
        # One sample of every row at a time: what a layer puts out then stays in the processor's cache.
        evaluations = [[held.evaluate(actions) for held in asked] for actions in samples.unbind()]
        outputs = [torch.stack([each.outputs for each in kind], dim=1) for kind in zip(*evaluations, strict=True)]
        flat = [each.flatten(1, 2).requires_grad_() for each in outputs]
        with torch.enable_grad():
            penalty = host.penalty(host.critic.risks_of(flat[1]), acting) if len(flat) > 1 else None
            energies = energy(flat[0].squeeze(-1), penalty)
            slopes = torch.autograd.grad(energies.sum(), flat)
        energies = energies.detach().view(samples.shape[:2])
        counts = torch.softmax(energies / -self._settings.beta, dim=0) > _NEGLIGIBLE
        parts = [each.view(like.shape) * counts.unsqueeze(-1) for each, like in zip(slopes, outputs, strict=True)]
        gradients = [
            sum(one.gradient(part[:, index]) for one, part in zip(several, parts, strict=True))
            for index, several in enumerate(evaluations)
        ]
        return energies, torch.stack(gradients)

    def take_metrics(self) -> dict[str, float]:
        """Return the mean score loss of the gradient steps since the last call."""
        (total, count), self._losses = self._losses, (0.0, 0)
        return {"score_loss": float(total) / count} if count else {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the state of the random generator."""
        return {"generator": self._generator.get_state()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned; noise starts afresh where another kind of device drew it."""
        state = tensors.get("generator")
        if state is None:
            return
        if state.shape != self._generator.get_state().shape:
            logger.warning(
                "The run was saved on another kind of device, whose random numbers this one cannot continue: the noise "
                "of the score loss starts afresh."
            )
            return
        self._generator.set_state(state)


def is_diffusion(policy: nn.Module) -> bool:
    """Whether a host's policy is one whose score is to be matched."""
    return isinstance(policy, DiffusionPolicy)
