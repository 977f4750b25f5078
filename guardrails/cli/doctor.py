"""``guardrails doctor``: whether this environment will do, and the cure where it will not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Annotated

import typer

from guardrails.cli.app import app

_SIGNS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at Python, the hosts' versions, other packages of this name, plug-ins and the GPU.

    Exit code 0: nothing is in the way. 1: something will not work; its cure is printed. 2: it could not look.
    """
    from guardrails.doctor import examine

    with contextlib.redirect_stdout(sys.stderr):  # what a plug-in prints when imported is no finding
        findings = examine()
    sound = all(finding.status != "problem" for finding in findings)
    if as_json:
        report = {"ok": sound, "findings": [dataclasses.asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report, indent=2))
    else:
        for finding in findings:
            typer.echo(f"{_SIGNS[finding.status]:8} {finding.subject}: {finding.text}")
            if finding.cure:
                typer.echo(f"{'':8} → {finding.cure}")
    raise typer.Exit(0 if sound else 1)
