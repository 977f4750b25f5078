"""`wrap` puts a guard into a Stable-Baselines3 model, `unwrap` takes it out and leaves nothing behind."""

from __future__ import annotations

import io
import logging
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import open_path

from guardrails import AttachError, Guard
from guardrails.critic import Ensemble
from guardrails_sb3 import checkpoint, hosts, seams
from guardrails_sb3.action_sets.hosting import SafeActing
from guardrails_sb3.callbacks import Callbacks
from guardrails_sb3.dials import Dials
from guardrails_sb3.overlay import Overlaid, Overlay
from guardrails_sb3.record import Recorder
from guardrails_sb3.replay_saving import ReplaySaving
from guardrails_sb3.safety_critic import HostCritic

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseAlgorithm)


def wrap(
    model: M,
    guard: Guard,
    *,
    cost_critic: bool | Ensemble = True,
    horizon: int | None = None,
    resume: checkpoint.Target | None = None,
    ledger: str | pathlib.Path | bool = True,
    dual_interval: int | None = None,
) -> M:
    """Guard ``model`` from its next ``learn`` on, and return that same object.

    Supported are the on-policy algorithms PPO and A2C, and sb3-contrib's TRPO, RecurrentPPO and MaskablePPO; and
    the off-policy ones SAC, TD3, DDPG and DQN, and sb3-contrib's TQC, CrossQ and QRDQN; and its ARS. ``learn``,
    ``predict``, ``save``, loggers and callbacks work as before; ``save`` writes the guard's state into the zip as
    well, which loads like any other, also where this package is not installed.

    A constraint's ``cost`` is a key of ``info``, a function ``info -> float``, or several functions, whose
    values are summed; None reads the key that bears the constraint's name. Every ``info`` must carry the
    key: the first step that does not is a `RolloutError`, since a missing cost is no cost of zero.

    Metrics may read rewards, costs, lengths, infos (of an episode's last step), actions, and observations
    unless they are a dict. Dials: ``action_scale`` for continuous actions, ``ent_coef`` and ``target_kl``
    where the algorithm has them; see `guardrails_sb3.dials`. Action sets (`ActionBox`, `RateLimit`, ...) hold each
    action that reaches the environments and each that ``predict`` returns; every ``info`` then says under
    ``interventions`` whether the action was changed, which a Constraint may bound as any cost.

    Args:
        model: a model with an environment.
        guard: a guard that belongs to no other host.
        cost_critic: on-policy, True learns a cost value function for the cost advantages, and False uses
            discounted costs-to-go within the rollout instead: cheaper and noisier. An `Ensemble` adds a
            `SafetyCritic` of that kind, for those who ask its `safety_critic`. Off-policy the safety critic is what
            the constraints act through: True is ``Ensemble()``.
        horizon: T, the steps of an episode, with which a limit per episode is converted into the unit of a safety
            critic. Default: the time limit of the environments.
        resume: the file that a guarded model was saved to: ``wrap(PPO.load(path, env=env), guard,
            resume=path)`` continues with the multipliers, controllers and cost value function it held.
        ledger: where every decision is recorded during ``learn``. True is ``guardrails/ledger.jsonl`` in the
            folder the model logs to (``tensorboard_log`` or ``set_logger``), and nowhere if it logs to none;
            False is nowhere. A guard that records already goes on as it is.
        dual_interval: off-policy, gradient steps from one decision to the next, on the cost that the safety critic
            expects of replayed actions; gates still judge episodes. None decides on the costs of episodes that have
            ended.

    Raises:
        AttachError: if the class is not supported, the model has no environment or is wrapped already,
            the guard belongs to another host, has a dial that is not here to turn, or a metric that reads
            a column this host does not have; if a safety critic is to be used and the horizon is not known. The
            model is then as it was.
        StateError: if ``resume`` is a file of another guard, of an unguarded model, or damaged.

    Example:
        >>> model = wrap(PPO("MlpPolicy", env), Guard(Constraint("cost", limit=25.0)))  # doctest: +SKIP
        >>> model.learn(1_000_000)  # doctest: +SKIP
    """
    if isinstance(model, BaseAlgorithm) and _Attachment.of(model) is not None:
        raise AttachError(
            f"This {type(model).__name__} is wrapped already. Call unwrap(model) first, or give one Guard all "
            "constraints."
        )
    hosts.check(model, guard, cost_critic, dual_interval)
    state = None if resume is None else checkpoint.read(resume)
    callback = hosts.callback(model, guard, cost_critic, horizon, dual_interval)
    dials = Dials(model, guard)
    acting = SafeActing(model, guard, None if callback.critic is None else callback.critic.host.risk)
    dials.inform(callback.critic)
    acting.inform(callback.critic)  # what the sets made of scaled actions, where a shield relies on the critic
    guard.attach(type(model).__name__, dials=dials.available, acts=True)
    try:
        if state is not None:
            acting.load_tensors(state.tensors)
            callback.load_tensors(state.tensors, list(state.guard.get("constraints", ())))
            guard.load_state_dict(state.guard)
    except BaseException:
        guard.detach()
        raise
    if state is None and model.num_timesteps > 0 and guard.state_dict()["step"] == 0:
        logger.warning(
            "This %s has trained %d steps, but its guard starts afresh. Give wrap(..., resume=path) if it was saved "
            "by a guarded run.",
            type(model).__name__,
            model.num_timesteps,
        )
    _Attachment(model, callback, dials, acting, Recorder(guard, ledger)).install()
    return model


