"""GuardrailsCallback: a guard on a transformers `Trainer` or any subclass that computes its loss on batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from guardrails import AttachError, Dial, Guard, Rollout, RolloutError
from guardrails_transformers import seams
from guardrails_transformers.attached import AttachedCallback
from guardrails_transformers.averages import Averages
from guardrails_transformers.costs import (
    EVALUATION,
    BatchFunction,
    Source,
    check_evaluation,
    check_gates,
    reported,
    sources,
)
from guardrails_transformers.dials import Dials
from guardrails_transformers.loss import GuardedLoss, without_effect
from guardrails_transformers.rows import Traffic
from guardrails_transformers.seams import Host


class _Live(NamedTuple):
    """What holds on to the trainer; a detached callback has none of it."""

    host: Host
    loss: GuardedLoss
    dials: Dials


class GuardrailsCallback(AttachedCallback):
    """Guards a trainer whose loss comes from one forward pass: loss + Σ ψᵢ(vᵢ), vᵢ the scaled violation of cost i.

    ψ(v) is λ v for most schedulers and ([λ + ρ v]₊² - λ²) / 2ρ for `AugmentedLagrangian` and `Augmented`. It joins the
    loss with its gradient and with the host's own scaling for gradient accumulation and processes; where every λ is 0,
    training is the unguarded one, bit for bit. `Guard.step` sees the costs of all batches and processes once per
    optimizer step, before that step; evaluation changes nothing.

    A constraint's ``cost`` is a function ``(outputs, inputs) -> tensor``, one number for the batch or one per row, or
    several, whose values are summed; ``outputs`` are what the model returned for the batch ``inputs``. Or it is the
    name of a metric of evaluations, ``"eval_..."``, which is measured when the host evaluates and at no other time. A
    cost with a gradient acts through the loss. One without can only turn dials: name it in ``drives``, or let a gate
    read it; else it is refused, evaluations' at once and functions' at the first step in which they return rows.

    Dials: ``learning_rate``, ``label_smoothing`` and attributes by path, see `guardrails_transformers.dials`.

    Constructing it attaches the guard; ``trainer.add_callback`` must follow. The guard's state is in every checkpoint
    folder as ``guardrails.json``, and ``trainer.train(resume_from_checkpoint=...)`` restores it.

    Args:
        trainer: a `transformers.Trainer` or a subclass such as TRL's SFT, DPO, KTO and reward trainers.
        guard: the constraints and dials.
        columns: what gates read besides costs: name to a function like a cost's, or to an ``"eval_..."`` metric.
            Metrics that a gate reads by their ``"eval_..."`` names need not be listed.
        drives: constraint to the attribute, by path, that its multiplier *is*, such as ``{"kl": "beta"}``. Its cost
            then acts through that alone.
        missing_ok: resume also from a checkpoint without a guard's state, with the guard as it is.
        ledger: where the main process records every decision while it trains; True is
            ``<output_dir>/guardrails/ledger.jsonl``, False is nowhere. A guard that records already goes on as it is.

    Raises:
        AttachError: if the trainer, its version, or a part of the guard cannot be served. Neither the trainer nor the
            guard is changed then.

    Example:
        >>> trainer.add_callback(GuardrailsCallback(trainer, guard))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        guard: Guard,
        *,
        columns: Mapping[str, BatchFunction | str] | None = None,
        drives: Mapping[str, str] | None = None,
        missing_ok: bool = False,
        ledger: str | Path | bool = True,
    ) -> None:
        if not isinstance(guard, Guard):
            raise AttachError(f"GuardrailsCallback(trainer, guard) needs a Guard second, not {type(guard).__name__}.")
        host = Host(trainer)
        guard.attach(host.name, dials=[part.name for part in guard.parts if isinstance(part, Dial)])
        try:
            found = sources(guard, columns, host.name)
            guard.check_columns({*found, "costs"}, f"the {host.name} host")
            check_evaluation(trainer, found, host.name)
            check_gates(guard, found)
            idle = _idle(guard, found, drives or {})
            dials = Dials(trainer, guard, drives or {}, host.name)
        except BaseException:
            guard.detach()
            raise
        loss = GuardedLoss(host, guard, found, driving=drives or {}, idle=idle)
        self._evaluated = {name: source.metric for name, source in found.items() if source.metric}
        self._alive: _Live | None = _Live(host, loss, dials)
        self._traffic = loss.rows.traffic
        self._averages = Averages()
        self._reported: set[str] | None = None
        self._round: dict[str, float] | None = None
        host.wrap(seams.LOSS, self._compute_loss)
        host.wrap(seams.LOG, self._log)
        if self._evaluated:
            host.wrap(seams.EVALUATE, self._evaluate)
        super().__init__(host, guard, missing_ok=missing_ok, ledger=ledger)
        dials.set(guard)

    @property
    def traffic(self) -> Traffic:
        """What the guard has sent between processes so far."""
        return self._traffic

    @property
    def _live(self) -> _Live:
        if self._alive is None:
            raise AttachError("This GuardrailsCallback is detached. Build one for this trainer.")
        return self._alive

    def _let_go(self) -> None:
        self._live.dials.restore()
        self._alive = self._round = None

    def _look_over(self) -> None:
        if self._live.host.trainer.model_init is not None:  # the model of each training is another
            self._live.dials.renew(self._guard)

    def _put_back(self) -> None:
        if self._alive is not None:
            self._alive.dials.after_step()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the ledger, and begin with what is in force."""
        super().on_train_begin(args, state, control, **kwargs)
        self._live.loss.rows.clear()
        self._averages.clear()
        self._reported = None
        self._live.dials.set(self._guard)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step afresh; refuse to go on if an evaluation did not report what a part of the guard reads."""
        self._live.loss.rows.clear()
        missing = sorted(set(self._evaluated.values()) - self._reported) if self._reported is not None else []
        if missing:
            raise RolloutError(
                f"The evaluation reports no '{missing[0]}', which the guard reads. It reports: "
                f"{', '.join(sorted(self._reported or ()))}."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide on the costs of the step's batches, just before the optimizer's step."""
        live = self._live
        if live.loss.columns:
            self._step(Rollout(costs={**live.loss.take(), **dict.fromkeys(self._evaluated)}))
        live.dials.before_step(kwargs["optimizer"], self._guard)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the learning rate back to the host's schedule."""
        self._put_back()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide on what an evaluation within the training reports, unless others of the same round follow."""
        if not self._training or not self._evaluated:
            return
        metrics = kwargs["metrics"]
        found = {name: reported(key, metrics[key]) for name, key in self._evaluated.items() if key in metrics}
        if _is_scheduled(self._live.host.trainer, metrics):  # else one of the user's, such as one on the training rows
            self._reported = (self._reported or set()) | {key for key in metrics if key.startswith(EVALUATION)}
        if self._round is None:
            self._decide(found)
        else:
            self._round |= found

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the host evaluate; decide once on what it reports of several data sets, when all have been evaluated."""
        data = args[0] if args else kwargs.get("eval_dataset")
        several = isinstance(self._live.host.trainer.eval_dataset if data is None else data, dict)
        if not several or self._round is not None:
            return original(*args, **kwargs)
        self._round = {}
        try:
            metrics = original(*args, **kwargs)
        finally:
            found, self._round = self._round, None
        self._decide(found or {})
        return metrics

    def _decide(self, found: Mapping[str, float]) -> None:
        """Decide on metrics of evaluations, by column, as the first process has them."""
        if found:
            host, loss, _ = self._live
            values = torch.tensor(list(found.values()), dtype=torch.float64)
            agreed = dict(zip(found, loss.rows.agree(host, values), strict=True))
            columns: dict[str, list[float] | None] = dict.fromkeys([*loss.columns, *self._evaluated])
            self._step(Rollout(costs=columns | {name: [value] for name, value in agreed.items()}))

    def _step(self, rollout: Rollout) -> None:
        self._averages.add(self._guard.step(rollout))
        self._live.dials.set(self._guard)

    def _compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Guard the losses that are trained on; the others are the host's own."""
        if not self._training or not seams.is_trained_on(model):
            return original(model, inputs, *args, **kwargs)
        host, loss, _ = self._live
        self._check_added(host)
        if not loss.columns:
            return original(model, inputs, *args, **kwargs)
        return loss.compute(original, model, inputs, *args, **kwargs)

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """Add the means of what was decided since the last time to the host's log of its training."""
        return original(self._averages.join(logs), *args, **kwargs)


def _is_scheduled(trainer: Any, metrics: Mapping[str, Any]) -> bool:
    """Whether these are the metrics of an evaluation that the host itself asks for, by the prefix of their times."""
    data = getattr(trainer, "eval_dataset", None)
    prefixes = [f"{EVALUATION}{name}_" for name in data] if isinstance(data, dict) else [EVALUATION]
    timed = [key for key in metrics if key.endswith("_runtime")]
    return not timed or any(f"{prefix}runtime" in timed for prefix in prefixes)


def _idle(guard: Guard, found: Mapping[str, Source], drives: Mapping[str, str]) -> set[str]:
    """Return the constraints that act through the loss or not at all."""
    names = {part.name for part in guard.constraints}
    idle = names - set(drives) - (names if "costs" in guard.requires else guard.requires)
    for name in sorted(idle):
        if found[name].metric:
            raise AttachError(without_effect(name, f"'{found[name].metric}' has no gradient"))
    return idle
