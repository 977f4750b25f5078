"""The term α · (-log π(y⁺|x)) in the loss of a TRL host.

Corrections travel with their rows in the host's batch. Where y⁺ = y, -log π(y⁺) is made of the log-probabilities that
the host computes anyway. Rows that were changed have passes of their own, forward and backward, of half the host's rows
at most, right after the host's backward: its activations are gone by then, its gradients are there anyway, and so the
peak of memory stays the host's. With several processes they come before the host's forward, as its backward is what
sums gradients over them. Where processes must run equally many passes, as they hold parts of the weights or take their
graph for static, the rows are appended to the host's batch instead.

π is the policy that the host samples from and scores, at its temperature: only of that one does -log π(y) have a
gradient of mean zero over y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from guardrails_trl.refine_seams import RefineSeams

IDS, MASK, LEARNED, COPIED = (f"guardrails_refined_{name}" for name in ("ids", "mask", "learned", "copied"))
LENGTHS, TOTAL = "guardrails_refined_lengths", "guardrails_refined_total"


class RefinedLoss:
    """Adds the term to each micro-batch that has corrections.

    Args:
        seams: the host.

    Attributes:
        weight: α in force.
    """

    def __init__(self, seams: RefineSeams) -> None:
        self._seams = seams
        self.weight = 0.0
        self._inputs: tuple[dict[str, Any], Tensor] | None = None
        self._nll: Tensor | None = None
        self._waits = False
        self._waiting: list[Callable[[], Tensor]] = []
        self._late: Tensor | None = None
        self._sums: Tensor | None = None

    def put(
        self,
        output: dict[str, Any],
        targets: Sequence[Sequence[int]],
        learned: Sequence[Sequence[int]],
        copied: Sequence[bool],
        lengths: Sequence[int],
        total: float,
    ) -> None:
        """Add corrections to the batch the host has generated, a row each.

        They stay on the CPU, where rows are picked without waiting for a device.

        Args:
            output: the host's batch; changed in place.
            targets: token ids of y⁺, empty where there is no term or y⁺ = y.
            learned: 1 for each token of it that is learned, else 0.
            copied: whether y⁺ = y.
            lengths: sampled tokens of each row.
            total: sampled tokens over all processes.
        """
        width = max(1, *map(len, targets))
        ids = torch.zeros(len(targets), width, dtype=torch.long)
        mask, learn = torch.zeros_like(ids), torch.zeros(len(targets), width)
        for row, (tokens, marks) in enumerate(zip(targets, learned, strict=True)):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, : len(tokens)] = 1
            learn[row, : len(tokens)] = torch.tensor(marks, dtype=learn.dtype)
        output |= {IDS: ids, MASK: mask, LEARNED: learn, COPIED: torch.tensor(copied)}
        output |= {LENGTHS: torch.tensor(lengths, dtype=torch.float32), TOTAL: torch.tensor(total)}

    def compute_loss(
        self, original: Callable[..., Tensor], model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the host's loss, plus the term where the micro-batch has corrections."""
        if IDS not in inputs or not (inputs[MASK].any() or inputs[COPIED].any()):
            return original(model, inputs, *args, **kwargs)
        rows, lengths = inputs[MASK].any(dim=1).nonzero().squeeze(1), inputs[LENGTHS]
        factor = self.weight / self._seams.divisor(len(lengths), float(lengths.sum()), float(inputs[TOTAL]))
        apart: Tensor | float = 0.0
        if len(rows) and self._seams.learns_apart:
            parts = rows.split((len(lengths) + 1) // 2)
            if self._waits:
                self._waiting.append(partial(self._learn_apart, model, inputs, parts, factor))
            else:
                apart = self._learn_apart(model, inputs, parts, factor)
            rows = rows[:0]
        self._inputs, self._nll = (inputs, rows), None
        try:
            loss = original(model, inputs, *args, **kwargs)
            nll = self._nll
        finally:
            self._inputs = self._nll = None
        if nll is None:
            raise RuntimeError(f"{self._seams.host_name} computed a loss without log-probabilities of its completions.")
        total: Tensor = loss + factor * nll + apart
        return total

    def training_step(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the host's micro-batch, with what was learned after its backward."""
        if not self._seams.learns_after:
            return original(*args, **kwargs)
        self._waits, self._late = True, None
        try:
            with self._seams.after_backward(self._learn_waiting):
                loss = original(*args, **kwargs)
            self._learn_waiting()  # a step of the user's own may have called the backward of its loss by itself
            return loss if self._late is None else loss + self._seams.scaled(self._late)
        finally:
            self._waits, self._waiting, self._late = False, [], None

    def _learn_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []  # one each time that the step has computed its loss
        for learn in waiting:
            late = learn()
            self._late = late if self._late is None else self._late + late

    def _learn_apart(self, model: Any, inputs: dict[str, Any], parts: Sequence[Tensor], factor: float) -> Tensor:
        """Add the gradient of the term of some rows, a part of them at a time; return the term."""
        return torch.stack([self._learn(model, inputs, rows, factor) for rows in parts]).sum()

    def _learn(self, model: Any, inputs: dict[str, Any], rows: Tensor, factor: float) -> Tensor:
        prompt, mask = (inputs[name][rows.to(inputs[name].device)] for name in ("prompt_ids", "prompt_mask"))
        keep = int(inputs[MASK][rows].sum(dim=1).max())
        ids, attention = (
            torch.cat([whole, inputs[name][rows, :keep].to(whole, non_blocking=True)], dim=1)
            for whole, name in ((prompt, IDS), (mask, MASK))
        )
        log_probs = self._seams.log_probs(model, ids, attention, keep)
        learned = inputs[LEARNED][rows, :keep].to(log_probs, non_blocking=True)
        nll = -(log_probs * learned).sum()
        self._count(nll, learned.sum())
        term: Tensor = factor * nll
        self._seams.backward(term)
        return term.detach()

    def _count(self, nll: Tensor, n_tokens: Tensor) -> None:
        seen = torch.stack([nll.detach(), n_tokens]).float()
        self._sums = seen if self._sums is None else self._sums + seen

    def log_probs(
        self,
        original: Callable[..., tuple[Any, ...]],
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Return the host's log-probabilities; of them, and of rows appended to the same pass, make the term."""
        if self._inputs is None:
            return original(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        (inputs, rows), self._inputs = self._inputs, None
        n_rows, keep, width = len(input_ids), 0, logits_to_keep
        if len(rows):
            keep = int(inputs[MASK][rows].sum(dim=1).max())
            width = max(logits_to_keep, keep)
            picked = rows.to(input_ids.device, non_blocking=True)
            input_ids, attention_mask = (
                _appended(whole, picked, inputs[name][rows, :keep], logits_to_keep, width)
                for whole, name in ((input_ids, IDS), (attention_mask, MASK))
            )
        logps, entropies, *others = original(model, input_ids, attention_mask, width, *args, **kwargs)  # TRL 1.6: none
        learned = inputs[LEARNED][rows, :keep].to(logps, non_blocking=True)
        copied = inputs[COPIED].to(logps, non_blocking=True)[:, None] * inputs["completion_mask"]
        own = logps[:n_rows, :logits_to_keep]
        self._nll = -(own * copied).sum() - (logps[n_rows:, :keep] * learned).sum()
        self._count(self._nll, copied.sum() + learned.sum())
        return own, None if entropies is None else entropies[:n_rows, :logits_to_keep], *others

    def forget(self) -> None:
        """Leave out of the next mean what was learned since the last flush."""
        self._sums = None

    def flush(self) -> float | None:
        """Return the mean of -log π per learned token since the last flush, over all processes; None without any."""
        sums = self._sums if self._sums is not None else torch.zeros(2)
        self._sums = None
        nll, n_tokens = self._seams.summed(sums).tolist()
        return nll / n_tokens if n_tokens else None


def _appended(whole: Tensor, rows: Tensor, corrections: Tensor, n_completion: int, width: int) -> Tensor:
    """Return ``whole`` with ``rows`` again below it, their completions replaced, and all of them padded alike."""
    again = torch.cat([whole[rows, :-n_completion], corrections.to(whole, non_blocking=True)], dim=1)
    return torch.cat([pad(whole, (0, width - n_completion)), pad(again, (0, width - corrections.shape[1]))])
