"""What environments said in ``info``, as a tensor of a checkpoint: JSON, so that reading it runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

_ARRAY = "guardrails.array"
"""Key that marks the dict an array is written as."""

_DEPTH = 8
"""Lists and dicts within one another, beyond which nothing is kept."""


class _NotPlainError(Exception):
    """A value that JSON has no form for."""


def pack(infos: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return infos as bytes, ``(n,)`` uint8.

    Kept are numbers, strings, truth values, None, numeric arrays, and lists and dicts of these; tuples become lists.
    Anything else is left out with its key.
    """
    text = json.dumps([_entries(info, _DEPTH) for info in infos])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> list[dict[str, Any]]:
    """Return the infos that `pack` was given."""
    infos: list[dict[str, Any]] = json.loads(packed.numpy().tobytes(), object_hook=_restored)
    return infos


def _entries(mapping: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    kept = {}
    for key, value in mapping.items():
        try:
            kept[_key(key)] = _plain(value, depth - 1)
        except _NotPlainError:
            continue
    return kept


def _key(key: Any) -> str:
    if not isinstance(key, str) or key == _ARRAY:
        raise _NotPlainError
    return key


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return {_ARRAY: value.tolist(), "dtype": value.dtype.str, "shape": value.shape}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth and isinstance(value, (list, tuple)):
        return [_plain(each, depth - 1) for each in value]
    if depth and isinstance(value, Mapping):
        return _entries(value, depth)
    raise _NotPlainError


def _restored(entries: dict[str, Any]) -> Any:
    if _ARRAY not in entries:
        return entries
    return np.array(entries[_ARRAY], dtype=entries["dtype"]).reshape(entries["shape"])[()]
