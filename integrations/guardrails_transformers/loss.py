"""The loss of a guarded trainer: the host's own, the batch measured on the way, and the penalties of its costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from guardrails import AttachError, Guard
from guardrails.rollout import FloatArray
from guardrails_transformers.costs import Source
from guardrails_transformers.forward import Forward
from guardrails_transformers.penalty import Penalty
from guardrails_transformers.rows import Rows
from guardrails_transformers.seams import Host


class GuardedLoss:
    """Stands in the place of a trainer's ``compute_loss`` while it trains.

    Args:
        host: the trainer.
        guard: decides the multipliers.
        found: where each column comes from.
        driving: constraints that act through an attribute of the host instead of the loss.
        idle: constraints that nothing else follows, so that they need a gradient.
    """

    def __init__(
        self,
        host: Host,
        guard: Guard,
        found: Mapping[str, Source],
        *,
        driving: Collection[str],
        idle: Collection[str],
    ) -> None:
        self._host = host
        self._sources = {name: source for name, source in found.items() if source.functions}
        acting = {part.name for part in guard.constraints} & set(self._sources) - set(driving)
        self._acting, self._idle = acting, set(idle) & set(self._sources)
        self._penalty = Penalty(guard, frozenset(acting))
        self._backbone: tuple[nn.Module, nn.Module | None] | None = None
        self.rows = Rows(tuple(self._sources), guard.requires)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that each batch is measured for."""
        return list(self._sources)

    def compute(self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the host compute its loss, measure the batch, and add the penalties.

        Args:
            original: the host's ``compute_loss``.
            model: what it is called with, wrapped as it is.
            inputs: the batch.
            *args: whether the outputs are wanted, and the items in the accumulated batch.
            **kwargs: the same by name.
        """
        given: Any = dict(inputs) if hasattr(inputs, "keys") else copy.copy(inputs)  # hosts take labels out of it
        with Forward(model, self._below(model)) as forward:
            result = original(model, inputs, *args, **kwargs)
        outputs = forward.outputs(self._host.name, lambda hidden: self._host.logits(model, hidden))
        costs = {name: self._measure(name, source, outputs, given) for name, source in self._sources.items()}
        self.rows.add(costs, find_batch_size(given) or 0)
        term = self._penalty(costs, self.rows, self._host)
        if term is None:
            return result
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        loss = result[0] if isinstance(result, tuple) else result
        scaled = term.to(loss.device) / self._host.accumulation(items)
        return (result[0] + scaled, *result[1:]) if isinstance(result, tuple) else result + scaled

    def take(self) -> dict[str, FloatArray | None]:
        """Return the costs of the step's batches over all processes.

        Raises:
            AttachError: if the host trained without its ``compute_loss``, or a cost could never act.
        """
        if not len(self.rows):
            raise AttachError(
                f"This {self._host.name} trains without calling compute_loss, so a cost cannot act on its loss. Guard "
                "a trainer that keeps Trainer.training_step."
            )
        costs, graded = self.rows.take(self._host)
        self._idle -= graded
        for name in sorted(self._idle):
            column = costs[name]
            if column is not None and len(column):  # of one without rows nothing is known yet
                raise AttachError(without_effect(name, "its function returns no gradient"))
        return costs

    def _measure(self, name: str, source: Source, outputs: Any, inputs: Any) -> Tensor:
        with torch.set_grad_enabled(name in self._acting):
            return source.measure(outputs, inputs).to(self._host.trainer.accelerator.device)

    def _below(self, model: nn.Module) -> nn.Module | None:
        if self._backbone is None or self._backbone[0] is not model:
            self._backbone = (model, self._host.backbone(model))
        return self._backbone[1]


def without_effect(name: str, cause: str) -> str:
    """Return the sentence that refuses a constraint which could not act."""
    return (
        f"Constraint '{name}' could never act on this host: {cause}, and nothing follows it. Return a differentiable "
        f"cost, name it in drives={{'{name}': 'attribute'}}, or let a gate read it; a quantity that is only to be "
        "watched is a metric, not a constraint."
    )
