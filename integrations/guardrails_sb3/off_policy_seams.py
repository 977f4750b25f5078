"""Where an off-policy host lets a safety critic learn from its batches and act on its policy, without its ``train``.

Forward hooks on the host's own networks, and on its instances the few methods that hooks do not reach.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from stable_baselines3 import TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn

from guardrails import AttachError
from guardrails_sb3 import seams
from guardrails_sb3.overlay import Overlay
from guardrails_sb3.safety_critic import HostCritic

Learn = Callable[[torch.Tensor], None]
"""Is given the actions that the policy takes at the batch's next observations, once per gradient step."""


class Hook:
    """A forward hook that a copy of its module does not have."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return what the hook makes of a module's output."""
        return self._hook(module, args, output)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook(_leave)


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Leave a module's output as it is."""


class HostSeams(ABC):
    """The hooks and methods of one host.

    Attributes:
        learned: gradient steps of the host at which the critic learned.
        acted: how often the host's policy was, or could have been, penalised.
    """

    def __init__(self) -> None:
        self.learned = self.acted = 0
        self._handles: list[Any] = []
        self._overlays: list[Overlay] = []

    @abstractmethod
    def _hooks(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Return modules and their forward hooks."""

    def install(self) -> None:
        """Put hooks and methods in."""
        self._handles = [module.register_forward_hook(Hook(hook)) for module, hook in self._hooks()]
        for overlay in self._overlays:
            overlay.install()

    def check(self) -> None:
        """Raise AttachError if something else has replaced one of the methods since."""
        for overlay in self._overlays:
            overlay.check()

    def remove(self) -> None:
        """Take hooks and methods out."""
        for overlay in self._overlays:
            overlay.remove()
        for handle in self._handles:
            handle.remove()

    def take_metrics(self) -> dict[str, float]:
        """Return what is to be logged of the gradient steps since the last call."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs of these hooks."""
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:  # noqa: B027  # most hooks have no state
        """Restore what `tensors` returned."""


class ActorSeams(HostSeams):
    """SAC, TQC, CrossQ, TD3 and DDPG: the penalty is taken off what the critic tells the actor.

    While ``train`` runs, the critic's output for actions that require a gradient is the actor's loss: each
    Q (each quantile) is lowered by the same penalty, so the least and the mean of them are lowered by it.
    Next actions are those that the target critic is asked about; CrossQ has none and asks its critic about
    both halves of one batch. TD3 and DDPG ask ``q1_forward``, a method.

    Args:
        model: the host.
        host_critic: judges.
        learn: see `Learn`.
        training: whether the host is inside ``train``.
    """

    def __init__(self, model: Any, host_critic: HostCritic, learn: Learn, training: Callable[[], bool]) -> None:
        super().__init__()
        self._critic, self._target = model.critic, getattr(model, "critic_target", None)
        self._host_critic, self._learn, self._training = host_critic, learn, training
        if isinstance(model, TD3):
            self._overlays = [Overlay(self._critic, {"q1_forward": self._q1_forward(self._critic.q1_forward)})]

    def _hooks(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        if self._target is not None:
            hooks.append((self._target, self._asked_target))
        if not self._overlays:
            hooks.append((self._critic, self._asked))
        return hooks

    def _asked_target(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._training():
            self.learned += 1
            self._learn(args[1])

    def _asked(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._training():
            return None
        observations, actions = args
        if not actions.requires_grad:
            if self._target is None:
                self.learned += 1
                self._learn(actions[len(actions) // 2 :])
            return None
        return self._penalised(observations, actions, output)

    def _q1_forward(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def q1_forward(obs: Any, actions: torch.Tensor) -> torch.Tensor:
            values = original(obs, actions)
            lowered = self._penalised(obs, actions, values) if self._training() and actions.requires_grad else None
            return values if lowered is None else lowered

        return q1_forward

    def _penalised(self, observations: Any, actions: torch.Tensor, output: Any) -> Any:
        self.acted += 1
        acting = self._host_critic.acting
        if not acting:
            return None
        penalty = self._host_critic.penalty(self._host_critic.critic.risks_at(observations)(actions), acting)
        if isinstance(output, tuple):
            return tuple(values - penalty.view(-1, 1) for values in output)
        return output - penalty.view(-1, *[1] * (output.dim() - 1))


class GreedySeams(HostSeams):
    """DQN and QR-DQN: actions are chosen by Q_r - Σ ψ(Q_c), for acting and for bootstrapping alike.

    The host's network goes on estimating the reward alone, of the policy that chooses so: where the host
    takes the largest target value it gets that of the action so chosen, for every action. So neither network
    ever holds a multiplier, and one that moves changes the choice at once.

    Args:
        model: the host.
        host_critic: judges.
        learn: see `Learn`.
        training: whether the host is inside ``train``.
        names: of the network and of its target in the host.
    """

    def __init__(
        self, model: Any, host_critic: HostCritic, learn: Learn, training: Callable[[], bool], names: tuple[str, str]
    ) -> None:
        super().__init__()
        self._network, self._target = getattr(model, names[0]), getattr(model, names[1])
        self._host_critic, self._learn, self._training = host_critic, learn, training
        self._choosing = False
        greedy = getattr(self._network, seams.GREEDY)
        self._overlays = [Overlay(self._network, {seams.GREEDY: self._greedy(greedy)})]

    def _hooks(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        return [(self._network, self._asked), (self._target, self._asked_target)]

    def _greedy(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def predict(*args: Any, **kwargs: Any) -> torch.Tensor:
            self._choosing = True
            try:
                return original(*args, **kwargs)
            finally:
                self._choosing = False

        return predict

    def _asked(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        self.acted += 1
        acting = self._host_critic.acting if self._choosing else []
        return self._lowered(args[0], output, acting, target=False) if acting else None

    def _asked_target(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self._training():
            return None
        self.learned += 1
        acting = self._host_critic.acting
        scores = self._lowered(args[0], output, acting, target=True) if acting else output
        means = scores if scores.dim() == 2 else scores.mean(dim=1)
        chosen = means.argmax(dim=-1)
        self._learn(chosen.view(-1, 1))
        if not acting:
            return None
        index = chosen.view(-1, *[1] * (output.dim() - 1)).expand(*output.shape[:-1], 1)
        return output.gather(-1, index).expand_as(output)

    def _lowered(self, observations: Any, output: torch.Tensor, acting: list[int], *, target: bool) -> torch.Tensor:
        """Return Q_r - Σ ψ of each action; ``(n_rows, n_actions)``, or with quantiles in between."""
        risks = self._host_critic.critic.risks_of_all(observations, target=target)
        penalty = self._host_critic.penalty(risks, acting)
        return output - (penalty if output.dim() == 2 else penalty.unsqueeze(1))


def of(model: OffPolicyAlgorithm, host_critic: HostCritic, learn: Learn, training: Callable[[], bool]) -> HostSeams:
    """Return the seams of a host, found by the networks it has.

    Raises:
        AttachError: if it has none of those that are known.
    """
    from guardrails_sb3.algd import guidance  # built upon this module

    if guidance.is_diffusion(model.policy):
        return guidance.DiffusionSeams(model, host_critic, learn, training)
    for names in (("q_net", "q_net_target"), ("quantile_net", "quantile_net_target")):
        if all(isinstance(getattr(model, name, None), nn.Module) for name in names):
            return GreedySeams(model, host_critic, learn, training, names)
    if isinstance(getattr(model, "critic", None), nn.Module) and isinstance(getattr(model, "actor", None), nn.Module):
        return ActorSeams(model, host_critic, learn, training)
    raise AttachError(
        f"{type(model).__name__} has neither an actor and a critic nor a Q-network and its target where they are "
        "expected. Use SAC, TD3, DDPG, DQN, TQC, CrossQ or QRDQN."
    )
