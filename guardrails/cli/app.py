"""The command line's frame: the program, its version, and how errors end it."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from guardrails import __version__
from guardrails.errors import GuardrailsError

app = typer.Typer(
    help="Adaptive constraints for existing trainers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=(
        "Exit codes: 0 all is well; 1 something checked is not (a plug-in failed, a limit was not held, a ledger was "
        "altered); 2 the command could not be done (wrong usage, a missing package or file); 130 interrupted."
    ),
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


def shown(text: str) -> str:
    """Return what a ledger made us say without what could steer a terminal, or pass for a line of ours."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def main() -> None:
    """Run the command line; an error of this package prints its message, not a traceback.

    With ``--json`` it is JSON too, on the standard output: ``{"ok": false, "error": "..."}``.
    """
    try:
        app(prog_name="guardrails")
    except GuardrailsError as error:
        if "--json" in sys.argv[1:]:
            typer.echo(json.dumps({"ok": False, "error": str(error)}, indent=2))
        typer.echo(f"guardrails: {error}", err=True)
        sys.exit(2)
