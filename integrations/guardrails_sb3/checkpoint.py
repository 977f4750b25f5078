"""The guard's state inside the host's own zip: ``model.save`` writes it, ``wrap(..., resume=)`` reads it.

Two more entries in the archive, JSON and safetensors, which Stable-Baselines3 passes over when it loads
the file, with or without this package. One file means that a model cannot be copied without its
multipliers.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from stable_baselines3.common.save_util import open_path

from guardrails import StateError

Target = str | pathlib.Path | io.BufferedIOBase

SCHEMA = 1
_STATE, _TENSORS = "guardrails/state.json", "guardrails/tensors.safetensors"


def append(archive: io.BytesIO, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Add the guard's state to the zip in ``archive``."""
    with zipfile.ZipFile(archive, "a") as entries:
        entries.writestr(_STATE, json.dumps({"schema": SCHEMA, "guard": state}, indent=2))
        entries.writestr(_TENSORS, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read(path: Target) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the guard's state and the tensors that `append` wrote; ``path`` as for the host's ``load``.

    Raises:
        StateError: if the file is no zip, was saved by an unguarded model, is damaged or too new.
        FileNotFoundError: if there is no such file.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as entries:
            data, tensors = json.loads(entries.read(_STATE)), load(entries.read(_TENSORS))
    except KeyError:
        raise StateError(
            f"{path} holds no state of a guard: it was saved by a model that was not wrapped. Leave out resume= to "
            "start the guard afresh."
        ) from None
    except (zipfile.BadZipFile, ValueError, SafetensorError) as error:
        raise StateError(f"The guard's state in {path} is damaged: {error}. Resume from an earlier file.") from error
    finally:
        if isinstance(path, (str, pathlib.Path)):
            file.close()
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise StateError(
            f"The guard's state in {path} has schema {schema!r}; this version of training-guardrails reads {SCHEMA}. "
            "Upgrade training-guardrails to load it."
        )
    if not isinstance(data.get("guard"), dict):
        raise StateError(f"The guard's state in {path} is damaged: 'guard' is missing. Resume from an earlier file.")
    return data["guard"], tensors
