"""A run's charts, laid out in the host's own tools: cost beside its limit, λ, level and requirements in one place.

Hosts log the scalars themselves, as ``guardrails/<constraint>/cost`` and so on (`Decision.metrics`); transformers
puts ``train/`` before them. TensorBoard takes a layout as a small event file beside theirs, Weights & Biases as a
saved workspace view, trackio as the address of a page.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Any

from guardrails.errors import GuardrailsError, LedgerError
from guardrails.ledger import read

Charts = dict[str, dict[str, list[str]]]
"""Section to chart to the scalars it draws, as ``guardrails/<part>/<fact>``."""


def charts(run: str | Path) -> Charts:
    """Return the charts of a run: of its constraints, gates, refinement and dials.

    Args:
        run: the run's folder, or its ledger; its first step says what there is to show.

    Raises:
        LedgerError: if there is no ledger, or no step in it yet.
    """
    first = next((line.decision for line in read(run) if line.kind == "step"), None)
    if first is None:
        raise LedgerError(f"{run} has no step yet, so nothing is known to lay out. Ask again once the run is going.")
    sections: Charts = {}
    for name in first.constraints:
        sections[f"guardrails: {name}"] = {
            "cost against limit": _scalars(f"{name}/cost", f"{name}/limit"),
            "multiplier": _scalars(f"{name}/multiplier"),
            "violation": _scalars(f"{name}/violation"),
        }
    for name, gate in first.gates.items():
        requirements = {
            each.name: _scalars(f"{name}/{each.name}/mean", f"{name}/{each.name}/lower") for each in gate.requirements
        }
        sections[f"guardrails: {name}"] = {"level": _scalars(f"{name}/level"), **requirements}
    for name in first.weights:
        sections[f"guardrails: {name}"] = {
            "weight": _scalars(f"{name}/weight"),
            "edit ratio": _scalars(f"{name}/edit_ratio"),
            "rows refined, changed and accepted": _scalars(
                f"{name}/intervention_rate", f"{name}/change_rate", f"{name}/acceptance_rate"
            ),
            "loss": _scalars(f"{name}/loss"),
            "seconds": _scalars(f"{name}/seconds"),
        }
    if first.dials:
        sections["guardrails: dials"] = {name: _scalars(f"{name}/value") for name in first.dials}
    return sections


def pattern(scalar: str) -> str:
    """Return the regular expression that matches a scalar's name in the logs of every host."""
    return f"^(train/)?{re.escape(scalar)}$"


def tensorboard(sections: Charts, folder: str | Path) -> None:
    """Lay ``sections`` out in a folder of TensorBoard logs, that of the run itself: its page Custom Scalars.

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
            writer.add_custom_scalars(
                {
                    section: {title: ("Multiline", [pattern(each) for each in drawn]) for title, drawn in each.items()}
                    for section, each in sections.items()
                }
            )
    except OSError as error:
        raise GuardrailsError(f"{folder} cannot be written: {error.strerror}. Give the folder of the logs.") from error


def wandb(sections: Charts, project: str) -> str:
    """Save ``sections`` as a workspace view of a Weights & Biases project, and return its address.

    Args:
        sections: what `charts` returned.
        project: ``"<entity>/<project>"``. Who may write there is what ``wandb login`` knows.

    Raises:
        GuardrailsError: if wandb-workspaces is missing, the project is not named so, or it cannot be saved there.
    """
    entity, _, name = project.partition("/")
    if not entity or not name or "/" in name:
        raise GuardrailsError(f"'{project}' names no project of Weights & Biases. Give entity/project.")
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports.v2.interface import LinePlot
    except ImportError as error:
        raise GuardrailsError(
            "A Weights & Biases layout needs its workspaces. Install them with: pip install wandb-workspaces"
        ) from error
    workspace: Any = workspaces.Workspace(
        entity=entity,
        project=name,
        name="guardrails",
        sections=[
            workspaces.Section(
                name=section,
                is_open=True,
                panels=[
                    LinePlot(title=title, metric_regex="|".join(map(pattern, drawn))) for title, drawn in each.items()
                ],
            )
            for section, each in sections.items()
        ],
    )
    try:
        workspace.save()
    except Exception as error:  # whatever the client raises: no key, no network, no such project
        raise GuardrailsError(f"The view of {project} could not be saved: {type(error).__name__}: {error}") from error
    return str(workspace.url)


def trackio(sections: Charts, project: str) -> str:
    """Return the query that makes a trackio dashboard show the scalars of ``sections`` alone, in ``project``.

    It goes behind the address that ``trackio show`` prints.
    """
    drawn = dict.fromkeys(scalar for each in sections.values() for names in each.values() for scalar in names)
    return "?" + urllib.parse.urlencode({"project": project, "metric_filter": "|".join(map(pattern, drawn))})


def _scalars(*names: str) -> list[str]:
    return [f"guardrails/{name}" for name in names]
