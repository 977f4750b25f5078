"""A saved replay buffer with what its guard keeps beside it: the host's own pickle, and tensors behind it in one file.

A pickle ends where it says so, so ``load_replay_buffer`` of Stable-Baselines3 reads the file with or without
this package, and a buffer cannot be copied without its costs.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from stable_baselines3.common.save_util import open_path

from guardrails import StateError

_MARK = b"guardrails replay costs 1"
_NAMES = "constraints"

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Beside:
    """What is kept of each transition beside a replay buffer; None for what is not.

    Args:
        costs: ``(buffer_size, n_envs, n_constraints)``, NaN where unknown.
        names: of the constraints; None in a file that does not say.
        executed: the actions that the environments got, in the shape and unit of the buffer's own.
        known: ``(buffer_size,)``, of which rows ``executed`` tells.
    """

    costs: Array | None = None
    names: tuple[str, ...] | None = None
    executed: Array | None = None
    known: Array | None = None


def save(path: Any, write: Callable[[Any], None], beside: Beside) -> None:
    """Let the host write its buffer to ``path``, and ``beside`` behind it.

    Args:
        path: as for the host's ``save_replay_buffer``.
        write: the host's method.
        beside: what is kept beside the buffer.
    """
    arrays = {"costs": beside.costs, "executed": beside.executed, "known": beside.known}
    kept = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in arrays.items() if part is not None}
    file = open_path(path, "w", suffix="pkl")
    try:
        write(file)
        block = save_tensors(kept, {} if beside.names is None else {_NAMES: json.dumps(beside.names)})
        file.write(block + len(block).to_bytes(8, "little") + _MARK)
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()


def load(path: Any, read: Callable[[Any], None]) -> Beside:
    """Let the host read its buffer from ``path``, and return what was kept beside it.

    Args:
        path: as for the host's ``load_replay_buffer``.
        read: the host's method.

    Raises:
        StateError: if what was kept is damaged.
    """
    file = open_path(path, "r", suffix="pkl")
    try:
        read(file)
        return _beside(file, path)
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()


def _beside(file: io.BufferedIOBase, path: Any) -> Beside:
    footer = len(_MARK) + 8
    end = file.seek(0, os.SEEK_END)
    if end < footer:
        return Beside()
    file.seek(end - footer)
    size, mark = int.from_bytes(file.read(8), "little"), file.read()
    if mark != _MARK:
        return Beside()
    try:
        file.seek(end - footer - size)
        block = file.read(size)
        arrays = {name: tensor.numpy() for name, tensor in load_tensors(block).items()}
        return Beside(arrays.get("costs"), _names(block), arrays.get("executed"), arrays.get("known"))
    except Exception as error:
        raise StateError(f"The costs in {path} are damaged: {error}. Load the buffer of an earlier save.") from error


def _names(block: bytes) -> tuple[str, ...] | None:
    """Return the names in the header of a safetensors block, which its own reader of bytes passes over."""
    header = json.loads(block[8 : 8 + int.from_bytes(block[:8], "little")])
    names = header.get("__metadata__", {}).get(_NAMES)
    return None if names is None else tuple(json.loads(names))
