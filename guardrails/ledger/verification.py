"""Verification: the chain is whole, and every decision follows again from the evidence beside it, to the bit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardrails import policy
from guardrails.errors import ConfigurationError, GuardrailsError, LedgerError
from guardrails.guard import Guard
from guardrails.ledger import header, lines
from guardrails.ledger.reader import AlteredError, Line, Reader, files, readable


@dataclass
class Verification:
    """What was found; see `ok`.

    Args:
        path: the ledger's first file.
        files: how many files it has.
        lines: lines read, up to the first problem.
        steps: decisions replayed.
        head: hash of the last line read. Whoever noted it elsewhere can tell later whether the record was rewritten.
        closed: whether the last line closes the run. Without it, lines at the end may be missing.
        torn_bytes: bytes after the last complete line.
        lost: steps that the run itself could not write.
        problem: the first thing that is wrong, empty if nothing is.
        unreplayed: why decisions could not be replayed, empty if they were.
        notes: what a reader should know besides.
    """

    path: str
    files: int = 0
    lines: int = 0
    steps: int = 0
    head: str = ""
    closed: bool = False
    torn_bytes: int = 0
    lost: int = 0
    problem: str = ""
    unreplayed: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the record is whole, closed, and its decisions are those that this code makes."""
        return self.closed and not self.problem and not self.unreplayed


def verify(run: str | Path, *, expect: str | None = None, allow_imports: bool = False) -> Verification:
    """Check a run's ledger from its first line to its last, in constant memory.

    Args:
        run: the run's folder, or the ledger's first file.
        expect: hash of a line, noted elsewhere when it was the last; the ledger must still hold it.
        allow_imports: import schedulers that no plug-in lists, which runs the code of their modules.

    Raises:
        LedgerError: if there is no ledger, one that cannot be read, or one of a newer schema.
        ConfigurationError: if ``expect`` is no hash of a line, such as an empty text.
    """
    if expect is not None and not re.fullmatch("[0-9a-f]{64}", expect):
        raise ConfigurationError(f"verify: expect is {expect!r}; give the 64 hexadecimal digits of a line's hash.")
    reader = Reader(run)
    found = files(run)
    result = Verification(str(found[0]), len(found))
    replay = _Replay(result, _seam_steps(found), allow_imports)
    expected = expect is None
    try:
        for line in reader.poll():
            result.lines += 1
            result.head = line.hash
            expected = expected or line.hash == expect
            result.closed = line.kind == "end"
            replay.take(line, reader.raw)
    except AlteredError as error:
        result.problem = str(error)
        result.closed = False
    result.torn_bytes = reader.torn
    if not result.lines and not result.problem:
        raise LedgerError(f"{found[0]} holds no complete line. Nothing was recorded.")
    if not expected and not result.problem:
        result.problem = f"no line has the expected hash {expect}: the record was rewritten, or is of another run"
    if result.torn_bytes:
        result.closed = False
        result.notes.append(f"the last line is cut short after {result.torn_bytes} bytes")
    return result


