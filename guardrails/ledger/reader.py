"""Reading a ledger line by line, in constant memory, with its chain checked on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from guardrails.decision import Decision
from guardrails.errors import LedgerError
from guardrails.evidence import Evidence
from guardrails.ledger import lines

T = TypeVar("T")

NAME = "ledger.jsonl"
"""Name of a ledger in a run's folder."""


class AlteredError(LedgerError):
    """A line is damaged, was altered, or is not in its place."""


class Line(NamedTuple):
    """One line whose hash and place in the chain are right.

    Args:
        path: its file.
        number: its number in that file, from 1.
        kind: ``"header"``, ``"seam"``, ``"step"``, ``"note"`` or ``"end"``.
        data: all its fields, as parsed.
        hash: its hash, the head of the chain up to here.
    """

    path: Path
    number: int
    kind: str
    data: dict[str, Any]
    hash: str

    @property
    def place(self) -> str:
        """File and line as a person looks them up."""
        return f"{self.path.name}, line {self.number}"

    @property
    def evidence(self) -> Evidence:
        """The evidence of a ``step``.

        Raises:
            AlteredError: if it is malformed.
        """
        return self._decoded(lines.evidence_from, "evidence")

    @property
    def decision(self) -> Decision:
        """The decision of a ``step``.

        Raises:
            AlteredError: if it is malformed.
        """
        return self._decoded(lines.decision_from, "decision")

    def _decoded(self, decode: Callable[[dict[str, Any]], T], field: str) -> T:
        try:
            return decode(self.data[field])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise AlteredError(f"{self.place}: its {field} is malformed ({type(error).__name__}: {error}).") from error


def find(run: str | Path) -> Path:
    """Return the first file of a run's ledger, given that file or the run's folder.

    Raises:
        LedgerError: if there is none.
    """
    given = Path(run)
    for path in (given, given / NAME, given / "guardrails" / NAME):
        with readable(path):
            if path.is_file():
                return path
    raise LedgerError(
        f"There is no ledger at {given}. Give the file, or the run's folder with {NAME} or guardrails/{NAME} in it."
    )


def part(path: Path, index: int) -> Path:
    """Return the file number ``index`` of the ledger that begins with ``path``, its file number 0."""
    return path.with_name(f"{path.stem}.{index}{path.suffix}") if index else path


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Make a LedgerError of it if the system does not let ``path`` be read."""
    try:
        yield
    except OSError as error:
        moved = " Was it moved?" if isinstance(error, FileNotFoundError) else ""
        raise LedgerError(f"The ledger {path} cannot be read: {error.strerror or error}.{moved}") from error


def continues(path: Path, index: int) -> bool:
    """Whether the ledger that begins with ``path`` has a file number ``index``: not one that begins another run's."""
    following = part(path, index)
    with readable(following):
        if not following.is_file():
            return False
        with following.open("rb") as file:
            first = file.readline(lines.LONGEST)
    try:
        return lines.unseal(first.removesuffix(b"\n"))[0] != lines.START
    except ValueError:
        return True  # empty or damaged; what is wrong with it is told when it is read


def files(run: str | Path) -> list[Path]:
    """Return the files of a run's ledger in order; several once it was rotated.

    Raises:
        LedgerError: if there is none, or one cannot be read.
    """
    path = find(run)
    found = [path]
    while continues(path, len(found)):
        found.append(part(path, len(found)))
    return found


class Reader:
    """Reads a ledger as far as it is written; calling `poll` again reads what came since.

    Args:
        run: the run's folder, or the ledger's first file.

    Raises:
        LedgerError: if there is no ledger.

    Example:
        >>> for line in Reader("runs/x").poll():  # doctest: +SKIP
        ...     if line.kind == "step":
        ...         print(line.decision.multipliers)
    """

    def __init__(self, run: str | Path) -> None:
        self._first = find(run)
        self._index = self._offset = self._number = 0
        self.head = lines.START
        """Hash of the last line read."""
        self.torn = 0
        """Bytes after the last complete line: one that is being written, or that was cut short."""
        self.raw = b""
        """The last line read, without its newline."""

    def poll(self) -> Iterator[Line]:
        """Yield each complete line after the last one read.

        Raises:
            AlteredError: at the first line that is damaged or not in its place in the chain.
            LedgerError: at a line of a newer schema, or if a file cannot be read.
        """
        while True:
            path = part(self._first, self._index)
            with readable(path):
                opened = path.open("rb")
            with opened as file:
                file.seek(self._offset)
                yield from self._rest(path, file)
                if not continues(self._first, self._index + 1):
                    return
                yield from self._rest(path, file)  # what was written before the next file was begun
            if self.torn:
                raise AlteredError(f"{path.name}: it ends within line {self._number + 1}, but another file follows.")
            self._index, self._offset, self._number = self._index + 1, 0, 0

    def _rest(self, path: Path, file: BinaryIO) -> Iterator[Line]:
        while raw := self._next(path, file):
            if not raw.endswith(b"\n"):
                if len(raw) == lines.LONGEST:
                    raise AlteredError(f"{path.name}, line {self._number + 1} is too long: this is no ledger.")
                self.torn = len(raw)
                file.seek(self._offset)
                return
            self._offset += len(raw)
            self._number += 1
            yield self._line(path, raw[:-1])
        self.torn = 0

    def _next(self, path: Path, file: BinaryIO) -> bytes:
        with readable(path):
            return file.readline(lines.LONGEST)

    def _line(self, path: Path, raw: bytes) -> Line:
        place = f"{path.name}, line {self._number}"
        try:
            prev, digest = lines.unseal(raw)
        except ValueError as error:
            raise AlteredError(f"{place} is damaged or was altered: {error}.") from None
        if prev != self.head:
            raise AlteredError(
                f"{place} does not follow the line before it: lines were removed, inserted or reordered here. "
                f"It follows {prev[:16]}…, the line before it is {self.head[:16]}…."
            )
        try:
            data = lines.decode(raw)
            kind = data["kind"]
        except (ValueError, LookupError, TypeError) as error:
            raise AlteredError(f"{place} is no JSON object with a kind ({type(error).__name__}).") from None
        if self.head == lines.START and kind != "header":
            raise AlteredError(f"{place}: a ledger begins with a header, not with kind {kind!r}.")
        if kind in ("header", "seam"):
            check_schema(place, data)
        self.head, self.raw = digest, raw
        return Line(path, self._number, kind, data, digest)


def check_schema(place: str, data: dict[str, Any]) -> None:
    """Raise unless a header or seam is of a schema that this version reads.

    Raises:
        LedgerError: if it is newer, or none.
    """
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise LedgerError(f"{place}: this is no ledger of training-guardrails, its schema is {schema!r}.")
    if schema > lines.SCHEMA:
        raise LedgerError(
            f"{place}: the ledger has schema {schema}; this version of training-guardrails reads up to "
            f"{lines.SCHEMA}. Upgrade training-guardrails to read it."
        )


def read(run: str | Path) -> Iterator[Line]:
    """Yield the complete lines of a run's ledger, each checked; see `Reader`.

    Raises:
        LedgerError: if there is no ledger, or at its first line that is not right.
    """
    return Reader(run).poll()
