"""The costs of one optimizer step: kept where they were computed, gathered over all processes once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guardrails import RolloutError
from guardrails.rollout import FloatArray
from guardrails_transformers.wrapping import Wrapping


@dataclass
class Traffic:
    """What a guard has sent between processes.

    Args:
        collectives: how many times all processes exchanged something.
        bytes: what each of them received.
    """

    collectives: int = 0
    bytes: int = 0


class Rows:
    """Collects what the batches of a step cost, a column per name.

    A function that returns one number for a batch counts as often as the batch has rows, where another column is per
    row. A column with fewer rows than others is filled up with its mean. Neither moves its mean.

    Args:
        names: the columns.
        by_row: those that a gate reads as evidence, a score per row; they may not be filled up.
    """

    def __init__(self, names: Sequence[str], by_row: frozenset[str]) -> None:
        self._names, self._by_row = tuple(names), by_row & set(names)
        self._batches: list[list[Tensor]] = []
        self._gradients = dict.fromkeys(self._names, False)
        self._sums: Tensor | None = None
        self._capacity = 0
        self.traffic = Traffic()

    def __len__(self) -> int:
        return len(self._batches)

    def clear(self) -> None:
        """Forget the batches of the step so far."""
        self._batches, self._sums = [], None
        self._gradients = dict.fromkeys(self._names, False)

    def add(self, costs: Mapping[str, Tensor], batch_size: int = 0) -> None:
        """Keep the costs of one batch, on their device.

        Args:
            costs: a number or ``(n_rows,)`` each.
            batch_size: rows of the batch, where that is known: costs may concern only some of them.
        """
        lengths = {name: cost.numel() for name, cost in costs.items() if cost.ndim}
        complete = not self._by_row.isdisjoint(lengths)  # what a gate reads concerns every row, which may be a pair
        n_rows = max(*lengths.values(), 0 if complete else batch_size) if lengths else 1
        batch = []
        for name in self._names:
            cost = costs[name].detach()
            self._gradients[name] |= costs[name].requires_grad
            if name in self._by_row and cost.ndim == 0 and n_rows > 1:
                raise RolloutError(
                    f"A gate reads '{name}', which is one number for a batch of {n_rows} rows: repeated, it would "
                    f"count as evidence {n_rows} times. Return one number per row."
                )
            batch.append(cost if cost.ndim else cost.expand(max(n_rows, 1)))
        self._batches.append(batch)

    def running_mean(self, host: Wrapping, means: Tensor, counts: Tensor) -> Tensor:
        """Return the mean cost so far in this step over all processes, for costs whose penalty depends on it.

        Args:
            host: the trainer.
            means: ``(k,)`` mean of this batch's rows, without gradient.
            counts: ``(k,)`` how many.
        """
        sums = torch.stack([means * counts, counts])
        if not host.is_alone:
            sums = self._gather(host, sums.flatten()).view(-1, *sums.shape).sum(dim=0)
        self._sums = sums if self._sums is None else self._sums + sums
        return self._sums[0] / self._sums[1].clamp(min=1.0)

    def take(self, host: Wrapping) -> tuple[dict[str, FloatArray | None], set[str]]:
        """Return the step's columns over all processes, and those of them that had a gradient; then forget them.

        None stands for a column without rows where others have some. This copies from the device once.
        """
        columns = [torch.cat([batch[i] for batch in self._batches]) for i in range(len(self._names))]
        header = [len(column) for column in columns] + [float(value) for value in self._gradients.values()]
        ranks = self._exchange(host, header, columns)
        self.clear()
        k = len(self._names)
        graded = {name for i, name in enumerate(self._names) if any(rank[k + i] for rank in ranks)}
        starts = [np.cumsum([2 * k, *rank[:k]]).astype(int) for rank in ranks]
        found = {
            name: np.concatenate([rank[at[i] : at[i + 1]] for rank, at in zip(ranks, starts, strict=True)])
            for i, name in enumerate(self._names)
        }
        return self._filled(found), graded

    def agree(self, host: Wrapping, values: Tensor) -> list[float]:
        """Return the first process's ``values``, so that all decide on the same ones."""
        if host.is_alone:
            return values.tolist()
        gathered = self._gather(host, values.to(host.trainer.accelerator.device))
        return gathered[: len(values)].tolist()

    def _filled(self, columns: Mapping[str, FloatArray]) -> dict[str, FloatArray | None]:
        n_rows = max(map(len, columns.values()))
        return {name: self._fill(name, column, n_rows) for name, column in columns.items()}

    def _fill(self, name: str, column: FloatArray, n_rows: int) -> FloatArray | None:
        if len(column) == n_rows:
            return column
        if not len(column):
            return None
        if name in self._by_row:
            raise RolloutError(
                f"A gate reads '{name}', which has {len(column)} rows in this step where another column has {n_rows}. "
                "Return one number per row of the same rows."
            )
        finite = column[np.isfinite(column)]
        filler = finite.mean() if finite.size else np.nan
        return np.concatenate([column, np.full(n_rows - len(column), filler)])

    def _exchange(self, host: Wrapping, header: list[float], columns: list[Tensor]) -> list[FloatArray]:
        """Return every process's header and values; the second call is needed only where there are more rows than ever.

        Collectives need equal lengths, which no process knows of another. So all send as many numbers as the most
        rows that any has had, and the headers tell when that was not enough.
        """
        device = columns[0].device
        kind = torch.float32 if device.type == "mps" else torch.float64
        values = torch.cat([torch.tensor(header, dtype=kind, device=device), *(column.to(kind) for column in columns)])
        if host.is_alone:
            return [values.cpu().double().numpy()]
        k = len(self._names)
        while True:
            size = len(header) + self._capacity
            sent = torch.nn.functional.pad(values, (0, max(0, size - len(values))))[:size]
            ranks = self._gather(host, sent).view(-1, size).cpu().double().numpy()
            most = int(ranks[:, :k].sum(axis=1).max())
            if most <= self._capacity:
                return list(ranks)
            self._capacity = most

    def _gather(self, host: Wrapping, values: Tensor) -> Tensor:
        gathered = host.gather(values)
        self.traffic.collectives += 1
        self.traffic.bytes += gathered.nbytes
        return gathered
