"""``guardrails demo``: two short real trainings, unguarded beside guarded."""

from __future__ import annotations

import contextlib
import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from guardrails.cli.app import app
from guardrails.errors import GuardrailsError

_DEMO_MODULES = ("torch", "transformers", "trl", "stable_baselines3", "gymnasium", "mujoco", "matplotlib")


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random draw.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="About a sixth of the steps, to see that all works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print where the results are as JSON.")] = False,
) -> None:
    """Run two short real trainings, unguarded beside guarded, and write the report of the guarded ones.

    Exit code 0: the limits were held, or --quick. 1: one was not. 2: packages are missing, or
    the folder cannot be made.
    """
    missing = [name for name in _DEMO_MODULES if find_spec(name) is None]
    if missing:
        raise GuardrailsError(
            f"The demo needs packages that are not installed: {', '.join(missing)}. "
            "Install them with: pip install 'training-guardrails[demo]'"
        )
    # By its name: the core imports no adapter, and the demo uses all of them.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        code = import_module("guardrails_demo").run(seed=seed, quick=quick, output=output)
    if as_json:
        written = {name: str(output / name) for name in ("demo.json", "demo.png", "report.html")}
        typer.echo(json.dumps({"ok": code == 0, "quick": quick, "written": written}, indent=2))
    raise typer.Exit(code)