class _Replay:
    """Decides again what was decided, line by line."""

    def __init__(self, result: Verification, seam_steps: frozenset[int], allow_imports: bool) -> None:
        self._result, self._seam_steps = result, seam_steps
        self._builder = policy.Builder(imports=allow_imports, replay=True)
        self._guard: Guard | None = None
        self._step = 0
        self._environment: Mapping[str, Any] = {}
        self._policy: Any = None
        self._states: set[tuple[int, str]] = set()
        self._last_kind = ""
        self._lost_before = self._lost_here = 0

    def take(self, line: Line, raw: bytes) -> None:
        """Check one line.

        Raises:
            AlteredError: if it does not follow from those before it.
        """
        previous, self._last_kind = self._last_kind, line.kind
        if line.kind not in tuple(lines.FIELDS):
            raise AlteredError(f"{line.place}: there is no kind of line called {line.kind!r}.")
        if found := lines.foreign(raw, line.data):
            raise AlteredError(f"{line.place} was not written by this package: {found}.")
        if line.kind == "header" and previous:
            raise AlteredError(f"{line.place}: a header within the ledger.")
        if previous == "end" and line.kind != "seam":
            raise AlteredError(f"{line.place}: a {line.kind} after the closing line.")
        if line.kind in ("header", "seam"):
            self._begin(line)
        elif line.kind == "step":
            self._decide(line, raw)
        elif line.kind == "end":
            self._end(line)

    def _begin(self, line: Line) -> None:
        state, described = line.data.get("state"), line.data.get("policy")
        missing = self._count_lost(line)
        if self._result.unreplayed:
            return
        try:
            guard = self._builder.guard(described)
            fresh = _digest(guard.state_dict())
            guard.load_state_dict(state if isinstance(state, Mapping) else {})
        except GuardrailsError as error:
            self._result.unreplayed = f"{line.place}: the guard cannot be built again: {error}"
            return
        own, step = _digest(state), guard.state_dict()["step"]
        self._note_seam(line, step, own, fresh, missing)
        if line.kind == "seam" and not _same(described, self._policy):
            self._result.notes.append(f"{line.place}: the guard's configuration is another from here on")
        self._guard, self._step, self._policy = guard, step, described
        environment = line.data.get("environment")
        self._environment = environment if isinstance(environment, Mapping) else {}
        if step in self._seam_steps:
            self._states.add((step, own))

    def _count_lost(self, line: Line) -> int:
        """Count the steps that could not be written, of which each process counts its own.

        Returns:
            How many there are since the last count.
        """
        lost, known = _lost(line), self._result.lost
        if lost < self._lost_here:  # another process
            self._lost_before += self._lost_here
        self._lost_here = lost
        self._result.lost = self._lost_before + lost
        return self._result.lost - known

    def _note_seam(self, line: Line, step: int, own: str, fresh: str, missing: int) -> None:
        """Say where a seam starts from; a state that nothing here led to is a problem once a step was decided here."""
        notes = self._result.notes
        if line.kind == "header":
            if step:
                notes.append(f"{line.place}: the record begins at step {step}")
        elif line.data.get("reason") == "lost":
            if not missing and step != self._step:
                raise AlteredError(
                    f"{line.place}: it goes from step {self._step} to {step} since steps were lost, but counts none."
                )
            notes.append(f"{line.place}: steps {self._step + 1} to {step} could not be written and are not replayed")
        elif (step, own) in self._states or own == fresh:
            if step != self._step:
                notes.append(f"{line.place}: the run was resumed from step {step}, after step {self._step}")
        elif not (self._result.steps or self._result.lost):  # nothing was decided yet: the record begins here
            notes.append(f"{line.place}: the record begins at step {step}")
        else:
            raise AlteredError(
                f"{line.place}: the run was resumed at step {step} from a state that no step recorded here led to. "
                "The checkpoint was altered, or is of another run."
            )

    def _decide(self, line: Line, raw: bytes) -> None:
        if self._guard is None or self._result.unreplayed:
            return
        evidence = line.evidence
        if lines.decode(lines.encode_step(lines.evidence_data(evidence))) != line.data["evidence"]:
            raise AlteredError(f"{line.place} was not written by this package: its evidence holds something besides.")
        try:
            decision = self._guard.decide(evidence)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise AlteredError(f"{line.place}: nothing can be decided on its evidence ({text}).") from error
        self._step = decision.step
        self._result.steps += 1
        replayed = lines.encode_step(lines.decision_data(decision))
        if not lines.ends_with(raw, b',"decision":' + replayed):
            text = self._difference(line, lines.decode(replayed))
            raise AlteredError(f"{line.place}, step {decision.step}: {text}")
        self._same_step(line)
        if decision.step in self._seam_steps:
            self._states.add((decision.step, _digest(self._guard.state_dict())))

    def _end(self, line: Line) -> None:
        self._count_lost(line)
        if self._guard is not None and not self._result.unreplayed:
            self._same_step(line)

    def _same_step(self, line: Line) -> None:
        """Raise unless the line bears the number of the last step decided, by which readers go."""
        step = line.data.get("step")
        if not _same(step, self._step):
            raise AlteredError(f"{line.place}: it is numbered step {step!r}, but is of step {self._step}.")

    def _difference(self, line: Line, replayed: Any) -> str:
        place, recorded, again = difference(line.data.get("decision"), replayed)
        text = f"{place} was recorded as {recorded!r}, but follows from the evidence as {again!r}"
        now = header.environment()
        others = [
            f"{name} {self._environment[name]} then, {now[name]} now"
            for name in ("training-guardrails", "python", "numpy", "platform")
            if name in self._environment and self._environment[name] != now.get(name)
        ]
        if others:
            text += f". Made elsewhere ({'; '.join(others)}): the last bits of a logarithm may differ between them"
        return text + "."


def difference(recorded: Any, replayed: Any, place: str = "decision") -> tuple[str, Any, Any]:
    """Return where two JSON values first differ, and what stands there in each; None where there is nothing."""
    if isinstance(recorded, dict) and isinstance(replayed, dict):
        for name in [*recorded, *(name for name in replayed if name not in recorded)]:
            if not _same(recorded.get(name), replayed.get(name)):
                return difference(recorded.get(name), replayed.get(name), f"{place}.{name}")
    if isinstance(recorded, list) and isinstance(replayed, list):
        for index in range(max(len(recorded), len(replayed))):
            one, other = recorded[index : index + 1], replayed[index : index + 1]
            if not _same(one, other):
                return difference(one[0] if one else None, other[0] if other else None, f"{place}[{index}]")
    return place, recorded, replayed


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one) == json.dumps(other)  # tells 1 from 1.0, and 0.0 from -0.0


def _lost(line: Line) -> int:
    """Return how many steps a line says could not be written."""
    lost = line.data.get("lost", 0)
    if not isinstance(lost, int) or isinstance(lost, bool) or lost < 0:
        raise AlteredError(f"{line.place}: it counts {lost!r} lost steps.")
    return lost


def _digest(state: Any) -> str:
    return hashlib.sha256(lines.encode(state)).hexdigest()


def _seam_steps(found: list[Path]) -> frozenset[int]:
    """Return the steps from which the run was resumed, so that the states there can be kept."""
    steps: set[int] = set()
    for path in found:
        with readable(path), path.open("rb") as file:
            while raw := file.readline(lines.LONGEST):
                if lines.kind_of(raw) == b"seam":
                    try:
                        steps.add(int(lines.decode(raw)["state"]["step"]))
                    except (ValueError, LookupError, TypeError):
                        continue  # the line is reported when its turn comes
    return frozenset(steps)
