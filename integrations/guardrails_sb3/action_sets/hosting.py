"""A model held to the sets of its guard wherever it acts: in the environments it learns in, and in ``predict``.

What the algorithm learns from is its own action, also where another was executed: the sets are part of the
environment that it learns to act in. So on-policy log-probabilities are those of the actions drawn, and Q-values
those of proposing an action. See `guardrails_sb3.action_sets.replay` for sets that move under a replay buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from guardrails import AttachError, Guard, RolloutError
from guardrails_sb3 import plain, seams
from guardrails_sb3.action_sets import situations
from guardrails_sb3.action_sets.acting import MASKS, Acting, both
from guardrails_sb3.action_sets.base import Array, Situation
from guardrails_sb3.action_sets.following import Following
from guardrails_sb3.action_sets.mask import ActionMask
from guardrails_sb3.action_sets.predicting import Predicting
from guardrails_sb3.action_sets.replay import ReplayedActions
from guardrails_sb3.action_sets.shield import CriticShield
from guardrails_sb3.overlay import Overlay
from guardrails_sb3.replay_critic import Executed
from guardrails_sb3.telemetry import record_all

_PREFIX = "actions."
_INFOS = "infos"
"""Name of what masks read of the last ``info`` of each environment."""

_LABELLED = "labelled"
"""Name of the widths in force when the replay buffer was relabelled last: a move since is still to be told to it."""


class SafeActing:
    """The methods of a model and of its environments by which the sets of a guard are enforced.

    Args:
        model: the host; read, not changed.
        guard: has the sets and the widths in force.
        critic: the risk that the model's safety critic predicts, for sets that ask for it.

    Attributes:
        replayed: the executed actions of the replay buffer; None where no set needs them.

    Raises:
        AttachError: if a set means nothing for this model, or its environments act in another space.
    """

    def __init__(self, model: BaseAlgorithm, guard: Guard, critic: Callable[..., Any] | None = None) -> None:
        self._model = model
        self.acting = Acting(model, guard, critic)
        self.propose: Callable[..., Any] = model.predict
        self._enforcement = self.acting.enforcement
        self._memory = self._enforcement.memory(model.n_envs)
        self._infos: Any = []
        self._underway, self._wrapped_at = np.zeros(model.n_envs, dtype=bool), seams.last_observations(model)
        self._seen: Any = None
        self._newest: Any = None
        self._n_steps, self._ended = 0, list[list[int]]()
        self._released = self._proposing = False
        self._labelled = self._enforcement.widths()
        self.replayed: ReplayedActions | None = None
        self._shielded = any(isinstance(part, CriticShield) and part.risk is None for part in self._enforcement.sets)
        self._rollout: list[Array] = []
        moving = any(part.turned for part in self._enforcement.sets)
        if isinstance(model, OffPolicyAlgorithm) and (moving or self._shielded):
            self.replayed = ReplayedActions(model)
        if self._enforcement.sets:
            check_environment(model)
            self._underway = seams.underway(model)

    def release(self) -> None:
        """Enforce nothing from now on, also inside a ``learn`` call that is under way."""
        self._released = True

    def inform(self, critic: Any) -> None:
        """Let a safety critic that a shield relies on learn from the actions that the environments got.

        From those proposed it would learn that a refused action is as safe as what replaced it, and let it pass.
        """
        if not self._shielded:
            return
        if self.replayed is None:
            critic.executed = lambda: np.stack(self._rollout)
        else:
            critic.executed = Executed(self.replayed.label, self.replayed.current, Following(self.acting))

    def overlays(self, below: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Return the methods of the model to be replaced, and by what; none where there is no set.

        Args:
            below: methods that are overlaid already, which these call in place of the model's own.
        """
        self.propose = below.get("predict", self.propose)
        if not self._enforcement.sets:
            return {}
        made = {"collect_rollouts": self._collecting, "predict": self._predicting}
        if isinstance(self._model, OffPolicyAlgorithm):
            made[seams.SAMPLE_ACTION] = self._sampling
        return {name: make(below.get(name, getattr(self._model, name))) for name, make in made.items()}

    def _predicting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        safe = Predicting(self.acting, original)

        def predict(*args: Any, **kwargs: Any) -> Any:
            return (original if self._released or self._proposing else safe.predict)(*args, **kwargs)

        return predict

    def _sampling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Let an off-policy host draw what its policy proposes, which is held to the sets where it is executed."""

        def sample_action(*args: Any, **kwargs: Any) -> Any:
            self._proposing = True
            try:
                return original(*args, **kwargs)
            finally:
                self._proposing = False

        return sample_action

    def _collecting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def collect_rollouts(env: Any, *args: Any, **kwargs: Any) -> Any:
            if self._released:
                return original(env, *args, **kwargs)
            check_environment(self._model)
            self._resume(env.unwrapped)
            self._rollout = []
            try:
                with self._holding(env.unwrapped):
                    outcome = original(env, *args, **kwargs)
            finally:  # after an error the episodes go on where they are, if the host learns again
                if self.replayed is not None:
                    self.replayed.settle()
                self._seen = seams.last_observations(self._model)
                callback = kwargs["callback"] if "callback" in kwargs else args[0]
                self._note_newest(callback.locals.get("new_obs"))
            self._relabel()  # the guard has decided, and what follows is the host's train
            self._log()
            return outcome

        return collect_rollouts

    def _resume(self, inner: Any) -> None:
        """Take up where the last rollout ended, or begin anew where the environments did."""
        self._enforcement.refresh()
        self._relabel()
        if self._memory.n_rows != inner.num_envs:
            self._memory = self._enforcement.memory(inner.num_envs)
        if self._seen is not seams.last_observations(self._model):  # the host has reset its environments since
            self._memory.begin()
            self._infos, self._newest = [], None
            if seams.last_observations(self._model) is not self._wrapped_at:
                self._underway[:] = False

    def _note_newest(self, observations: Any) -> None:
        """Keep what the last step led to if a callback has ended the collection before the host took it up."""
        if observations is not None and observations is not self._seen:
            self._newest = observations

    def _relabel(self) -> None:
        """Relabel the replay buffer if a width has moved since it was done last."""
        if self._released or self.replayed is None:
            return
        if self._labelled != (widths := self._enforcement.widths()):
            self.replayed.relabel()
            self._labelled = widths

    @contextmanager
    def _holding(self, inner: Any) -> Iterator[None]:
        """Hold what reaches ``inner``, the innermost vector environment, to the sets.

        The innermost one, since outer wrappers such as ``VecNormalize`` are pickled with all they hold, and since
        the host compares the chain of wrappers with that of an evaluation environment.
        """
        send, receive = inner.step_async, inner.step_wait
        memory, situation = self._memory, self._situation(inner)
        execute, report = self._enforcement.execute, self._enforcement.report

        def step_async(actions: Array) -> None:
            if not self._released:
                situation.renew(memory.fresh, memory.previous)
                actions = execute(actions, situation, memory)
                if self.replayed is not None:
                    self.replayed.execute(actions)
                elif self._shielded:
                    self._rollout.append(memory.previous)
            send(actions)

        def step_wait() -> Any:
            outcome = receive()
            if not self._released:
                self._infos, self._newest = outcome[3], None
                if ended := report(memory, outcome[2], self._infos):
                    self._ended += ended
                self._n_steps += memory.n_rows
            return outcome

        methods: dict[str, Callable[..., Any]] = {"step_async": step_async, "step_wait": step_wait}
        overlay = Overlay(inner, methods | (self._masking(inner, situation) if self.acting.feeds else {}))
        overlay.install()
        try:
            yield
        finally:
            overlay.remove()

    def _masking(self, inner: Any, situation: Situation) -> dict[str, Callable[..., Any]]:
        """Return the methods by which MaskablePPO asks its environments for masks, theirs and those of the sets."""
        has_attr, get_attr, env_method = inner.has_attr, inner.get_attr, inner.env_method
        own = has_attr(MASKS)

        def known(name: str) -> bool:
            return name == MASKS or has_attr(name)

        def attributes(name: str, indices: Any = None) -> Any:
            return [True] * inner.num_envs if name == MASKS and not own else get_attr(name, indices)

        def method(name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
            if name != MASKS or self._released:
                return env_method(name, *args, indices=indices, **kwargs)
            situation.renew(self._memory.fresh, self._memory.previous)
            allowed = self.acting.allowed(situation)
            if own:
                allowed = both(allowed, np.stack(env_method(name, *args, **kwargs)))
            chosen = range(inner.num_envs) if indices is None else np.atleast_1d(indices)
            return [allowed[index] for index in chosen]

        return {"has_attr": known, "get_attr": attributes, "env_method": method}

    def _situation(self, inner: Any) -> Situation:
        return self.acting.situation(
            self._memory, self._given, self._perceived, partial(self._informed, inner), inner.env_method
        )

    def _given(self) -> Any:
        return situations.given(self._model, self._perceived())

    def _perceived(self) -> Any:
        return seams.last_observations(self._model) if self._newest is None else self._newest

    def _informed(self, inner: Any) -> list[Any]:
        """Return what each environment said last: at its reset, or at its last step.

        Raises:
            RolloutError: if an episode was under way as the model was wrapped, and has not gone on since.
        """
        if not self._infos and self._underway.any():
            raise RolloutError(
                "A set asks for the last info of an episode that was under way when the model was wrapped, which was "
                "not seen. Let the episodes begin anew: learn(..., reset_num_timesteps=True), or "
                "model.set_env(model.get_env()) before learn."
            )
        resets = inner.reset_infos
        return [resets[i] if fresh else self._infos[i] for i, fresh in enumerate(self._memory.fresh.tolist())]

    def _log(self) -> None:
        """Log what was changed since an episode ended last: per episode, and as a share of the steps."""
        if not self._ended:
            return
        per_episode, shares = np.mean(self._ended, axis=0), np.array(self._memory.seen) / self._n_steps
        names = [*(f"{part.name}/" for part in self._enforcement.sets), ""]
        per_set = list(zip(names, per_episode.tolist(), shares.tolist(), strict=True))
        metrics = {f"{name}interventions": count for name, count, _ in per_set}
        record_all(self._model.logger, metrics | {f"{name}intervention_rate": share for name, _, share in per_set})
        self._ended, self._n_steps = [], 0
        self._memory.seen = [0] * len(self._memory.seen)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what an exact resume of the running episodes needs."""
        if not self._enforcement.sets:
            return {}
        kept = self._enforcement.tensors(self._memory)
        if self.replayed is not None:
            kept[_LABELLED] = _flat(self._labelled)
        masks = [part for part in self._enforcement.sets if isinstance(part, ActionMask)]
        if keys := {part.info for part in masks if part.info is not None}:
            kept[_INFOS] = plain.pack([{key: info[key] for key in keys & set(info)} for info in self._infos]).numpy()
        return {f"{_PREFIX}{name}": torch.from_numpy(np.array(values)) for name, values in kept.items()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned; with other environments or sets every episode begins anew."""
        kept = {name.removeprefix(_PREFIX): each.numpy() for name, each in tensors.items() if name.startswith(_PREFIX)}
        if self._enforcement.load(self._memory, kept):
            self._seen = seams.last_observations(self._model)
            self._infos = plain.unpack(tensors[_PREFIX + _INFOS]) if _INFOS in kept else []
        labelled = kept.get(_LABELLED)
        if labelled is not None and labelled.shape == _flat(self._labelled).shape:
            values = iter(labelled.tolist())
            self._labelled = [{name: next(values) for name in part} for part in self._labelled]


def _flat(widths: list[dict[str, float]]) -> Array:
    return np.array([value for part in widths for value in part.values()], dtype=np.float64)


def check_environment(model: BaseAlgorithm) -> None:
    """Raise AttachError if a wrapper around the vector of environments changes actions on their way to them."""
    inner = None if model.env is None else model.env.unwrapped.action_space
    if inner is not None and inner != model.action_space:
        raise AttachError(
            f"Action sets hold the actions that reach the environments, which act in {inner}, but the policy acts in "
            f"{model.action_space}: a wrapper in between changes them. Wrap each environment instead of their vector."
        )
