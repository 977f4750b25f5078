"""Opening a ledger where it ends: locked, with a torn last line set aside."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from guardrails.errors import LedgerError
from guardrails.ledger import lines
from guardrails.ledger.reader import check_schema, files

try:
    import fcntl
except ImportError:  # Windows has no such locks; there two writers are the user's to avoid
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def lock(path: Path) -> int:
    """Return a descriptor of ``path``, made if need be, that keeps other processes off until it is closed.

    Raises:
        LedgerError: if the file cannot be opened or another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = os.open(path, _FLAGS, 0o666)
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be opened: {error.strerror}. Record at another path.") from error
    if fcntl is not None:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise LedgerError(
                f"The ledger {path} is in use by another process. Give each run a path of its own; of the processes "
                "of one run, only the first records."
            ) from None
        except OSError:  # some network file systems know no locks
            logger.debug("%s cannot be locked; that only one process writes it is not checked.", path)
    return held


def unlock(held: int) -> None:
    """Let other processes have the file again, also while a forked child still holds the descriptor."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_UN)
    os.close(held)


def create(path: Path) -> int:
    """Return a descriptor of the new file ``path``, for appending."""
    return os.open(path, _FLAGS | os.O_EXCL, 0o666)


def open_end(path: Path) -> tuple[int, int, str]:
    """Open the last file of the ledger that begins with ``path``, which exists and is locked.

    Returns:
        The number of the last file, a descriptor for appending, and the hash of the last line, `lines.START`
        where there is none yet.

    Raises:
        LedgerError: if it is no ledger, of a newer schema, or cannot be opened.
    """
    found = files(path)
    try:
        head = lines.START
        _check_beginning(path)
        _set_aside(found[-1])
        for each in reversed(found):
            last = _last_line(each)
            if last:
                head = lines.unseal(last)[1]
                break
        return len(found) - 1, os.open(found[-1], _FLAGS), head
    except ValueError as error:
        raise LedgerError(
            f"{path} is no ledger, or was damaged: of a line, {error}. Record at another path, or move the file away."
        ) from error
    except OSError as error:
        raise LedgerError(f"The ledger {path} cannot be opened: {error.strerror}. Record at another path.") from error


def _check_beginning(path: Path) -> None:
    """Raise unless ``path`` is empty, or begins with a header or a torn piece of one: other files are left alone."""
    with path.open("rb") as file:
        first = file.readline(lines.LONGEST)
    if first.endswith(b"\n"):
        lines.unseal(first[:-1])
        check_schema(path.name, lines.decode(first[:-1]))
    elif not lines.may_become_first(first):
        raise ValueError("it does not begin as a ledger does")


def _set_aside(path: Path) -> None:
    """Move what follows the last newline of ``path`` to ``<name>.torn-<n>``; a copy first, so that no kill loses it."""
    end = _after_last_newline(path)
    with path.open("rb+") as file:
        file.seek(end)
        torn = file.read()
        if not torn:
            return
        count = 1
        while (aside := path.with_name(f"{path.name}.torn-{count}")).exists():
            count += 1
        with aside.open("xb") as copy:
            copy.write(torn)
            copy.flush()
            os.fsync(copy.fileno())
        file.truncate(end)


def _after_last_newline(path: Path, before: int | None = None) -> int:
    """Return the offset after the last newline of ``path``, of those that end at or before ``before``."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END) if before is None else before
        while position > 0:
            start = max(position - _BLOCK, 0)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0


def _last_line(path: Path) -> bytes:
    """Return the last line of ``path``, which is empty or ends with a newline, without that newline."""
    end = path.stat().st_size - 1
    if end < 0:
        return b""
    start = _after_last_newline(path, end)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
