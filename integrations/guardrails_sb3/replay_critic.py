"""A safety critic that learns from the batches of an off-policy host, as the host itself does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from guardrails import AttachError, Guard, StateError
from guardrails.critic import Ensemble, Transitions
from guardrails_sb3 import off_policy_seams, seams
from guardrails_sb3.costs import Info, Reader, cost_reader
from guardrails_sb3.predictions import Predictions
from guardrails_sb3.replay_costs import Costs, ReplayCosts
from guardrails_sb3.safety_critic import HostCritic

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class Executed(NamedTuple):
    """What the environments get in place of the policy's actions, scaled as the host stores them.

    Args:
        stored: returns it of stored steps, given their rows, environments and stored actions.
        current: of the step under way, given the actions that will be stored.
        following: of a batch's next observations, given the actions that the policy takes there.
    """

    stored: Callable[[Any, Any, torch.Tensor], torch.Tensor]
    current: Callable[[Any], Any]
    following: Callable[[Any, torch.Tensor], torch.Tensor]


class ReplayCritic:
    """Q_c from replayed transitions: a gradient step of its own for each of the host's, on the same batch.

    Costs are kept in a column beside the replay buffer, and the next actions are those that the host has
    just computed; so no batch is drawn and no policy evaluated twice. Where a shield relies on it, it learns of the
    actions that are executed in their place. The penalty on the actor is added as it
    is, ``-min Q + Σ ψ(Q_c)``, and not divided by 1 + Σ λ: Adam takes no notice of a common factor, and a factor
    on Q alone would raise the weight of SAC's entropy with λ.

    Args:
        model: the host.
        guard: has the constraints, at least one.
        settings: of the ensemble.
        horizon: steps of an episode.

    Raises:
        AttachError: if the host or its replay buffer works in a way that is not known.
    """

    def __init__(self, model: OffPolicyAlgorithm, guard: Guard, settings: Ensemble, horizon: int) -> None:
        constraints = guard.constraints
        self._model = model
        self._readers: list[Reader] = [cost_reader(part) for part in constraints]
        self._names = [part.name for part in constraints]
        self._signs = np.array([-1.0 if part.sense == ">=" else 1.0 for part in constraints])
        self._scales = np.array([part.violation_scale for part in constraints])
        self._worst = self._scales.copy()
        self._training = False
        self._batch: tuple[Any, torch.Tensor] | None = None
        self._seen: tuple[Any, FloatArray] | None = None
        self.host = HostCritic(model, guard, settings, horizon)
        self._predictions = Predictions(model.n_envs, self.host.units, self._signs.tolist(), horizon, self.host.gamma)
        self.executed: Executed | None = None
        """The actions that the environments get, where they are what is to be judged and not the policy's own."""
        self._column = self._beside(model.replay_buffer)
        self._seams = off_policy_seams.of(model, self.host, self._learn, lambda: self._batch is not None)
        self._updates = (seams.updates(model), 0, 0)
        self._unpenalised = 0
        self._installed = False

    def _beside(self, buffer: Any) -> ReplayCosts:
        return ReplayCosts(buffer, len(self._names), self._stored, self._sampled, self._labelled)

    def _labelled(self, rows: Any, envs: Any, actions: torch.Tensor) -> torch.Tensor:
        return actions if self.executed is None else self.executed.stored(rows, envs, actions)

    def install(self) -> None:
        """Put hooks into the host's networks and follow its replay buffer."""
        self._column.install()
        self._seams.install()
        self._installed = True
        self._tell_unknown()

    def check(self) -> None:
        """Raise AttachError if something else has replaced one of the methods since."""
        self._column.check()
        self._seams.check()

    def lifted(self) -> AbstractContextManager[None]:
        """Return a context in which the replay buffer is the host's own, to be pickled."""
        return self._column.lifted()

    def release(self) -> None:
        """Take everything out of the host."""
        self._batch = None
        if self._installed:
            self._column.remove()
            self._seams.remove()
            self._installed = False

    def kept(self) -> tuple[Costs, tuple[str, ...]]:
        """Return the costs beside the replay buffer, and the names of their columns."""
        return self._column.values, tuple(self._names)

    def adopt(self, values: Costs | None = None, names: Sequence[str] | None = None) -> None:
        """Follow the buffer that the host has now, with the costs that were saved beside it, as far as they are known.

        Args:
            values: ``(buffer_size, n_envs, n_columns)``, or None.
            names: the constraint of each column; None where the file does not say, which is taken for this guard's.
        """
        if self._column.buffer is not self._model.replay_buffer:
            self._column.remove()
            self._column = self._beside(self._model.replay_buffer)
            self._column.install()
        self._fill(values, names)
        known = self._column.values[np.isfinite(self._column.values).all(axis=2)]
        low, high = self.host.extremes.astype(known.dtype)  # what the column has rounded is no new extreme
        beyond = known[((known < low) | (known > high)).any(axis=1)]
        if len(beyond):
            self.host.observe(beyond)
        self._tell_unknown()

    def _fill(self, values: Costs | None, names: Sequence[str] | None) -> None:
        column = self._column.values
        column[:] = np.nan
        if values is None or values.shape[:2] != column.shape[:2]:
            return
        if names is None:
            names = self._names if values.shape == column.shape else ()
        for index, name in enumerate(self._names):
            if name in names:
                column[..., index] = values[..., names.index(name)]

    def _tell_unknown(self) -> None:
        unknown = self._column.unknown
        if unknown:
            logger.warning(
                "The costs of %d transitions in the replay buffer are not known: they were collected or saved without "
                "this guard, or under other constraints. The host trains on them; the safety critic leaves them out. A "
                "buffer that a guarded model has saved keeps its costs: call load_replay_buffer after wrap.",
                unknown,
            )

    def begin(self, starts: BoolArray) -> None:
        """Forget the environments in ``starts``: they begin an episode."""
        self._predictions.begin(starts)

    def start(self) -> None:
        """Note that ``learn`` begins: a ``train`` that an exception has cut short is not checked any more."""
        self._updates = (seams.updates(self._model), self._seams.learned, self._seams.acted)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Return the context of the host's ``train``; what is sampled and asked elsewhere is not its."""
        self._training = True
        try:
            yield
        finally:
            self._training, self._batch = False, None

    def collecting(self) -> None:
        """Check that the critic was with the host in its last ``train``.

        Raises:
            AttachError: if the host took a gradient step that was not seen here.
        """
        if self._model.replay_buffer is not self._column.buffer:
            self.adopt()
        before, learned, acted = self._updates
        now = seams.updates(self._model)
        if now == before:
            return
        self._updates = (now, self._seams.learned, self._seams.acted)
        self._unpenalised = self._unpenalised + now - before if self._seams.acted == acted else 0
        patience = 2 * int(getattr(self._model, "policy_delay", 1))
        if self._seams.learned - learned != now - before or self._unpenalised > patience:
            raise AttachError(
                f"{type(self._model).__name__} trained in a way that its guard did not see: its internals are not "
                "those of Stable-Baselines3 2.9, so the constraints would not act. Upgrade training-guardrails, or use "
                "the algorithm as its package brings it."
            )

    def step(self, infos: Sequence[Info], costs: FloatArray, dones: BoolArray, buffer_actions: Any) -> None:
        """Take a step of every environment, before the host stores it.

        Args:
            infos: of the step.
            costs: ``(n_envs, n_constraints)``, as read.
            dones: ``(n_envs,)``, whether it ended its episode.
            buffer_actions: ``(n_envs, ...)``, the actions as the host will store them.
        """
        bounded = self._bounded(costs)
        self._seen = (infos, bounded)
        if self._predictions.due:
            judged = buffer_actions if self.executed is None else self.executed.current(buffer_actions)
            self._predictions.predict(*self._foresee(judged))
        truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        self._predictions.step(bounded, dones, truncated)

    def _foresee(self, buffer_actions: Any) -> tuple[FloatArray, FloatArray]:
        observations = self._model.policy.obs_to_tensor(seams.last_observations(self._model))[0]
        kind = None if self.host.critic.discrete else torch.float32
        actions = torch.as_tensor(np.asarray(buffer_actions), dtype=kind, device=self._model.device)
        with torch.no_grad():
            values = self.host.critic.values(observations, actions.reshape(len(actions), -1))
            risks = self.host.critic.combine(values)
        return values.mean(dim=0).cpu().double().numpy(), risks.cpu().double().numpy()

    def _bounded(self, costs: FloatArray) -> FloatArray:
        """Return a step's costs to learn from: one that could not be measured counts as the worst there has been."""
        finite = np.isfinite(costs)
        signed = np.where(finite, costs * self._signs, -np.inf)
        self._worst = np.maximum(self._worst, signed.max(axis=0))
        if not finite.all():
            costs = np.where(finite, costs, self._worst * self._signs)
        bounded: FloatArray = np.clip(costs, -1e6 * self._scales, 1e6 * self._scales)
        self.host.observe(bounded)
        return bounded

    def _stored(self, infos: Sequence[Info]) -> FloatArray:
        """Return the costs of a step that is stored: read when it was taken, or now if a user adds it."""
        if self._seen is not None and self._seen[0] is infos:
            return self._seen[1]
        return self._bounded(np.array([[read(info) for read in self._readers] for info in infos], dtype=np.float64))

    def _sampled(self, samples: Any, costs: torch.Tensor) -> None:
        if self._training:
            self._batch = samples, costs

    def _learn(self, next_actions: torch.Tensor) -> None:
        if self._batch is None:
            return
        samples, costs = self._batch
        discounts = getattr(samples, "discounts", None)
        following = next_actions.detach()
        if self.executed is not None:
            following = self.executed.following(samples.next_observations, following)
        self.host.critic.update(
            Transitions(
                samples.observations,
                samples.actions,
                costs,
                samples.next_observations,
                following,
                samples.dones,
                self.host.gamma if discounts is None else discounts,
                complete=self._column.complete,
            )
        )

    def take(self) -> tuple[list[FloatArray], dict[str, float]]:
        """Return what was missed of each episode that ended since the last call, in the costs' units, and metrics."""
        missed, errors, covered = self._predictions.take()
        metrics = {f"{self._names[0]}/critic_loss": self.host.critic.take_loss(), **self._seams.take_metrics()}
        if errors is not None and covered is not None:
            metrics |= {f"{name}/critic_error": float(errors[index]) for index, name in enumerate(self._names)}
            metrics |= {f"{name}/critic_coverage": float(covered[index]) for index, name in enumerate(self._names)}
        return [each * self._scales for each in missed], metrics

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume needs besides the replay buffer."""
        named = {f"predictions.{name}": tensor for name, tensor in self._predictions.tensors().items()}
        named |= {f"critic.{name}": tensor for name, tensor in self.host.critic.tensors().items()}
        named |= {f"hooks.{name}": tensor for name, tensor in self._seams.tensors().items()}
        return named | {
            "costs.worst": torch.from_numpy(self._worst.copy()),
            "costs.extremes": torch.from_numpy(self.host.extremes.copy()),
        }

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], *, running: bool) -> None:
        """Restore what `tensors` returned; all of the critic or nothing.

        Args:
            tensors: what `tensors` returned.
            running: whether the episodes that ran then go on.

        Raises:
            StateError: if the run was saved with another ensemble, another architecture or an earlier version.
        """
        parts: dict[str, dict[str, torch.Tensor]] = {"critic": {}, "predictions": {}, "costs": {}, "hooks": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        if missing := {"worst", "extremes"} - set(parts["costs"]):
            raise StateError(
                f"The saved state has no costs.{sorted(missing)[0]}: it is damaged, or was written by an earlier "
                "version. Wrap without resume= to let the safety critic start afresh."
            )
        self.host.critic.load_tensors(parts["critic"])
        self._seams.load_tensors(parts["hooks"])
        self._worst = parts["costs"]["worst"].numpy().copy()
        self.host.restore(parts["costs"]["extremes"].numpy())
        self._predictions.load_tensors(parts["predictions"], running=running)
