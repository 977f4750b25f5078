"""Where the costs of a guard come from on this host: functions of a batch, or metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guardrails import AttachError, Guard, RolloutError
from guardrails.competence import Between

EVALUATION = "eval_"
"""Start of the names under which the host reports what it evaluated."""

BatchFunction = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Source:
    """Where one column comes from.

    Args:
        owner: what errors call it.
        functions: of (outputs, inputs), whose values are summed; none for a metric of an evaluation.
        metric: the name the host reports it under, else an empty string.
    """

    owner: str
    functions: tuple[BatchFunction, ...] = ()
    metric: str = ""

    def measure(self, outputs: Any, inputs: Any) -> Tensor:
        """Return the cost of a batch: one number, or one for each of its rows, in at least single precision."""
        total = self._call(self.functions[0], outputs, inputs)
        for function in self.functions[1:]:
            total = total + self._call(function, outputs, inputs)
        return total

    def _call(self, function: BatchFunction, outputs: Any, inputs: Any) -> Tensor:
        label = getattr(function, "__name__", type(function).__name__)
        try:
            values = function(outputs, inputs)
        except Exception as error:
            error.add_note(f"{self.owner}: this was raised by its function '{label}'.")
            raise
        try:
            column = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RolloutError(
                f"{self.owner}: its function '{label}' returned {type(values).__name__} ({error}); return a tensor, "
                "one number for the batch or one per row."
            ) from error
        if column.ndim > 1:
            raise RolloutError(
                f"{self.owner}: its function '{label}' returned a tensor of shape {tuple(column.shape)}; return one "
                "number for the batch or one per row, shape (n_rows,). Reduce tokens to one value per row first."
            )
        return column if column.dtype == torch.float64 else column.float()


def sources(guard: Guard, columns: Mapping[str, BatchFunction | str] | None, host: str) -> dict[str, Source]:
    """Return where each constraint's cost and each further column of the rollouts comes from, by name.

    Metrics of evaluations that the guard's gates read are found by their names.

    Raises:
        AttachError: if a cost is none that this host could measure, or two columns have one name.
    """
    found = {part.name: _source(f"Constraint '{part.name}'", part.name, part.cost, host) for part in guard.constraints}
    for name, given in (columns or {}).items():
        if name in found:
            raise AttachError(f"There is a constraint and a column '{name}'. Give the column another name.")
        found[name] = _source(f"Column '{name}'", name, given, host)
    for name in sorted(guard.requires - set(found)):
        if name.startswith(EVALUATION):
            found[name] = Source(f"Column '{name}'", metric=name)
    return found


def _source(owner: str, name: str, given: Any, host: str) -> Source:
    if callable(given):
        return Source(owner, (given,))
    if isinstance(given, Sequence) and not isinstance(given, str):
        return Source(owner, tuple(given))
    key = name if given is None else given
    if isinstance(key, str) and key.startswith(EVALUATION):
        return Source(owner, metric=key)
    named = "names no cost" if given is None else f"names {given!r}"
    raise AttachError(
        f"{owner} {named}, but on {host} a cost is a function of the batch or a metric of the evaluation. Give "
        "cost=function, where function(outputs, inputs) returns one number or one per row, or cost='eval_...', the "
        "name that an evaluation reports."
    )


def reported(metric: str, value: Any) -> float:
    """Return what an evaluation reports of a metric as a number; NaN for None, which says that there was none.

    Raises:
        RolloutError: if it is something else.
    """
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RolloutError(
            f"The evaluation reports '{metric}', which the guard reads, as {type(value).__name__} ({error}). Let "
            "compute_metrics return one number under that name, or None where there is none to give."
        ) from error


def check_evaluation(trainer: Any, found: Mapping[str, Source], host: str) -> None:
    """Raise unless a trainer evaluates while it trains, if something waits for that.

    Raises:
        AttachError: naming the first that would wait in vain.
    """
    waiting = next((each for each in found.values() if each.metric), None)
    if waiting is not None and str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy)) == "no":
        raise AttachError(
            f"{waiting.owner} reads '{waiting.metric}', but this {host} never evaluates while it trains. Give its "
            "arguments eval_strategy='steps' or 'epoch', and an eval_dataset."
        )


def check_gates(guard: Guard, found: Mapping[str, Source]) -> None:
    """Raise if a gate reads both what each step measures and what an evaluation does: it would never see both.

    Raises:
        AttachError: naming the gate.
    """
    moving = [getattr(part, "limit", getattr(part, "value", None)) for part in guard.parts]
    for gate in {value.gate.name: value.gate for value in moving if isinstance(value, Between)}.values():
        read = {column for each in gate.requires for column in each.measured.requires}
        sources = found.values() if "costs" in read else [found[name] for name in read if name in found]
        if len({bool(each.metric) for each in sources}) == 2:
            raise AttachError(
                f"Gate '{gate.name}' requires something of every step and something of evaluations, which never come "
                "together. Make two gates of it, or take all from evaluations."
            )
