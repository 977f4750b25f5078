"""``guardrails layout``: a run's charts, laid out in TensorBoard, Weights & Biases or trackio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from guardrails.cli.app import app
from guardrails.errors import GuardrailsError


@app.command()
def layout(
    run: Annotated[Path, typer.Argument(help="The run's folder, or its ledger.")],
    logs: Annotated[Path | None, typer.Argument(help="The folder of the run's TensorBoard event files.")] = None,
    wandb: Annotated[str, typer.Option(help="Save a view of this project: entity/project.")] = "",
    trackio: Annotated[str, typer.Option(help="Print the query of a dashboard of this project.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the charts and where they are as JSON.")] = False,
) -> None:
    """Lay out a run's charts: in TensorBoard's Custom Scalars, as a view of Weights & Biases, in trackio.

    Exit code 0: done. 2: there is no ledger, no step in it yet, or a package is missing.
    """
    from guardrails.report import layout as layouts

    if not (logs or wandb or trackio or as_json):
        raise GuardrailsError("Say where: the folder of the TensorBoard logs, --wandb entity/project or --trackio.")
    sections = layouts.charts(run)
    done: dict[str, str] = {}
    if logs:
        layouts.tensorboard(sections, logs)
        done["tensorboard"] = str(logs)
    if wandb:
        done["wandb"] = layouts.wandb(sections, wandb)
    if trackio:
        done["trackio"] = layouts.trackio(sections, trackio)
    if as_json:
        typer.echo(json.dumps({"charts": sections, "written": done}, indent=2))
        return
    hints = {
        "tensorboard": "see Custom Scalars in TensorBoard",
        "wandb": "the view of that name",
        "trackio": "append it to the address that trackio show prints",
    }
    for tool, where in done.items():
        typer.echo(f"{sum(map(len, sections.values()))} charts laid out for {tool}: {where} ({hints[tool]})")
