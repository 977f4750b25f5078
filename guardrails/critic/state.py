"""Modules and their optimizer as tensors by name, for safetensors: what an exact resume of them takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from guardrails.errors import StateError

_IDLE = "optimizer.idle"
"""Names the places of weights of which the optimizer has no state, since they take no part in the output."""


def named(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the weights of each module, and the state of the optimizer, by name."""
    tensors = {f"{part}.{name}": value for part, module in modules.items() for name, value in _weights(module).items()}
    states = optimizer.state_dict()["state"]
    for index, entry in states.items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
    idle = [index for index, value in _trained(modules) if index not in states]
    if states and idle:
        tensors[_IDLE] = torch.tensor(idle)
    return tensors


def load_named(
    what: str,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Restore what `named` returned; all of it or nothing.

    Args:
        what: what errors call the modules.
        modules: by the names they were saved under.
        optimizer: of the first module, an Adam.
        tensors: what `named` returned.

    Raises:
        StateError: if names or shapes are not those of the modules.
    """
    shapes = {name: value.shape for name, value in tensors.items() if name != _IDLE}
    expected = {f"{part}.{name}": value.shape for part, m in modules.items() for name, value in _weights(m).items()}
    moments = {name.removeprefix("optimizer."): tensors[name] for name in shapes if name.startswith("optimizer.")}
    if moments:  # an optimizer that has taken no step has no state, and never one of weights that take no part
        idle = tensors[_IDLE].flatten().tolist() if _IDLE in tensors else []
        for index, parameter in _trained(modules):
            if index not in idle:
                sizes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                expected |= {f"optimizer.{index}.{name}": size for name, size in sizes.items()}
    foreign = sorted(name for name in set(shapes) | set(expected) if shapes.get(name) != expected.get(name))
    if foreign:
        raise StateError(
            f"The saved {what} does not fit this model: {', '.join(foreign[:8])} differ. Resume with the architecture, "
            "observation space, action space, constraints and cost critic (an `Ensemble`) the run was saved with."
        )
    for part, module in modules.items():
        weights = {name: tensors[f"{part}.{name}"] for name in _weights(module)}
        module.load_state_dict(weights)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in moments.items():
        position, _, field = name.partition(".")
        state.setdefault(int(position), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _trained(modules: Mapping[str, nn.Module]) -> list[tuple[int, nn.Parameter]]:
    """Return the weights of the first module that are not frozen, with their places in its optimizer."""
    first = next(iter(modules.values()))
    return [(index, value) for index, value in enumerate(first.parameters()) if value.requires_grad]


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.state_dict())
