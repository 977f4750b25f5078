"""SafetyCritic: an ensemble that learns the discounted cost-to-go of state and action, one output per constraint."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from guardrails.critic.ensemble import Ensemble
from guardrails.critic.held import HeldEnsemble
from guardrails.critic.networks import Members
from guardrails.critic.state import load_named, named
from guardrails.critic.transitions import Observations, Transitions
from guardrails.errors import ConfigurationError


class SafetyCritic:
    """Q_c(s, a): discounted cost-to-go, by temporal differences, with M members and a target network.

    Each member i regresses on y_i = c + γ (1 - done) Q_i'(s', a') with its own target network Q_i', which
    follows as Q_i' ← (1 - τ) Q_i' + τ Q_i. Q_i' is cut to what `bound` says can be: an actor that is trained to lower
    Q_c looks for the actions at which it errs below that, and the bootstrap would spread their values. The risk of an
    action is Q̄_c + κ σ: mean and standard deviation over the members, the deviation subtracted for a lower limit. All
    members are one batched computation.

    Args:
        encoder: makes ``(n_rows, n_features)`` of a batch of observations; its copy is trained with the members.
        n_features: what it makes of one.
        n_actions: dimensions of an action, or their number where they are discrete.
        costs: names of the constraints, an output each.
        units: for each, the cost-to-go that counts as 1 to the network, in the cost's unit.
        signs: for each, 1 for an upper limit and -1 for a lower one.
        discrete: actions are indices.
        settings: size, learning rate and κ.
        device: where it computes.
        encoding: context in which the encoder runs, such as one that guards the host's random generators.

    Attributes:
        estimating: whether `take_estimates` is wanted; it costs a little at each update.

    Raises:
        ConfigurationError: if names, units and signs differ in number.

    Example:
        >>> critic = SafetyCritic(nn.Identity(), 3, 1, costs=["cost"], units=[1.0])
        >>> critic.risk(torch.zeros(5, 3), torch.zeros(5, 1)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_features: int,
        n_actions: int,
        *,
        costs: Sequence[str],
        units: Sequence[float],
        signs: Sequence[float] | None = None,
        discrete: bool = False,
        settings: Ensemble | None = None,
        device: torch.device | str = "cpu",
        encoding: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        signs = [1.0] * len(costs) if signs is None else signs
        if not costs or len(costs) != len(units) or len(costs) != len(signs):
            raise ConfigurationError(
                f"SafetyCritic: {len(costs)} costs, {len(units)} units and {len(signs)} signs; give one of each for "
                "every constraint, and at least one."
            )
        self.costs, self.discrete = tuple(costs), discrete
        self.settings = Ensemble() if settings is None else settings
        self.n_actions = n_actions
        self.network = Members(encoder, n_features, n_actions, len(costs), self.settings, discrete=discrete).to(device)
        self.network.eval()
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.settings.learning_rate, fused=True)
        self.updates = 0
        self.estimating = False
        self._units = torch.as_tensor(list(units), dtype=torch.float32, device=device)
        self._signs = torch.as_tensor(list(signs), dtype=torch.float32, device=device)
        self._low, self._high = torch.full_like(self._units, -math.inf), torch.full_like(self._units, math.inf)
        self._encoding = encoding
        self._stateful = any(True for _ in encoder.parameters()) or any(True for _ in encoder.buffers())
        self._online: list[torch.Tensor] = list(self.network.parameters())
        self._followed: list[torch.Tensor] = list(self.target.parameters())
        self._losses: tuple[torch.Tensor | float, int] = 0.0, 0
        self._estimates: list[torch.Tensor] = []

    def values(self, observations: Observations, actions: torch.Tensor) -> torch.Tensor:
        """Return Q_c of each member, ``(members, n_rows, n_costs)``, in the costs' units; as `combine` takes them."""
        return self.network.chosen(self._frozen(self.network, observations, actions), actions)

    def risks(self, observations: Observations, actions: torch.Tensor) -> torch.Tensor:
        """Return Q̄_c + κ σ of each constraint, ``(n_rows, n_costs)``, differentiable in ``actions``."""
        return self.combine(self.values(observations, actions))

    def risk(self, observations: Observations, actions: torch.Tensor, cost: str | None = None) -> torch.Tensor:
        """Return Q̄_c + κ σ of one constraint, ``(n_rows,)`` in the cost's unit, differentiable in ``actions``.

        Args:
            observations: as the host's networks take them.
            actions: as in `Transitions`.
            cost: the constraint's name; may be left out where there is one.

        Raises:
            ConfigurationError: if there is no such constraint, or several and none is named.
        """
        return self.risks(observations, actions)[:, self.index(cost)]

    def risks_of_all(self, observations: Observations, *, target: bool = False) -> torch.Tensor:
        """Return the risks of every discrete action, ``(n_rows, n_actions, n_costs)``.

        Args:
            observations: as the host's networks take them.
            target: of the target network.
        """
        return self.combine(self._frozen(self.target if target else self.network, observations, None))

    def risks_at(self, observations: Observations) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return `risks` as a function of continuous actions, for several of them at the same observations.

        What the observations add to the first layer is computed once; gradients reach the actions alone, once.

        Args:
            observations: as the host's networks take them.
        """
        outputs_at = self.at(observations)
        return lambda actions: self.risks_of(outputs_at(actions))

    def at(self, observations: Observations) -> HeldEnsemble:
        """Return the members' outputs as a function of continuous actions, in the constraints' units.

        `risks_of` makes risks of them.

        Args:
            observations: as the host's networks take them.
        """
        with torch.no_grad(), self._encoding():
            features = self.network.encoder(observations)
        return self.network.perceptrons.at(features)

    def risks_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return Q̄_c + κ σ, ``(n_rows, n_costs)``, of what `at` returned."""
        return self.combine(outputs * self._units)

    def index(self, cost: str | None) -> int:
        """Return the column of a constraint."""
        if cost is None and len(self.costs) == 1:
            return 0
        if cost not in self.costs:
            named_ = "none was named" if cost is None else f"'{cost}' is none of them"
            raise ConfigurationError(f"This critic judges {', '.join(self.costs)}; {named_}. Give cost=, one of these.")
        return self.costs.index(cost)

    def bound(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Set the least and the greatest cost-to-go of each constraint that there can be, in the costs' units.

        They are no part of what `tensors` returns: who sets them restores them.
        """
        self._low, self._high = (self._units.new_tensor(list(ends)) / self._units for ends in (low, high))

    def update(self, batch: Transitions) -> None:
        """Take one step of temporal-difference learning, and let the target network follow."""
        known = None if batch.complete else ~batch.costs.isnan().any(dim=1, keepdim=True)
        with torch.no_grad():
            following = self._outputs(self.target, batch.next_observations, batch.next_actions)
            following = self.network.chosen(following, batch.next_actions).clamp(self._low, self._high)
            costs = batch.costs if known is None else batch.costs.nan_to_num()
            wanted = costs / self._units + (1.0 - batch.dones) * batch.discounts * following
        with torch.enable_grad(), self._encoding():
            self._learning(True)
            features = self.network.encoder(batch.observations)
            outputs = self.network(features, None if self.discrete else batch.actions)
            chosen = self.network.chosen(outputs, batch.actions)
            if known is None:
                loss = mse_loss(chosen, wanted, reduction="sum") / len(batch.costs)
            else:
                loss = ((chosen - wanted).square() * known).sum() / known.sum().clamp(min=1)
            for each in self._online:
                each.grad = None
            torch.autograd.backward(loss)
            self.optimizer.step()
            self._learning(False)
        with torch.no_grad():
            if self.updates % self.settings.target_interval == 0:
                torch._foreach_lerp_(self._followed, self._online, self.settings.tau)
                for own, online in zip(self.target.buffers(), self.network.buffers(), strict=True):
                    own.copy_(online)
            if self.estimating:
                self._estimate(chosen.detach(), known)
        self.updates += 1
        self._losses = self._losses[0] + loss.detach(), self._losses[1] + 1

    def _estimate(self, values: torch.Tensor, known: torch.Tensor | None) -> None:
        risks = self.combine(values * self._units)
        counted = risks.new_ones(len(risks), 1) if known is None else known
        self._estimates.append(torch.cat([(risks * counted).sum(dim=0), counted.sum(dim=0)]))

    def take_estimates(self) -> torch.Tensor:
        """Return the mean risk of the actions learned from, at each update since the last call, ``(n, n_costs)``.

        They are by-products of learning, kept while ``estimating`` is True: the cost-to-go that the members expected
        of the batch's own actions as the update began. An update that no row taught anything has none.
        """
        estimates, self._estimates = self._estimates, []
        if not estimates:
            return self._units.new_zeros(0, len(self.costs))
        rows = torch.stack(estimates)
        rows = rows[rows[:, -1] > 0.0]
        return rows[:, :-1] / rows[:, -1:]

    def _learning(self, mode: bool) -> None:
        if self._stateful:  # the walk through all modules is worth it only where one of them has modes
            self.network.encoder.train(mode)

    def take_loss(self) -> float:
        """Return the mean squared error of the updates since the last call, in squared units; NaN without any."""
        (total, count), self._losses = self._losses, (0.0, 0)
        terms = self.settings.members * len(self.costs) * count
        return float(total) / terms if terms else float("nan")

    def _frozen(self, network: Members, observations: Observations, actions: torch.Tensor | None) -> torch.Tensor:
        """Return outputs through which gradients reach the actions alone, in the costs' units."""
        return self._outputs(network, observations, actions) * self._units

    def _outputs(self, network: Members, observations: Observations, actions: torch.Tensor | None) -> torch.Tensor:
        """Return outputs through which gradients reach the actions alone, in the constraints' units."""
        with torch.no_grad(), self._encoding():
            features = network.encoder(observations)
        outputs: torch.Tensor = network(features, None if self.discrete else actions, frozen=True)
        return outputs

    def combine(self, values: torch.Tensor) -> torch.Tensor:
        """Return Q̄_c + κ σ of `values`, over its first axis."""
        if self.settings.members == 1:
            return values[0]
        spread = values.var(dim=0, unbiased=False).clamp(min=1e-20).sqrt()  # a root has no slope at 0
        return values.mean(dim=0) + self.settings.kappa * self._signs * spread

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights, target weights and optimizer state by name."""
        return named({"network": self.network, "target": self.target}, self.optimizer) | {
            "updates": torch.tensor(self.updates)
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned; all of it or nothing.

        Raises:
            StateError: if names or shapes are not those of this critic.
        """
        rest = dict(tensors)
        updates = rest.pop("updates", torch.tensor(0))
        load_named("safety critic", {"network": self.network, "target": self.target}, self.optimizer, rest)
        self.updates = int(updates)
