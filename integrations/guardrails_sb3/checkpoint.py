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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from stable_baselines3.common.save_util import open_path

from guardrails import StateError

Target = str | pathlib.Path | io.BufferedIOBase

SCHEMA = 1
_STATE, _TENSORS = "guardrails/state.json", "guardrails/tensors.safetensors"


class Saved(NamedTuple):
    """What a guarded model was saved with.

    Args:
        guard: state of the guard.
        tensors: by name.
        normalised: whether a ``VecNormalize`` stood between the environments and the policy; files of an earlier
            version do not say, and read as if none did.
    """

    guard: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    normalised: bool


def append(archive: io.BytesIO, saved: Saved) -> None:
    """Add the guard's state to the zip in ``archive``."""
    state = {"schema": SCHEMA, "guard": saved.guard, "normalised": saved.normalised}
    with zipfile.ZipFile(archive, "a") as entries:
        entries.writestr(_STATE, json.dumps(state, indent=2))
        # Copies: layers that a network knows by two names are one tensor, which safetensors refuses to write twice.
        own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in saved.tensors.items()}
        entries.writestr(_TENSORS, save(own))


def read(path: Target) -> Saved:
    """Return what `append` wrote; ``path`` as for the host's ``load``.

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
    return Saved(data["guard"], tensors, bool(data.get("normalised", False)))
