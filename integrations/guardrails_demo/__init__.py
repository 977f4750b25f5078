"""The demo: two short real trainings, unguarded beside guarded, on the CPU and without a network.

``guardrails demo`` runs GRPO by TRL on a small language model made on the spot, and PPO by
Stable-Baselines3 on MuJoCo; it prints a table and draws a picture. Every number comes from the run.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guardrails.errors import GuardrailsError
from guardrails.ledger import files
from guardrails.report import collect, page
from guardrails_demo.curves import Curves
from guardrails_demo.jobs import Job, run_all

__all__ = ["run"]


def run(*, seed: int, quick: bool, output: Path) -> int:
    """Run both tasks with and without a guard; write the results into ``output``.

    They are ``demo.json``, ``demo.png``, ``demo.log``, a ledger of each guarded run and ``report.html`` of both.

    Args:
        seed: seed of every training.
        quick: about a sixth of the steps, to see that all works; too short for the limits to be held.
        output: folder, made if it is not there.

    Returns:
        0 if every guarded run held its limit (or ``quick``), else 1.

    Raises:
        GuardrailsError: if the folder cannot be made.
    """
    console = Console()
    started = time.monotonic()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuardrailsError(f"{output} cannot be made: {error.strerror}. Give another --output.") from error
    ledgers = {task: output / task / "ledger.jsonl" for task in ("language", "control")}
    for ledger in ledgers.values():
        for path in files(ledger) if ledger.exists() else ():
            path.unlink()  # it would be continued
    jobs = [Job(task, guarded, seed, quick, ledger) for task, ledger in ledgers.items() for guarded in (False, True)]
    console.print("Four short trainings on the CPU: each task unguarded and guarded.")
    curves = run_all(jobs, console, output / "demo.log")
    (output / "demo.json").write_text(json.dumps([asdict(curve) for curve in curves]))
    from guardrails_demo.picture import draw

    draw(curves, output / "demo.png")
    views = [collect(ledger, name=f"{task}, guarded") for task, ledger in ledgers.items()]
    (output / "report.html").write_text(page(views), encoding="utf-8")
    console.print(table(jobs, curves))
    if quick:
        console.print("--quick stops long before the limits are reached; run without it to see them held.")
    console.print(f"Picture: {output / 'demo.png'}   ({time.monotonic() - started:.0f} s)")
    console.print(f"Report:  {output / 'report.html'}   every decision of the guarded runs, with its reason")
    held = all(curve.held for curve in curves if curve.guarded)
    return 0 if held or quick else 1


def table(jobs: list[Job], curves: list[Curves]) -> Table:
    """Return the closing table; every figure is a mean over the last quarter of the training."""
    result = Table(title="Means over the last quarter of each training")
    for name in ("run", "reward", "cost", "limit", "multiplier λ", "limit is"):
        result.add_column(name, justify="left" if name in ("run", "limit is") else "right")
    for job, curve in zip(jobs, curves, strict=True):
        verdict = "[green]held[/green]" if curve.held else "[red]broken[/red]"
        result.add_row(
            job.title,
            f"{curve.last_quarter(curve.reward):.2f}",
            f"{curve.last_quarter(curve.cost):.2f}",
            f"{curve.limit:g}",
            f"{curve.last_quarter(curve.multiplier):.2f}" if curve.guarded else "-",
            verdict,
        )
    return result
