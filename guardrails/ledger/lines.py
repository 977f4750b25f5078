"""What a line of a ledger is, to the byte: its schema, its chain, and the coding of evidence and decisions.

A ledger is JSON lines in UTF-8, one object per line, written without spaces and ended by a newline::

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

**Numbers.** The shortest decimal form, which a float64 survives bit for bit. NaN and the infinities,
which JSON lacks, are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; whole numbers beyond 64
bits are strings of digits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import orjson

from guardrails.decision import ConstraintDecision, Decision, GateDecision, Reason, RequirementDecision
from guardrails.evidence import CostEvidence, Evidence, GateEvidence

SCHEMA = 1
"""Version of the lines this package writes, and the newest it reads."""

LONGEST = 1 << 24
"""Bytes a line may have; a file without newlines is refused before it fills the memory."""

START = "0" * 64
"""``prev`` of the first line."""

_START = ("schema", "environment", "host", "seed", "plugins", "policy", "state")

FIELDS = {
    "header": _START,
    "seam": ("reason", "lost", *_START),
    "step": ("step", "evidence", "decision"),
    "note": ("subject", "data"),
    "end": ("step", "lost"),
}
"""Kind to the fields of its lines, in their order, between ``prev``, ``kind``, ``time`` and ``hash``."""

_PREV, _HASH, _CLOSE = b'{"prev":"', b',"hash":"', b'"}'
_TAIL = len(_HASH) + 64 + len(_CLOSE)
_HEAD = len(_PREV) + 64


def encode(data: Any) -> bytes:
    """Return ``data`` as JSON; what JSON or UTF-8 lack is spelled as a string."""
    return orjson.dumps(_plain(data))


def encode_step(fields: dict[str, Any]) -> bytes:
    """Return the fields of a step as `encode` does, sooner: their floats are spelled already."""
    try:
        return orjson.dumps(fields)
    except TypeError:  # a text of a plug-in that is no UTF-8
        return encode(fields)


def decode(raw: bytes) -> Any:
    """Return what a line says.

    Raises:
        ValueError: if it is no JSON.
    """
    return orjson.loads(raw)


def seal(body: bytes, prev: str) -> tuple[bytes, str]:
    """Return the line of a ``body``, a JSON object, with its newline, and its hash."""
    chained = b'%s%s",%s' % (_PREV, prev.encode(), body[1:-1])
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


def ends_with(raw: bytes, field: bytes) -> bool:
    """Return whether ``field`` is, to the byte, the last of a line before its hash."""
    return raw.endswith(field, 0, len(raw) - _TAIL)


def foreign(raw: bytes, data: Mapping[str, Any]) -> str:
    """Return what of a line no `Ledger` writes, empty if there is nothing: readers could take it for something else.

    Args:
        raw: its bytes, without the newline.
        data: what they say; of a kind that there is.
    """
    kind = data["kind"]
    fields = ("prev", "kind", "time", *FIELDS[kind], "hash")
    if tuple(data) != fields:
        return f"it has the fields {', '.join(data)}, but a line of kind {kind} has {', '.join(fields)}"
    try:
        written = orjson.dumps(data) == raw
    except TypeError:  # nested too deep
        written = False
    return "" if written else "a field stands in it twice, or something is spelled as no ledger spells it"


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
                "mean": _number(float(cost.mean)),
                "spread": _number(float(cost.spread)),
                **(
                    {"invalid_rows": cost.invalid_rows, "worst": _number(float(cost.worst))}
                    if cost.invalid_rows
                    else {}
                ),
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
                "cost": _number(facts.cost),
                "limit": _number(facts.limit),
                "violation": _number(facts.violation),
                "multiplier": _number(facts.multiplier),
                "invalid_rows": facts.invalid_rows,
            }
            for name, facts in decision.constraints.items()
        },
        "reasons": [[reason.subject, reason.verdict, reason.text] for reason in decision.reasons],
        "gates": {name: _gate_data(gate) for name, gate in decision.gates.items()},
        "dials": decision.dials,
        **({"weights": decision.weights} if decision.weights else {}),
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
                "mean": _number(each.mean),
                "lower": each.lower,
                "upper": each.upper,
                "rows": each.rows,
                "rows_to_go": _number(each.rows_to_go),
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
    weights = {name: float(value) for name, value in data.get("weights", {}).items()}
    return Decision(data["step"], data["n_rows"], constraints, reasons, gates, dials, weights)


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


def _number(value: float) -> float | str:
    """Return ``value``, spelled if it is not finite."""
    return value if -math.inf < value < math.inf else _spelled(value)


def _spelled(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _plain(data: Any) -> Any:
    """Return ``data`` of built-in types, all of which JSON and UTF-8 can hold."""
    if isinstance(data, str):
        return data.encode("utf-8", "backslashreplace").decode()
    if data is None or isinstance(data, bool):
        return data
    if isinstance(data, int):
        return int(data) if -(1 << 63) <= data < 1 << 63 else str(data)
    if isinstance(data, float):
        return _number(float(data))
    if isinstance(data, Mapping):
        return {_plain(str(name)): _plain(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    raise TypeError(f"a ledger holds numbers, texts, lists and mappings, not {data!r}")
