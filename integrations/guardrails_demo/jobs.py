"""Runs the demo's trainings side by side in processes of their own, with progress bars."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from guardrails_demo.curves import Curves

Report = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class Job:
    """One training: which task, with or without a guard, from which seed, and where a guarded one is recorded."""

    task: str
    guarded: bool
    seed: int
    quick: bool
    ledger: Path

    @property
    def title(self) -> str:
        """What the progress bar and the table call it."""
        host = {"language": "GRPO language model", "control": "PPO Hopper"}[self.task]
        return f"{host}, {'guarded' if self.guarded else 'unguarded'}"


def train(job: Job, report: Report) -> Curves:
    """Run one training in this process."""
    if job.task == "language":
        from guardrails_demo.language import train as run
    else:
        from guardrails_demo.control import train as run
    return run(guarded=job.guarded, seed=job.seed, quick=job.quick, ledger=job.ledger, report=report)


def run_all(jobs: list[Job], console: Console, log: Path, *, workers: int = 2) -> list[Curves]:
    """Run ``jobs`` in ``workers`` processes and return their curves in the same order.

    What the hosts print goes to ``log``.

    Raises:
        Exception: whatever a training raised, once the others were told to stop.
    """
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, _progress(console) as progress:
        queue = manager.Queue()
        bars = [progress.add_task(job.title, total=None, start=False) for job in jobs]
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(str(log),)) as pool:
            futures = [pool.submit(_child, job, number, queue) for number, job in enumerate(jobs)]
            try:
                _watch(futures, queue, progress, bars)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _watch(futures: list[Future[Curves]], queue: Any, progress: Progress, bars: list[Any]) -> None:
    while not all(future.done() for future in futures):
        for future in futures:
            if future.done():
                future.result()
        try:
            number, done, total = queue.get(timeout=0.2)
        except Empty:
            continue
        if not done:
            progress.start_task(bars[number])
        progress.update(bars[number], completed=done, total=total)


def _prepare(log: str) -> None:
    """Give each process one core, since two that each want two are slower, and send its output to ``log``."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):  # the descriptors, since MuJoCo prints from C
        os.dup2(file, stream)
    os.close(file)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _child(job: Job, number: int, queue: Any) -> Curves:
    queue.put((number, 0, None))
    return train(job, lambda done, total: queue.put((number, done, total)))
