"""Ledger: what a guard decided and on which evidence, appended line by line and chained by hash."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from guardrails.decision import Decision
from guardrails.evidence import Evidence
from guardrails.ledger import lines, mending
from guardrails.ledger.reader import part

logger = logging.getLogger(__name__)

FLUSH_LINES = 64
"""Lines are written at the latest when so many wait."""

FLUSH_SECONDS = 1.0
"""Lines are written with the first step that comes so long after they were last written."""

_MOST_WAITING = 2048
"""Lines that may wait while the disk refuses them; then they are given up, and counted."""

_open: weakref.WeakValueDictionary[Path, Ledger] = weakref.WeakValueDictionary()


class Ledger:
    """Appends to a run's ledger; made by `Guard.record`. See `guardrails.ledger.lines` for its lines.

    **Written when.** The header at once; steps when 64 wait, with the first step 1 s after the last
    writing, at a checkpoint (`Guard.state_dict`), and when closed. So a kill loses less than 64 steps,
    all of the last second before a step. `flush(sync=True)` also survives a power cut.

    **Nothing stops the training.** While the disk refuses a write (full, gone), lines wait and are tried
    again every second; beyond 2048 they are given up: a warning says so once, `lost` counts the steps, and so does
    the seam that carries the chain on.

    **Threads.** All methods may be called from any thread.

    **One writer.** On several processes only the first records. A second process that opens the same
    ledger is refused; a second guard of this process takes it over.

    Args:
        path: the first file. What is there already is continued, with a seam.
        start: returns the fields of a header as they are now.
        lock: held while something is recorded or written. It is the guard's own: ``start`` asks the guard, and with
            two locks threads could wait for each other for ever.
        max_bytes: a file that has grown so large is followed by another, ``<name>.1.jsonl`` and so on.

    Raises:
        LedgerError: if the file cannot be opened, is in use by another process, or is no ledger.
    """

    def __init__(
        self, path: str | Path, start: Callable[[], dict[str, Any]], *, lock: threading.RLock, max_bytes: int = 1 << 28
    ) -> None:
        self.path = Path(path).absolute()
        self.lost = 0
        """Steps that could not be written and are missing from the ledger."""
        self._start, self._max_bytes = start, max_bytes
        self._threads = lock
        self._pid = os.getpid()
        self._closed = True
        previous = _open.get(self.path)
        if previous is not None:
            previous.close()
        begin = start()
        self._lock = mending.lock(self.path)  # against other processes
        try:
            self._index, self._file, self._head = mending.open_end(self.path)
            self._size = os.fstat(self._file).st_size
        except BaseException:
            mending.unlock(self._lock)
            raise
        self._torn = self._refusing = self._warned = False
        self._waiting: list[tuple[str, bytes]] = []
        self._written = time.monotonic()
        self._step = begin["state"]["step"]
        self._closed = False
        _open[self.path] = self
        if self._head == lines.START:
            self._append("header", begin)
            self.flush()
        else:
            self.seam("resumed")

    @property
    def closed(self) -> bool:
        """Whether nothing is recorded any more."""
        return self._closed

    def step(self, evidence: Evidence, decision: Decision) -> None:
        """Record a step of the guard."""
        fields = {
            "step": decision.step,
            "evidence": lines.evidence_data(evidence),
            "decision": lines.decision_data(decision),
        }
        with self._threads:
            self._step = decision.step
            self._append("step", fields, lines.encode_step)
            most = _MOST_WAITING if self._refusing else FLUSH_LINES
            if len(self._waiting) >= most or time.monotonic() - self._written >= FLUSH_SECONDS:
                self.flush()

    def note(self, subject: str, data: Any) -> None:
        """Record something for the reader, on which nothing is decided.

        Args:
            subject: what it is, such as ``"refinement"``.
            data: JSON data.
        """
        with self._threads:
            self._append("note", {"subject": subject, "data": data})

    def seam(self, reason: str) -> None:
        """Record that the steps to come start from the guard's present state, not from the last line."""
        with self._threads:
            if self._waiting and self._waiting[-1][0] == "seam":
                self._waiting.pop()  # nothing was decided from there
            begin = self._start()
            self._step = begin["state"]["step"]
            self._append("seam", {"reason": reason, "lost": self.lost, **begin})

    def flush(self, *, sync: bool = False) -> None:
        """Write the lines that wait.

        Args:
            sync: return only when the disk has them, so that they survive a power cut.
        """
        if os.getpid() != self._pid:  # a forked child writes nothing of its parent's
            return
        with self._threads:
            self._flush(sync)

    def _flush(self, sync: bool) -> None:
        if self._closed or not (self._waiting or sync):
            return
        self._written = time.monotonic()
        if self._size >= self._max_bytes:
            self._rotate()
        sealed, head = [], self._head
        for _, body in self._waiting:
            line, head = lines.seal(body, head)
            sealed.append(line)
        try:
            self._write(b"".join(sealed))
            self._head = head
            self._waiting.clear()
            self._refusing = False
            if sync:
                os.fsync(self._file)
        except OSError as error:
            self._refused(error)

    def close(self) -> None:
        """Write what waits and the closing line. Does nothing when already closed."""
        if os.getpid() != self._pid:
            return
        with self._threads:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._append("end", {"step": self._step, "lost": self.lost})
        self.flush(sync=True)
        missing = self.lost + sum(kind == "step" for kind, _ in self._waiting)
        if missing:
            logger.warning("The ledger %s lacks %d steps that could not be written.", self.path, missing)
        self.lost = missing
        self._closed, self._warned = True, False
        if _open.get(self.path) is self:
            del _open[self.path]
        os.close(self._file)
        mending.unlock(self._lock)

    def __getstate__(self) -> NoReturn:
        raise TypeError("A ledger has one writer and is not copied. Copy the guard: the copy records nothing.")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _append(
        self, kind: str, fields: dict[str, Any], encode: Callable[[dict[str, Any]], bytes] = lines.encode
    ) -> None:
        if os.getpid() != self._pid:
            return
        if self._closed:
            if not self._warned:
                logger.warning("The ledger %s was closed; what is decided from now on is not recorded.", self.path)
            self._warned = True
            return
        body = encode({"kind": kind, "time": round(time.time(), 3), **fields})
        self._waiting.append((kind, body))

    def _write(self, data: bytes) -> None:
        if self._torn:
            os.ftruncate(self._file, self._size)
        if os.fstat(self._file).st_nlink == 0:
            raise FileNotFoundError("it was deleted")
        self._torn = True
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._torn = False
        self._size += len(data)

    def _refused(self, error: OSError) -> None:
        self._refusing = True
        if not self._warned:
            logger.warning(
                "The ledger %s cannot be written: %s. Training goes on; up to %d lines wait to be written.",
                self.path, error.strerror or error, _MOST_WAITING,
            )  # fmt: skip
            self._warned = True
        if self._torn:
            try:
                os.ftruncate(self._file, self._size)
                self._torn = False
            except OSError:
                logger.debug("The torn end of %s is cut off with the next write.", self.path)
        if len(self._waiting) < _MOST_WAITING:
            return
        self.lost += sum(kind == "step" for kind, _ in self._waiting)
        started = self._head != lines.START
        self._waiting.clear()
        if started:
            self.seam("lost")
        else:
            self._append("header", self._start())

    def _rotate(self) -> None:
        try:
            following = mending.create(part(self.path, self._index + 1))
        except OSError as error:
            logger.warning("The ledger %s goes on in one file: %s", self.path, error)
            self._max_bytes *= 2
            return
        os.close(self._file)
        self._file, self._size, self._index = following, 0, self._index + 1


@atexit.register
def _close_all() -> None:
    for ledger in list(_open.values()):
        ledger.close()
