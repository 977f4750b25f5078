"""A saved replay buffer with its costs: the host's own pickle, with the column behind it in the same file.

A pickle ends where it says so, so ``load_replay_buffer`` of Stable-Baselines3 reads the file with or without
this package, and a buffer cannot be copied without its costs.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from stable_baselines3.common.save_util import open_path

from guardrails import StateError

_MARK = b"guardrails replay costs 1"
_COSTS = "costs"

Costs = npt.NDArray[np.float32]


def save(path: Any, write: Callable[[Any], None], costs: Costs) -> None:
    """Let the host write its buffer to ``path``, and the costs behind it.

    Args:
        path: as for the host's ``save_replay_buffer``.
        write: the host's method.
        costs: ``(buffer_size, n_envs, n_constraints)``.
    """
    file = open_path(path, "w", suffix="pkl")
    try:
        write(file)
        column = save_tensors({_COSTS: torch.from_numpy(np.ascontiguousarray(costs))})
        file.write(column + len(column).to_bytes(8, "little") + _MARK)
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()


def load(path: Any, read: Callable[[Any], None]) -> Costs | None:
    """Let the host read its buffer from ``path``, and return the costs behind it; None where there are none.

    Args:
        path: as for the host's ``load_replay_buffer``.
        read: the host's method.

    Raises:
        StateError: if the costs are damaged.
    """
    file = open_path(path, "r", suffix="pkl")
    try:
        read(file)
        return _costs(file, path)
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()


def _costs(file: io.BufferedIOBase, path: Any) -> Costs | None:
    footer = len(_MARK) + 8
    end = file.seek(0, os.SEEK_END)
    if end < footer:
        return None
    file.seek(end - footer)
    size, mark = int.from_bytes(file.read(8), "little"), file.read()
    if mark != _MARK:
        return None
    try:
        file.seek(end - footer - size)
        column: Costs = load_tensors(file.read(size))[_COSTS].numpy()
    except Exception as error:
        raise StateError(f"The costs in {path} are damaged: {error}. Load the buffer of an earlier save.") from error
    return column
