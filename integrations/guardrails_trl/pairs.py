"""A guard on TRL's OnlineDPO trainer: the better of two completions is the one with the better Lagrangian.

OnlineDPO samples two completions per prompt and prefers the one with the higher score, so its preferences are all
that a cost can change. Here the score of a completion is

    s = r - Σ λᵢ cᵢ / bᵢ

with r the host's weighted reward, cᵢ its i-th cost and bᵢ that constraint's violation scale: a multiplier is in
units of reward, per scale of its cost. Ranking by it is what maximises the Lagrangian E[r] - Σ λᵢ (E[cᵢ] - dᵢ) / bᵢ,
whose limits dᵢ are the same for both completions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from guardrails import AttachError, Guard, Rollout
from guardrails_transformers.attached import AttachedCallback
from guardrails_transformers.averages import Averages
from guardrails_transformers.rows import Rows, Traffic
from guardrails_transformers.wrapping import SHARED, Wrapping
from guardrails_trl.costs import cost_functions, is_async
from guardrails_trl.seams import SUPPORTED, check_free

SCORE = "_calculate_rewards_from_functions"
LOG = "log"

_PARAMETERS = {
    SCORE: ["prompts", "completions", "completion_ids_list", "reward_kwargs"],
    LOG: ["logs", "start_time"],
    **SHARED,
}
_REWARDS = "rewards"


class PairsCallback(AttachedCallback):
    """Guards an OnlineDPO trainer, whose pairs are then ranked by reward less weighted cost.

    A constraint's ``cost`` is a function with the signature of a TRL reward function, or several, whose values are
    summed; ``None`` or NaN for a completion counts as a violation. `Guard.step` sees the costs of all micro-batches
    and processes once per optimizer step, and the multipliers it decides rank the pairs of the next. With every λ at
    0 the training is the unguarded one, bit for bit. Metrics may read rewards and costs; there are no dials.

    Args:
        trainer: a ``trl.experimental.online_dpo.OnlineDPOTrainer`` with reward functions.
        guard: the constraints.
        missing_ok: resume also from a checkpoint without a guard's state, with the guard as it is.
        ledger: where the main process records every decision while it trains; True is
            ``<output_dir>/guardrails/ledger.jsonl``, False is nowhere. A guard that records already goes on as it is.

    Raises:
        AttachError: if the trainer, its version, or a part of the guard cannot be served. Neither the trainer nor the
            guard is changed then.
    """

    def __init__(
        self, trainer: Any, guard: Guard, *, missing_ok: bool = False, ledger: str | Path | bool = True
    ) -> None:
        if not isinstance(guard, Guard):
            raise AttachError(f"GuardrailsCallback(trainer, guard) needs a Guard second, not {type(guard).__name__}.")
        host = Wrapping(trainer)
        _check(trainer, host.name)
        columns = getattr(trainer.train_dataset, "column_names", None)
        known = set(columns) if isinstance(columns, list) else None
        self._functions = {part.name: cost_functions(part, known, host.name) for part in guard.constraints}
        for name, functions in self._functions.items():
            if any(is_async(function) for function in functions):
                raise AttachError(
                    f"Constraint '{name}': its cost function is asynchronous, but {host.name} calls its reward "
                    "functions one after the other and has no event loop. Give a plain function."
                )
        guard.check_columns({_REWARDS, "costs", *self._functions}, f"the {host.name} host")
        guard.attach(host.name)
        names = [_REWARDS, *self._functions]
        self._rows = Rows(names, frozenset(names))
        self._averages = Averages()
        host.wrap(SCORE, self._score)
        host.wrap(LOG, self._log)
        super().__init__(host, guard, missing_ok=missing_ok, ledger=ledger)

    @property
    def traffic(self) -> Traffic:
        """What the guard has sent between processes so far."""
        return self._rows.traffic

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the ledger, and begin with nothing of an earlier training but what is in force."""
        super().on_train_begin(args, state, control, **kwargs)
        self._rows.clear()
        self._averages.clear()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step afresh."""
        self._rows.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide on the costs of the step's completions; what is decided ranks the pairs of the next step."""
        if self._wrapping is None:
            return
        columns, _ = self._rows.take(self._wrapping)
        rewards = columns.pop(_REWARDS)
        self._averages.add(self._guard.step(Rollout(rewards=rewards, costs=columns)))

    def _score(
        self,
        original: Callable[..., Tensor],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
        **columns: Any,
    ) -> Tensor:
        """Return the host's scores less the weighted costs."""
        host = self._wrapping
        if host is None:
            return original(prompts, completions, completion_ids_list, **columns)
        self._check_added(host)
        scores = original(prompts, completions, completion_ids_list, **columns)
        given = columns | {"completion_ids": completion_ids_list, "trainer_state": host.trainer.state}
        costs = {
            name: torch.tensor(
                [function(prompts=prompts, completions=completions, **given) for function in functions],
                dtype=torch.float64,
            ).sum(dim=0)
            for name, functions in self._functions.items()
        }
        self._rows.add(  # the host takes its penalty of a missing end off the scores in place
            {_REWARDS: scores.clone()} | {name: cost.to(scores.device, scores.dtype) for name, cost in costs.items()}
        )
        multipliers = self._guard.multipliers
        for part in self._guard.constraints:
            weight = multipliers[part.name] / part.violation_scale
            if weight:
                sane = torch.as_tensor(part.sanitise(costs[part.name].numpy()), dtype=scores.dtype)
                scores = scores - (-weight if part.sense == ">=" else weight) * sane.to(scores.device)
        return scores

    def _log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """Add the means of what was decided since the last time to the host's log of its training."""
        return original(self._averages.join(logs), *args, **kwargs)


def _check(trainer: Any, name: str) -> None:
    base = next(base for base in type(trainer).__mro__ if base.__name__ == "OnlineDPOTrainer")
    check_free(trainer, name, _PARAMETERS, (SCORE,))
    for method, expected in _PARAMETERS.items():
        function = getattr(base, method, None)
        if function is None or list(inspect.signature(function).parameters)[1:] != expected:
            raise AttachError(
                f"training-guardrails does not know the OnlineDPOTrainer of TRL {trl.__version__}: its method "
                f"{method}({', '.join(expected)}) is gone or has changed. Install {SUPPORTED} or upgrade "
                "training-guardrails."
            )
    for method in (SCORE, "training_step"):
        if getattr(type(trainer), method) is not getattr(base, method):
            raise AttachError(
                f"{name} replaces {method} of OnlineDPOTrainer, so its pairs may be ranked by something else and a "
                "guard could not keep its promise. Use OnlineDPOTrainer itself, or a subclass that leaves this alone."
            )
    if getattr(trainer, "judge", None) is not None:
        raise AttachError(
            f"This {name} lets a judge rank its pairs, so there is no score that a cost could be weighed against. "
            "Build it with reward_funcs in place of the judge."
        )
