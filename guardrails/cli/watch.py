"""``guardrails watch``: a run in the terminal while it trains."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guardrails.cli.app import app, shown

if TYPE_CHECKING:
    from guardrails.watch import Watch


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The run's folder, or its ledger.")],
    once: Annotated[bool, typer.Option("--once", help="Show where the run stands and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.05, max=86_400, help="Seconds between two looks.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print each new step as a line of JSON.")] = False,
) -> None:
    """Follow a run's ledger as it grows, until the run is closed or Ctrl-C.

    A run that has no ledger yet is waited for, but not with --once.

    Exit code 0: the run was closed, or you left. 1: a line is damaged or was altered. 2: there is no ledger.
    """
    from guardrails.ledger import AlteredError
    from guardrails.watch import Watch, follow, state

    try:
        watched = Watch(run) if once else _awaited(run, interval)
        if as_json:
            for line in deque(watched.steps(), maxlen=1) if once else follow(watched, interval):
                typer.echo(json.dumps(state(line)))
        else:
            _show(watched, once, interval)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    except AlteredError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": str(error)}))
        else:
            typer.echo(f"ALTERED: {shown(str(error))}", err=True)
        raise typer.Exit(1) from None


def _awaited(run: Path, interval: float) -> Watch:
    """Return a run once it has a ledger."""
    from guardrails.errors import LedgerError
    from guardrails.watch import Watch

    told = False
    while True:
        try:
            return Watch(run)
        except LedgerError as error:
            if not told:
                typer.echo(f"{error} Waiting for one to be begun; Ctrl-C leaves.", err=True)
                told = True
            time.sleep(interval)


def _show(watched: Watch, once: bool, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if once:
        watched.poll()
        console.print(watched.frame(console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            watched.poll()
            live.update(watched.frame(console.width), refresh=True)
            if watched.ended:
                return
            time.sleep(interval)
