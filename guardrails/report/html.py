"""The page: one HTML file with its data, style and script inside, which asks nothing of any network.

Nothing a run recorded becomes markup: the data is JSON in a block that no parser of HTML leaves early, the
script writes it as text only, and the content security policy runs that script alone.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import guardrails
from guardrails.report.view import RunView


def page(runs: Sequence[RunView]) -> str:
    """Return the HTML page of ``runs``, one or several side by side."""
    folder = resources.files("guardrails.report") / "page"
    template, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("template.html", "style.css", "script.js")
    )
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "version": guardrails.__version__,
        "style": style,
        "data": embedded({"runs": [dataclasses.asdict(run) for run in runs]}),
        "script": script,
    }
    pieces = template.split("{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def embedded(data: Any) -> str:
    """Return ``data`` as JSON that cannot end the script block it stands in; NaN and the infinities are null."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(name): _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
