"""``guardrails verify``: whether a run's record is whole, and its decisions follow from its evidence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from guardrails.cli.app import app, shown


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="The run's folder, or its ledger.")],
    expect: Annotated[str | None, typer.Option(help="Hash that was noted when it was the last line's.")] = None,
    unclosed: Annotated[
        bool, typer.Option("--open", help="Accept a run that is still going or was killed: no closing line.")
    ] = False,
    allow_imports: Annotated[
        bool, typer.Option(help="Import schedulers that no plug-in lists; runs the code of their modules.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the chain of a run's ledger and decide every step again from its evidence.

    Exit code 0: whole, closed, and every decision came out the same. 1: altered, cut, or another decision.
    2: there is no ledger, or it cannot be replayed here.
    """
    from guardrails.ledger import verify as verified

    result = verified(run, expect=None if expect is None else expect.lower(), allow_imports=allow_imports)
    altered = bool(result.problem) or not (result.closed or unclosed)
    code = 1 if altered else 2 if result.unreplayed else 0
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | {"ok": code == 0}, indent=2))
        raise typer.Exit(code)
    typer.echo(
        f"{result.path}: {result.lines} lines in {_count(result.files, 'file')}, {result.steps} decisions replayed"
    )
    for note in result.notes:
        typer.echo(f"note: {shown(note)}")
    if result.lost:
        typer.echo(f"note: {_count(result.lost, 'step')} could not be written by the run itself")
    if result.problem:
        typer.echo(f"ALTERED: {shown(result.problem)}")
    elif not result.closed:
        hint = "" if unclosed else " If the run is still going or was killed, --open accepts that."
        typer.echo(f"NOT CLOSED: there is no closing line, so lines at the end may be missing.{hint}")
    if result.unreplayed:
        typer.echo(f"NOT REPLAYED: {shown(result.unreplayed)}")
    if code == 0:
        typer.echo("intact: the chain is whole, and every decision follows from its evidence to the bit")
    typer.echo(f"head: {result.head}")
    raise typer.Exit(code)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
