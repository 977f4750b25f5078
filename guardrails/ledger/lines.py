"""What a line of a ledger is, to the byte: its schema, its chain, and the coding of evidence and decisions.

A ledger is JSON lines in ASCII, one object per line, written without spaces and ended by a newline::

    {"prev":"<64 hex>","kind":"...", ... ,"hash":"<64 hex>"}

**Chain.** ``hash`` is the SHA-256 of the line's bytes before ``,"hash":``. It is always the last field.
``prev``, always the first, is the ``hash`` of the line before, across files too; 64 zeros in the first line.

**Kinds.** Every line has ``kind`` and ``time`` (Unix seconds).

- ``header``, the first line: ``schema``, ``environment`` (versions, platform), ``host`` (what the guard is
  attached to, or null), ``seed`` (or null), ``plugins``, ``policy`` (the guard's configuration, the data
  that `Guard.to_toml` writes), ``state`` (what `Guard.state_dict` returned).
- ``seam``: the fields of a header, and ``reason``: ``"resumed"`` in another process or after loading a
  state, ``"lost"`` where lines before it could not be written; ``lost`` counts those steps.
- ``step``: ``step``, ``evidence`` and ``decision``, with the fields of the classes of those names.
- ``note``: ``subject`` and ``data``, what an adapter adds for the reader; nothing is decided on it.
- ``end``: the run was closed; ``step`` and ``lost``, steps that are not recorded in all.

**Numbers.** Python's shortest decimal form, which a float64 survives bit for bit. NaN and the
infinities, which JSON lacks, are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from guardrails.decision import ConstraintDecision, Decision, GateDecision, Reason, RequirementDecision
from guardrails.evidence import CostEvidence, Evidence, GateEvidence

SCHEMA = 1
"""Version of the lines this package writes, and the newest it reads."""

LONGEST = 1 << 24
"""Bytes a line may have; a file without newlines is refused before it fills the memory."""

START = "0" * 64
"""``prev`` of the first line."""

_PREV, _HASH, _CLOSE = b'{"prev":"', b',"hash":"', b'"}'
_TAIL = len(_HASH) + 64 + len(_CLOSE)
_HEAD = len(_PREV) + 64
_exact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def encode(data: Any) -> str:
    """Return ``data`` as JSON in ASCII, non-finite floats spelled as strings."""
    try:
        return _exact(data)
    except ValueError:
        return _exact(_spelled(data))


def seal(body: str, prev: str) -> tuple[bytes, str]:
    """Return the line of a ``body``, a JSON object, with its newline, and its hash."""
    chained = b'%s%s",%s' % (_PREV, prev.encode(), body[1:-1].encode())
    digest = hashlib.sha256(chained).hexdigest()
    return b"%s%s%s%s\n" % (chained, _HASH, digest.encode(), _CLOSE), digest


def unseal(raw: bytes) -> tuple[str, str]:
    """Return ``prev`` and ``hash`` of a line without its newline.

    Raises:
        ValueError: if it has not the form of a line, or its hash is not that of its bytes.
    """
    sealed, tail = raw[:-_TAIL], raw[-_TAIL:]
    if not (sealed.startswith(_PREV) and sealed[_HEAD : _HEAD + 2] == b'",'):
        raise ValueError("it does not begin as a line of a ledger does")
    if not (tail.startswith(_HASH) and tail.endswith(_CLOSE)):
        raise ValueError("it does not end as a line of a ledger does")
    digest = hashlib.sha256(sealed).hexdigest()
    if tail[len(_HASH) : -len(_CLOSE)] != digest.encode():
        raise ValueError("its hash is not that of its content")
    return sealed[len(_PREV) : _HEAD].decode("ascii", "replace"), digest


def may_become_first(torn: bytes) -> bool:
    """Return whether ``torn`` is what a first line leaves when its writing is cut short."""
    whole = _PREV + START.encode() + b'","kind":"header"'
    return torn[: len(whole)] == whole[: len(torn)]


def ends_with(raw: bytes, field: str) -> bool:
    """Return whether ``field`` is, to the byte, the last of a line before its hash."""
    return raw.endswith(field.encode(), 0, len(raw) - _TAIL)


def kind_of(raw: bytes) -> bytes:
    """Return the kind of a line without parsing all of it; empty where it cannot be told."""
    start = _HEAD + len(b'","kind":"')
    return raw[start : raw.find(b'"', start)]


def evidence_data(evidence: Evidence) -> dict[str, Any]:
    """Return ``evidence`` as JSON data."""
    return {
        "n_rows": evidence.n_rows,
        "costs": {
            name: {
                "mean": cost.mean,
                "spread": cost.spread,
                **({"invalid_rows": cost.invalid_rows, "worst": cost.worst} if cost.invalid_rows else {}),
            }
            for name, cost in evidence.costs.items()
        },
        "gates": {
            name: {
                "n_rows": gate.n_rows,
                "totals": gate.totals,
                "squares": gate.squares,
                "growth": gate.growth,
                "failures": gate.failures,
            }
            for name, gate in evidence.gates.items()
        },
    }


def decision_data(decision: Decision) -> dict[str, Any]:
    """Return ``decision`` as JSON data."""
    return {
        "step": decision.step,
        "n_rows": decision.n_rows,
        "constraints": {
            name: {
                "cost": facts.cost,
                "limit": facts.limit,
                "violation": facts.violation,
                "multiplier": facts.multiplier,
                "invalid_rows": facts.invalid_rows,
            }
            for name, facts in decision.constraints.items()
        },
        "reasons": [[reason.subject, reason.verdict, reason.text] for reason in decision.reasons],
        "gates": {name: _gate_data(gate) for name, gate in decision.gates.items()},
        "dials": decision.dials,
    }


def _gate_data(gate: GateDecision) -> dict[str, Any]:
    return {
        "level": gate.level,
        "rung": gate.rung,
        "rungs": gate.rungs,
        "requirements": [
            {
                "name": each.name,
                "at_least": each.at_least,
                "mean": each.mean,
                "lower": each.lower,
                "upper": each.upper,
                "rows": each.rows,
                "rows_to_go": each.rows_to_go,
                "audit": each.audit,
                "failure": each.failure,
            }
            for each in gate.requirements
        ],
        "frozen": gate.frozen,
        "verdict": gate.verdict,
        "text": gate.text,
    }


def evidence_from(data: Mapping[str, Any]) -> Evidence:
    """Return the evidence that `evidence_data` coded.

    Raises:
        LookupError, TypeError, ValueError: if something is missing or not a number.
    """
    costs = {
        name: CostEvidence(
            float(cost["mean"]),
            float(cost["spread"]),
            cost.get("invalid_rows", 0),
            float(cost.get("worst", math.nan)),
        )
        for name, cost in data["costs"].items()
    }
    gates = {
        name: GateEvidence(
            gate["n_rows"],
            tuple(map(float, gate["totals"])),
            tuple(map(float, gate["squares"])),
            tuple(tuple(map(float, row)) for row in gate["growth"]),
            tuple(gate["failures"]),
        )
        for name, gate in data["gates"].items()
    }
    return Evidence(data["n_rows"], costs, gates)


def decision_from(data: Mapping[str, Any]) -> Decision:
    """Return the decision that `decision_data` coded.

    Raises:
        LookupError, TypeError, ValueError: if something is missing or not a number.
    """
    constraints = {
        name: ConstraintDecision(
            name,
            float(facts["cost"]),
            float(facts["limit"]),
            float(facts["violation"]),
            float(facts["multiplier"]),
            facts["invalid_rows"],
        )
        for name, facts in data["constraints"].items()
    }
    gates = {name: _gate_from(name, gate) for name, gate in data["gates"].items()}
    reasons = tuple(Reason(*reason) for reason in data["reasons"])
    dials = {name: float(value) for name, value in data["dials"].items()}
    return Decision(data["step"], data["n_rows"], constraints, reasons, gates, dials)


def _gate_from(name: str, data: Mapping[str, Any]) -> GateDecision:
    requirements = tuple(
        RequirementDecision(
            each["name"],
            float(each["at_least"]),
            float(each["mean"]),
            float(each["lower"]),
            float(each["upper"]),
            float(each["rows"]),
            float(each["rows_to_go"]),
            each["audit"],
            each["failure"],
        )
        for each in data["requirements"]
    )
    return GateDecision(
        name,
        float(data["level"]),
        data["rung"],
        data["rungs"],
        requirements,
        data["frozen"],
        data["verdict"],
        data["text"],
    )


def _spelled(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, Mapping):
        return {name: _spelled(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_spelled(value) for value in data]
    return data
