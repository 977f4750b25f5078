"""The gates of a guard, by name: found among its parts, asked for columns, updated, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from guardrails.competence.between import Between
from guardrails.competence.gate import Gate
from guardrails.competence.state import GateState
from guardrails.decision import GateDecision, Reason
from guardrails.errors import AttachError, ConfigurationError, StateError
from guardrails.evidence import GateEvidence
from guardrails.rollout import Rollout


def collect(values: Iterable[object]) -> dict[str, Gate]:
    """Return the gates that ``values`` follow, in order of appearance.

    Raises:
        ConfigurationError: if two gates have one name.
    """
    gates: dict[str, Gate] = {}
    for value in values:
        if isinstance(value, Between) and gates.setdefault(value.gate.name, value.gate) is not value.gate:
            raise ConfigurationError(
                f"Two gates are named '{value.gate.name}'. Give each a name of its own: Gate(..., name='...')."
            )
    return gates


def check_columns(gates: Iterable[Gate], provided: Iterable[str], host: str) -> None:
    """Raise unless ``provided`` holds every column that the gates' metrics read.

    Raises:
        AttachError: naming the first metric and column that the host cannot serve.
    """
    present = set(provided)
    for gate in gates:
        for each in gate.requires:
            for missing in sorted(set(each.measured.requires) - present):
                raise AttachError(
                    f"Metric '{each.name}' reads column '{missing}', which {host} does not provide. "
                    f"Columns here: {', '.join(sorted(present)) or 'none'}."
                )


def reduce(gates: Mapping[str, Gate], states: Mapping[str, GateState], rollout: Rollout) -> dict[str, GateEvidence]:
    """Return what the scores of each gate come down to."""
    return {name: gate.measure(states[name], rollout) for name, gate in gates.items()}


def judge(
    gates: Mapping[str, Gate], states: Mapping[str, GateState], evidence: Mapping[str, GateEvidence]
) -> tuple[dict[str, GateState], dict[str, GateDecision], list[Reason]]:
    """Return the next states, what each gate decided, and why."""
    following: dict[str, GateState] = {}
    decisions: dict[str, GateDecision] = {}
    reasons: list[Reason] = []
    for name, gate in gates.items():
        following[name], decision = gate.judge(states[name], evidence[name])
        decisions[name] = decision
        reasons += [Reason(each.name, "failed", each.failure) for each in decision.requirements if each.failure]
        reasons.append(Reason(name, decision.verdict, decision.text))
    return following, decisions, reasons


def load(gates: Mapping[str, Gate], saved: object) -> dict[str, GateState]:
    """Return the states that `Gate.dump` wrote, by name.

    Raises:
        StateError: if they are damaged or of other gates.
    """
    if not isinstance(saved, Mapping):
        raise StateError(f"The saved gates are {saved!r}, not a mapping of names to states.")
    if set(saved) != set(gates):
        raise StateError(
            f"The saved state has gates {sorted(saved)}, but this guard has {sorted(gates)}. Build the guard with the "
            "gates the run was saved with."
        )
    return {name: gate.load(saved[name]) for name, gate in gates.items()}
