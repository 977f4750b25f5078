"""Cost value function: a network of its own that predicts discounted costs-to-go, one output per constraint.

It shares nothing with the policy it judges: the multiplier moves, and a critic that mixed it into the
reward would lag behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import nn

from guardrails.critic.state import load_named, named

FloatArray = npt.NDArray[np.float64]
Observations = npt.NDArray[Any] | dict[str, npt.NDArray[Any]]

_FORWARD_ROWS = 8192
"""Rows of one forward pass: bounds the memory that image observations take."""


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for the block and give the host its generators back untouched."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def own_extractor(policy: BasePolicy) -> BaseFeaturesExtractor:
    """Return the policy's kind of features extractor, built anew, with copies of the modules it is built of."""
    with torch.no_grad():  # what ``weight_norm`` computes of its parameters is copied only without their gradients
        return copy.deepcopy(policy.make_features_extractor())


class _Network(nn.Module):
    """The policy's kind of features extractor, built anew, and the layers of its value function."""

    def __init__(self, policy: ActorCriticPolicy, n_outputs: int) -> None:
        super().__init__()
        self._space = policy.observation_space
        self._normalize_images = policy.normalize_images
        self.extractor = own_extractor(policy)
        layers = policy.net_arch.get("vf", []) if isinstance(policy.net_arch, dict) else list(policy.net_arch)
        self.head = nn.Sequential(*create_mlp(self.extractor.features_dim, n_outputs, layers, policy.activation_fn))
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, gain=2**0.5 if module.out_features != n_outputs else 1.0)
                nn.init.zeros_(module.bias)

    def forward(self, observations: Any) -> torch.Tensor:
        features = preprocess_obs(observations, self._space, normalize_images=self._normalize_images)
        values: torch.Tensor = self.head(self.extractor(features))
        return values


class CostValue:
    """V_c(s): expected discounted cost-to-go of each constraint, trained on TD(λ) targets.

    The network predicts in units of ``scales``, so constraints of 0.05 and of 25 weigh alike in the loss
    and need no tuning of their own. Layers, activation, features extractor and preprocessing are those of
    the host's policy; so are γ and λ of the targets, which the caller computes.

    Args:
        model: the host; read, not changed. Its global random generators are left where they were.
        scales: violation scale of each constraint, in the cost's unit.
    """

    learning_rate = 1e-3
    batch_size = 256

    def __init__(self, model: OnPolicyAlgorithm, scales: Sequence[float]) -> None:
        self._device = model.device
        self._seed = int(model.seed or 0)
        self._epochs = int(getattr(model, "n_epochs", getattr(model, "n_critic_updates", 1)))
        self._scales = np.asarray(scales, dtype=np.float64)
        with own_randomness(self._seed, self._device):
            self.network = _Network(model.policy, len(scales)).to(self._device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate, eps=1e-5, fused=True)

    def predict(self, observations: Observations) -> FloatArray:
        """Return V_c of each row of ``observations``, ``(n_rows, n_constraints)`` float64, in the costs' units."""
        rows = self._to_torch(observations)
        self.network.eval()
        with torch.no_grad():
            parts = [
                self.network(_rows(rows, slice(start, start + _FORWARD_ROWS)))
                for start in range(0, _count(rows), _FORWARD_ROWS)
            ]
        values: FloatArray = torch.cat(parts).cpu().double().numpy() * self._scales
        return values

    def fit(self, observations: Observations, targets: FloatArray, step: int) -> FloatArray:
        """Regress V_c on ``targets`` in shuffled minibatches.

        Args:
            observations: n_rows of them, as the host's rollout buffer holds them.
            targets: ``(n_rows, n_constraints)``, in the costs' units.
            step: number of the rollout; with the model's seed it fixes the shuffle, so that a resumed run
                shuffles as the uninterrupted one would.

        Returns:
            Mean squared error of each constraint over the last epoch, in squared violation scales.
        """
        rows = self._to_torch(observations)
        wanted = torch.as_tensor(targets / self._scales, dtype=torch.float32, device=self._device)
        shuffle = np.random.default_rng((self._seed, step))
        self.network.train()
        errors: list[torch.Tensor] = []
        with own_randomness(self._seed + step, self._device):
            for _ in range(self._epochs):
                order = torch.as_tensor(shuffle.permutation(len(targets)), device=self._device)
                errors = [
                    self._update(_rows(rows, chosen), wanted[chosen]) for chosen in torch.split(order, self.batch_size)
                ]
        losses: FloatArray = torch.stack(errors).mean(dim=0).cpu().double().numpy()
        return losses

    def _update(self, observations: Any, wanted: torch.Tensor) -> torch.Tensor:
        error: torch.Tensor = (self.network(observations) - wanted).square().mean(dim=0)
        self.optimizer.zero_grad()
        torch.autograd.backward(error.sum())
        self.optimizer.step()
        detached: torch.Tensor = error.detach()
        return detached

    def _to_torch(self, observations: Observations) -> Any:
        if isinstance(observations, dict):
            return {key: torch.as_tensor(values, device=self._device) for key, values in observations.items()}
        return torch.as_tensor(observations, device=self._device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights and optimizer state by name."""
        return named({"network": self.network}, self.optimizer)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned, which may stand among others; all of it or nothing.

        Raises:
            StateError: if names or shapes are not those of this network.
        """
        own = {name: value for name, value in tensors.items() if name.startswith(("network.", "optimizer."))}
        load_named("cost value function", {"network": self.network}, self.optimizer, own)


def _rows(observations: Any, chosen: Any) -> Any:
    if isinstance(observations, dict):
        return {key: values[chosen] for key, values in observations.items()}
    return observations[chosen]


def _count(observations: Any) -> int:
    return len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
