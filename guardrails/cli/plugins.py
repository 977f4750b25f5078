"""``guardrails plugins``: what discovery found."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from guardrails import plugins
from guardrails.cli.app import app


@app.command("plugins")
def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the plug-ins found, what each brings and what failed.

    Exit code 0: all loaded. 1: one failed.
    """
    with contextlib.redirect_stdout(sys.stderr):  # what a plug-in prints when imported is not the listing
        found = plugins.found()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(record) for record in found], indent=2))
    elif found:
        typer.echo(_table(found))
    else:
        typer.echo("No plug-ins are installed: no distribution has entry points in the group 'guardrails'.")
    if any(record.error for record in found):
        raise typer.Exit(1)


def _table(found: Sequence[plugins.Found]) -> str:
    rows = [("PLUG-IN", "DISTRIBUTION", "KIND", "STATUS", "NAMES")]
    for record in found:
        status = "off" if record.disabled else "failed" if record.error else "ok"
        kind = "" if record.kind == "plugin" else record.kind
        rows.append((record.plugin, record.origin, kind, status, ", ".join(record.names)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reasons = [f"{record.plugin} ({record.origin}): {record.error}" for record in found if record.error]
    return "\n".join([*lines, *(["", "Failed:"] if reasons else []), *reasons])
