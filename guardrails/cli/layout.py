"""``guardrails layout``: a run's charts, laid out for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guardrails.cli.app import app


@app.command()
def layout(
    run: Annotated[Path, typer.Argument(help="The run's folder, or its ledger.")],
    logs: Annotated[Path, typer.Argument(help="The folder of the run's TensorBoard event files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the layout as JSON.")] = False,
) -> None:
    """Lay out a run's charts for TensorBoard: its page Custom Scalars shows them.

    Exit code 0: written. 2: there is no ledger, no step in it yet, or tensorboard is missing.
    """
    from guardrails.report import layout as layouts

    charts = layouts.layout(run)
    layouts.write(charts, logs)
    if as_json:
        typer.echo(json.dumps(charts, indent=2))
    else:
        typer.echo(f"{sum(map(len, charts.values()))} charts laid out in {logs}; see Custom Scalars in TensorBoard")
