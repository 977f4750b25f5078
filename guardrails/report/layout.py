"""A layout of TensorBoard's custom scalars: cost beside its limit, λ, level and requirements of a run on one page.

Hosts log the scalars themselves, as ``guardrails/<constraint>/cost`` and so on (`Decision.metrics`); transformers
puts ``train/`` before them. The layout is a small event file beside theirs. It needs torch and tensorboard, which
a host that logs to TensorBoard has.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from guardrails.errors import GuardrailsError, LedgerError
from guardrails.ledger import read

Layout = dict[str, dict[str, tuple[str, list[str]]]]
"""Category to chart to kind and tags, as `SummaryWriter.add_custom_scalars` takes it; tags are patterns."""


def layout(run: str | Path) -> Layout:
    """Return the charts of a run: of its constraints, gates and dials.

    Args:
        run: the run's folder, or its ledger; its first step says what there is to show.

    Raises:
        LedgerError: if there is no ledger, or no step in it yet.
    """
    first = next((line.decision for line in read(run) if line.kind == "step"), None)
    if first is None:
        raise LedgerError(f"{run} has no step yet, so nothing is known to lay out. Ask again once the run is going.")
    charts: Layout = {}
    for name in first.constraints:
        charts[f"guardrails: {name}"] = {
            "cost against limit": _lines(f"{name}/cost", f"{name}/limit"),
            "multiplier": _lines(f"{name}/multiplier"),
            "violation": _lines(f"{name}/violation"),
        }
    for name, gate in first.gates.items():
        requirements = {
            each.name: _lines(f"{name}/{each.name}/mean", f"{name}/{each.name}/lower") for each in gate.requirements
        }
        charts[f"guardrails: {name}"] = {"level": _lines(f"{name}/level"), **requirements}
    if first.dials:
        charts["guardrails: dials"] = {name: _lines(f"{name}/value") for name in first.dials}
    return charts


def write(charts: Layout, folder: str | Path) -> None:
    """Write ``charts`` into a folder of TensorBoard logs, that of the run itself.

    Raises:
        GuardrailsError: if torch or tensorboard is missing, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise GuardrailsError(
            "A TensorBoard layout needs torch and tensorboard. Install what is missing with: pip install tensorboard"
        ) from error
    try:
        writer: Any = SummaryWriter(str(folder))
        with writer:
            writer.add_custom_scalars(charts)
    except OSError as error:
        raise GuardrailsError(f"{folder} cannot be written: {error.strerror}. Give the folder of the logs.") from error


def _lines(*tags: str) -> tuple[str, list[str]]:
    return "Multiline", [f"(train/)?guardrails/{re.escape(tag)}$" for tag in tags]
