"""``guardrails report``: one or several runs as one page, and as a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from guardrails.cli.app import app, shown
from guardrails.errors import GuardrailsError


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or their ledgers; several stand side by side.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    image: Annotated[Path | None, typer.Option(help="Also a picture, .png, .svg or .pdf; needs matplotlib.")] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not replay the decisions; the page says so.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Write a self-contained HTML page of runs from their ledgers; it needs no network to be read.

    Exit code 0: written. 1: written, but a ledger was altered, which the page says. 2: there is no ledger,
    or a file cannot be written. A run that was not closed is no error here; guardrails verify tells it.
    """
    from guardrails.report import collect, page

    views = [collect(run, verified=not no_verify) for run in runs]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(views), encoding="utf-8")
    except OSError as error:
        raise GuardrailsError(f"{output} cannot be written: {error.strerror}. Give another --output.") from error
    if image is not None:
        from guardrails.report.picture import draw

        draw(views, image)
    altered = [view for view in views if view.problem or (view.verification or {}).get("problem")]
    if as_json:
        summaries = [
            {
                "name": view.name,
                "steps": view.steps,
                "rows": view.rows,
                "closed": view.closed,
                "constraints": {each.name: dataclasses.asdict(each.figures) for each in view.constraints},
                "gates": {each.name: each.last_level for each in view.gates},
                "events": [dataclasses.asdict(event) for event in view.events],
                "problem": view.problem,
                "verification": view.verification,
            }
            for view in views
        ]
        written = {"output": str(output), "image": str(image) if image else None, "runs": summaries}
        typer.echo(json.dumps(written, indent=2))
    else:
        for view in altered:
            typer.echo(f"ALTERED: {view.name}: {shown(view.problem or (view.verification or {})['problem'])}")
        typer.echo(f"Page: {output}" + (f"   picture: {image}" if image else ""))
    raise typer.Exit(1 if altered else 0)