def unwrap(model: BaseAlgorithm) -> Guard:
    """Take the guard out of ``model``, which is then as it was before `wrap`, and return the guard.

    The guard keeps its state and may be attached to another host.

    Raises:
        AttachError: if ``model`` is not wrapped, or if something else has replaced one of the wrapped methods
            since; it stays wrapped then.
    """
    attachment = _Attachment.of(model)
    if attachment is None:
        raise AttachError(f"This {type(model).__name__} is not wrapped: there is no guard to take out.")
    attachment.remove()
    attachment.recorder.close()
    attachment.dials.release()
    attachment.acting.release()
    attachment.callback.guard.detach()
    return attachment.callback.guard


def safety_critic(model: BaseAlgorithm) -> HostCritic:
    """Return the safety critic of a wrapped model: ``safety_critic(model).risk(observations, actions)``.

    Raises:
        AttachError: if ``model`` is not wrapped, or its guard has none.
    """
    attachment = _Attachment.of(model)
    critic = None if attachment is None else attachment.callback.critic
    if critic is None:
        raise AttachError(
            f"This {type(model).__name__} has no safety critic. Wrap it with a guard that has a Constraint; an "
            "on-policy algorithm takes wrap(..., cost_critic=Ensemble())."
        )
    return critic.host


def attachment_of(model: BaseAlgorithm) -> _Attachment | None:
    """Return what `wrap` put into ``model``, for other modules of this package; None if it is not wrapped."""
    return _Attachment.of(model)


class _Attachment:
    """The methods of one model object that are overlaid while it is wrapped; the first is bound to this object."""

    def __init__(
        self,
        model: BaseAlgorithm,
        callback: hosts.HostGuard,
        dials: Dials,
        acting: SafeActing,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self.callback, self.dials, self.acting, self.recorder = callback, dials, acting, recorder
        turning = dials.overlays()
        methods: dict[str, Callable[..., Any]] = {
            seams.INIT_CALLBACK: self._init_callback,
            seams.EXCLUDED_FROM_SAVE: self._excluded_save_params,
            "save": self._save,
            **callback.overlays(),
            **ReplaySaving(model, callback.critic, acting.replayed).overlays(),
            **turning,
            **acting.overlays(turning),
        }
        self._original = {name: getattr(model, name) for name in methods}
        self._overlay = Overlay(model, methods)

    @classmethod
    def of(cls, model: BaseAlgorithm) -> _Attachment | None:
        overlaid = vars(model).get(seams.INIT_CALLBACK)
        owner = getattr(overlaid.method, "__self__", None) if isinstance(overlaid, Overlaid) else None
        return owner if isinstance(owner, cls) else None

    def install(self) -> None:
        self._overlay.install()
        self.callback.install()

    def remove(self) -> None:
        self.callback.check()
        self._overlay.remove()
        self.callback.release()

    def _init_callback(self, callback: Any, progress_bar: bool = False) -> BaseCallback:
        callbacks = Callbacks([self.recorder, self.callback], callback)
        combined: BaseCallback = self._original[seams.INIT_CALLBACK](callbacks, progress_bar)
        return combined

    def _excluded_save_params(self) -> list[str]:
        return [*self._original[seams.EXCLUDED_FROM_SAVE](), *self._overlay.methods]

    def _save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        archive = io.BytesIO()
        with self.callback.lifted():
            self._original["save"](archive, exclude=exclude, include=include)
        tensors = self.callback.tensors() | self.acting.tensors()
        normalizer = self._model.get_vec_normalize_env()
        normalised = normalizer is not None and normalizer.norm_obs
        checkpoint.append(archive, checkpoint.Saved(self.callback.guard.state_dict(), tensors, normalised))
        file = open_path(path, "w", suffix="zip")
        file.write(archive.getvalue())
        if isinstance(path, (str, pathlib.Path)):
            file.close()
