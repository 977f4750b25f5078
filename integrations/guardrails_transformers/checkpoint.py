"""The guard's state in a checkpoint folder of the host, next to ``trainer_state.json``.

transformers restores callback states only on request, so the state is a JSON file of its own.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from guardrails import Guard, StateError

logger = logging.getLogger(__name__)

FILE_NAME = "guardrails.json"
"""Name of the file inside a checkpoint folder."""


def save_guard(guard: Guard, folder: str | os.PathLike[str]) -> Path:
    """Write the state of ``guard`` into the checkpoint ``folder`` and return the file's path.

    The file appears whole or not at all: it is written under another name and renamed, so a run
    that is killed here leaves no half-written state.

    Args:
        guard: the guard whose `Guard.state_dict` is written.
        folder: an existing checkpoint folder.
    """
    path = Path(folder) / FILE_NAME
    text = json.dumps(guard.state_dict(), indent=2, allow_nan=False)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=FILE_NAME, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _shared(folder))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _shared(folder: str | os.PathLike[str]) -> int:
    """Return the mode of a file that whoever may read or write the checkpoint's folder may read or write too."""
    return os.stat(folder).st_mode & 0o666


def load_guard(guard: Guard, folder: str | os.PathLike[str], *, missing_ok: bool = False) -> bool:
    """Restore ``guard`` from the checkpoint ``folder``; return whether a state was loaded.

    Args:
        guard: a guard with the constraints the run was saved with.
        folder: the checkpoint folder the host resumes from.
        missing_ok: keep the guard as it is, with a warning, when the folder has no state of a guard;
            for a checkpoint of an unguarded run.

    Raises:
        StateError: if the file is missing, damaged, or of another guard. The guard is unchanged.
    """
    path = Path(folder) / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if missing_ok:
            logger.warning("%s has no %s: the guard starts with the multipliers it has now.", folder, FILE_NAME)
            return False
        raise StateError(
            f"The checkpoint {folder} has no {FILE_NAME}, so the multipliers of that run are unknown. Resume from a "
            "checkpoint that a guarded run wrote, or pass missing_ok=True to start with fresh multipliers."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"The guard's state {path} cannot be read: {error}. {_CURE}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise StateError(f"The guard's state {path} is damaged, it is not JSON: {error}. {_CURE}") from error
    try:
        guard.load_state_dict(data)
    except StateError as error:
        raise StateError(f"The guard's state {path} cannot be loaded. {error}") from error
    return True


_CURE = (
    "Resume from an earlier checkpoint, or delete the file and pass missing_ok=True to start with fresh multipliers."
)
