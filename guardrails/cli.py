"""The command line: ``guardrails plugins`` and ``guardrails demo``.

Exit codes: 0 all is well; 1 something checked is not (a plug-in failed); 2 the command could not be
done (wrong usage, a missing package); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from guardrails import __version__, plugins
from guardrails.errors import GuardrailsError

_DEMO_MODULES = ("torch", "transformers", "trl", "stable_baselines3", "gymnasium", "mujoco", "matplotlib")

app = typer.Typer(
    help="Adaptive constraints for existing trainers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"training-guardrails {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Adaptive constraints for existing trainers."""


@app.command("plugins")
def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the plug-ins found, what each brings and what failed. Exit code 1 if any failed."""
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


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="About a sixth of the steps, to see that all works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
) -> None:
    """Run two short real trainings, unguarded beside guarded. Exit code 1 if a limit was not held."""
    missing = [name for name in _DEMO_MODULES if find_spec(name) is None]
    if missing:
        typer.echo(
            f"The demo needs packages that are not installed: {', '.join(missing)}. "
            "Install them with: pip install 'training-guardrails[demo]'",
            err=True,
        )
        raise typer.Exit(2)
    # By its name: the core imports no adapter, and the demo uses all of them.
    raise typer.Exit(import_module("guardrails_demo").run(seed=seed, quick=quick, output=output))


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


def main() -> None:
    """Run the command line; an error of this package prints its message, not a traceback."""
    try:
        app(prog_name="guardrails")
    except GuardrailsError as error:
        typer.echo(f"guardrails: {error}", err=True)
        sys.exit(2)
