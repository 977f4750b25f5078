"""GuardrailsCallback: a guard on a trainer of TRL; here on one that samples groups of completions (GRPO, RLOO)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

import guardrails_transformers
from guardrails import AttachError, Constraint, Guard, Rollout
from guardrails_transformers.attached import PREFIX, AttachedCallback
from guardrails_trl import hosts
from guardrails_trl.advantages import mix
from guardrails_trl.costs import cost_functions, is_async
from guardrails_trl.dials import Dials
from guardrails_trl.pairs import PairsCallback
from guardrails_trl.refinement import Refined, Refining, Written
from guardrails_trl.seams import GENERATE_AND_SCORE, SCORE, Host, Mode

logger = logging.getLogger(__name__)

_UNKNOWN = 1e9
"""Nats per token of a completion of which the host computed nothing: no metric takes it for competent."""


class _Scored(NamedTuple):
    """What the host just scored: gathered over all processes, except for the last three."""

    rewards: Tensor
    costs: dict[str, Tensor]
    lengths: Tensor
    completion_ids: list[list[int]]
    texts: tuple[list[Any], list[Any]]
    inputs: list[dict[str, Any]]


class GuardrailsCallback(AttachedCallback):
    """Guards a trainer of TRL.

    On GRPO and RLOO, which this class serves itself, A = (A_r - Σ λᵢ A_cᵢ) / (1 + Σ λᵢ). For `OnlineDPOTrainer` the
    constructor returns a `guardrails_trl.pairs.PairsCallback`; for trainers whose loss comes from a batch, such as
    SFT, DPO, KTO and reward trainers, a `guardrails_transformers.GuardrailsCallback`, whose costs and further
    arguments are described there. A subclass of this one serves GRPO and RLOO only, and is refused elsewhere.

    A_r are the host's own advantages; A_cᵢ are what the host's own estimator makes of cost i alone, whatever
    ``scale_rewards``, ``multi_objective_aggregation`` or ``normalize_advantages`` say. Once per generation batch,
    `Guard.step` sees the costs of all processes, and the multipliers it decides apply to that same batch. With
    every λ at 0 the training is the unguarded one, bit for bit. Evaluation logs the costs and changes nothing.

    A constraint's ``cost`` is a function with the signature of a TRL reward function, plain or asynchronous, or
    several, whose values are summed. ``None`` or NaN for a completion counts as a violation. A completion that no
    reward function scored has A_r = 0, as in TRL, and its cost still counts.

    Metrics may read rewards, costs and lengths; on one process also prompts, completions, the data set's rows as
    infos, and ``entropy`` and ``kl`` where the host computes them anyway: RLOO the first, GRPO both where a batch
    is used for more than one update. These two are of the tokens that the policy sampled, lengths of all tokens.
    Dials: ``beta``, ``temperature``, ``max_completion_length``; see `guardrails_trl.dials`.

    A `Refinement` adds α · (-log π(y⁺|x)) to the loss: what the policy wrote is corrected right after the host has
    scored it, and the corrections travel with their rows; see `guardrails_trl.refined_loss`. Evaluation refines
    nothing.

    Constructing it attaches the guard; ``trainer.add_callback`` must follow. Multipliers are saved into every
    checkpoint as ``guardrails.json``, and ``trainer.train(resume_from_checkpoint=...)`` restores them.

    Args:
        trainer: a trainer of TRL, PEFT or not; of GRPO and RLOO also subclasses that keep the scoring.
        guard: the constraints.
        missing_ok: resume also from a checkpoint without a guard's state, with the guard as it is.
        ledger: where the main process records every decision while it trains; True is
            ``<output_dir>/guardrails/ledger.jsonl``, False is nowhere. A guard that records already goes on as it is.

    Raises:
        AttachError: if the trainer, its version, or a constraint's cost cannot be guarded. Neither the trainer
            nor the guard is changed then.

    Example:
        >>> trainer.add_callback(GuardrailsCallback(trainer, guard))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __new__(cls, trainer: Any, guard: Any, **options: Any) -> Any:
        """Return the callback for this kind of trainer."""
        where = hosts.kind(trainer)
        if where == "groups":
            return super().__new__(cls)
        other = PairsCallback if where == "pairs" else guardrails_transformers.GuardrailsCallback
        if cls is not GuardrailsCallback:
            kind, address = type(trainer).__name__, f"{other.__module__.removesuffix('.callback')}.{other.__name__}"
            raise AttachError(
                f"{cls.__name__} extends guardrails_trl.GuardrailsCallback, which acts on GRPO and RLOO alone; "
                f"{kind} is guarded by a {address}, so nothing of {cls.__name__} would run. Derive it from {address} "
                "for this trainer, or add a TrainerCallback of your own beside the guard's."
            )
        return other(trainer, guard, **options)

    def __init__(
        self,
        trainer: GRPOTrainer | RLOOTrainer,
        guard: Guard,
        *,
        missing_ok: bool = False,
        ledger: str | Path | bool = True,
    ) -> None:
        if not isinstance(guard, Guard):
            raise AttachError(f"GuardrailsCallback(trainer, guard) needs a Guard second, not {type(guard).__name__}.")
        host = Host(trainer)
        dials = Dials(trainer, guard, host.name)
        columns = host.data_columns
        self._functions = {
            part.name: dials.cost_functions(part) or cost_functions(part, columns, host.name)
            for part in guard.constraints
            if part.cost is not None or part.name not in guard.steering
        }
        self._has_async = any(is_async(function) for functions in self._functions.values() for function in functions)
        refined = {"edit_ratio"} if guard.refinement else set()
        guard.check_columns(host.rollout_columns | set(self._functions) | refined, f"the {host.name} host")
        refining = Refining(host, guard) if guard.refinement else None
        try:
            guard.attach(host.name, dials=dials.available, refines=True)
        except AttachError:
            if refining is not None:
                refining.detach()
            raise
        self._dials: Dials | None = dials
        self._host: Host | None = host
        self._scored: _Scored | None = None
        self._refining: Refining | None = refining
        if refining is not None:
            refining.attach()
        host.wrap(SCORE, self._score)
        host.wrap(GENERATE_AND_SCORE, self._generate_and_score)
        super().__init__(host, guard, missing_ok=missing_ok, ledger=ledger)

    def _let_go(self) -> None:
        if self._dials is not None:
            self._dials.restore()
        if self._refining is not None:
            self._refining.detach()
        self._dials = self._refining = self._host = None
        self._functions = {}  # some of which read the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the ledger, and begin with nothing of a step that an earlier training did not end."""
        super().on_train_begin(args, state, control, **kwargs)
        if self._refining is not None:
            self._refining.begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Train on the batch in hand with what it was generated with, also after an evaluation that failed."""
        if self._dials is not None:
            self._dials.back()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the batch in hand back what it was generated with."""
        if self._dials is not None:
            self._dials.back()

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give the batch in hand back what it was generated with."""
        if self._dials is not None:
            self._dials.back()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what the refinement's term was over the micro-batches of an optimizer step."""
        if self._refining is not None:
            self._refining.flush(PREFIX)

    def _attached(self) -> Host:
        if self._host is None:
            raise AttachError("This GuardrailsCallback is detached.")
        return self._host

    def _score(
        self,
        original: Callable[..., Tensor],
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """Score costs as further columns of the host's rewards, and return the rewards alone."""
        host, by_constraint, dials = self._attached(), self._functions, self._dials
        functions = {
            f"{PREFIX}{name}/cost" + (f"[{i}]" if i else ""): function
            for name, parts in by_constraint.items()
            for i, function in enumerate(parts)
        } | {f"{PREFIX}length": _lengths}
        with host.scoring_with(functions, has_async=self._has_async):
            columns = original(inputs, prompts, completions, completion_ids_list)
        n_rewards = columns.shape[1] - len(functions)
        rewards, remaining = columns[:, :n_rewards], columns[:, n_rewards:]
        parts = torch.split(remaining, [*map(len, by_constraint.values()), 1], dim=1)
        costs = {name: part.sum(dim=1) for name, part in zip(by_constraint, parts[:-1], strict=True)}
        if dials is not None:
            costs = dials.measured(costs)
        total = host.total_rewards(rewards)
        if total.isnan().any():
            _warn_unscored(host, columns, n_rewards, prompts, completions)
        self._scored = _Scored(total, costs, parts[-1][:, 0], completion_ids_list, (prompts, completions), inputs)
        return rewards

    def _generate_and_score(self, original: Callable[..., Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Let the host generate and score, decide, and put the multipliers into the advantages."""
        host = self._attached()
        mode = host.mode  # as the host takes it: what generates or scores may leave the model in another
        if mode == "train":
            self._check_added(host)
        if self._dials is not None:
            self._dials.before(self._guard, training=mode == "train")
        try:
            with nullcontext() if self._dials is None else self._dials.watching():
                output = original(inputs)
            return self._guarded(host, output, mode)
        finally:
            if self._dials is not None:  # else it was detached meanwhile, and the trainer has its own values back
                self._dials.after(self._guard)

    def _guarded(self, host: Host, output: dict[str, Any], mode: Mode) -> dict[str, Any]:
        scored, self._scored = self._scored, None
        if scored is None:
            raise AttachError(f"{host.name} produced completions without scoring them; a guard cannot act on that.")
        if mode == "train":
            self._act(host, scored, output)
        else:
            for part in self._guard.constraints:
                if part.name in scored.costs:
                    host.log("eval", {f"{PREFIX}{part.name}/cost": _mean_cost(part, scored.costs[part.name])})
            if self._refining is not None:
                self._refining.leave(PREFIX, len(scored.rewards))
        for name, costs in scored.costs.items():
            host.log_column(f"{PREFIX}{name}/cost", costs.tolist())
        return output

    def _act(self, host: Host, scored: _Scored, output: dict[str, Any]) -> None:
        alone, refining = host.is_alone, self._refining
        written = _written(host, scored)
        refined = refining.correct(written, output) if refining is not None and refining.measures else None
        rollout = Rollout(
            rewards=_column(scored.rewards),
            costs={name: _column(costs) for name, costs in scored.costs.items()},
            lengths=_column(scored.lengths),
            prompts=scored.texts[0] if alone else None,
            completions=scored.texts[1] if alone else None,
            infos=scored.inputs if alone else None,
            edit_ratio=None if refined is None else refined.edit_ratio,
            **(_known(host.divergences(output)) if self._guard.requires & {"entropy", "kl"} else {}),
        )
        decision = self._guard.step(rollout)
        host.log("train", {f"{PREFIX}{name}": value for name, value in decision.metrics().items()})
        if refining is not None:
            self._refine(refining, refined, written, output, decision.step, rollout.n_rows)
        steering = self._guard.steering | (self._dials.steering if self._dials is not None else frozenset())
        acting = [part for part in self._guard.constraints if part.name not in steering]
        multipliers = decision.multipliers
        if not any(multipliers[part.name] for part in acting):
            return
        penalties = []
        for part in acting:
            rows = scored.costs[part.name]
            if decision.constraints[part.name].invalid_rows:
                rows = torch.as_tensor(self._guard.sanitised(part.name), dtype=rows.dtype, device=rows.device)
            signed = -rows if part.sense == ">=" else rows
            penalties.append((multipliers[part.name], host.advantages(signed)))
        local = output["advantages"]
        output["advantages"] = mix(local, [(lam, host.local(rows, len(local))) for lam, rows in penalties])
        everything = output["advantages"]
        if not alone:
            everything = mix(local.new_tensor(host.logged_advantages(rollout.n_rows)), penalties)
        host.replace_logged_advantages(everything.tolist())

    def _refine(
        self,
        refining: Refining,
        refined: Refined | None,
        written: Written,
        output: dict[str, Any],
        step: int,
        n_rows: int,
    ) -> None:
        """Correct what was written unless that was done to decide, or the weight is 0; learn and report it."""
        if refined is None and self._guard.refinement_weight > 0.0:
            refined = refining.correct(written, output)
        if refined is None:
            refining.rest()
            refining.leave(PREFIX, n_rows)
            return
        refining.learn(refined, written, output)
        refining.report(refined, written, PREFIX, step)


def _written(host: Host, scored: _Scored) -> Written:
    prompts, completions = scored.texts
    rewards = host.local(scored.rewards, len(prompts))
    return Written(scored.inputs, prompts, completions, scored.completion_ids, rewards.tolist())


def _lengths(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Score completions by their tokens, so that the host gathers these along with everything it scores."""
    return [float(len(ids)) for ids in completion_ids]


def _known(columns: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return ``columns`` with NaN as `_UNKNOWN`: one hidden row is no failure of a whole metric."""
    return {name: [_UNKNOWN if math.isnan(value) else value for value in rows] for name, rows in columns.items()}


def _column(values: Tensor) -> Any:
    return values.cpu().double().numpy()  # Apple's MPS has no float64


def _mean_cost(part: Constraint, costs: Tensor) -> float:
    return part.measure(_column(costs)).cost


def _warn_unscored(host: Host, columns: Tensor, n_rewards: int, prompts: list[Any], completions: list[Any]) -> None:
    """Warn of completions that no reward function scored, where a cost column hides them from the host."""
    local = host.local(columns, len(prompts)).isnan()
    hidden = local[:, :n_rewards].all(dim=1) & ~local.all(dim=1)
    if hidden.any():
        row = int(hidden.nonzero()[0])
        logger.warning(
            "All reward functions returned None for %d completions, for example prompt %r, completion %r. Please "
            "ensure that at least one reward function returns a valid reward.",
            int(hidden.sum()), prompts[row], completions[row],
        )  # fmt: skip
