"""The outputs of the forward pass that a host computes its loss from, caught on the way: no pass of our own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from guardrails import AttachError


class Forward:
    """Catches the outputs of a model while a host computes its loss.

    Those are caught that the optimizer could act on: of passes under ``torch.no_grad``, such as a reference's,
    nothing is kept.

    Args:
        model: what the host calls, with all that is wrapped around it.
        backbone: the part below the head, whose hidden states are caught as well, or None.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module | None) -> None:
        self._watched = [(model, self._caught)] + ([(backbone, self._hidden_caught)] if backbone is not None else [])
        self._outputs: list[Any] = []
        self._hidden: Tensor | None = None

    def __enter__(self) -> Forward:
        self._handles = [module.register_forward_hook(hook) for module, hook in self._watched]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _caught(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            self._outputs.append(outputs)

    def _hidden_caught(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() and self._hidden is None:
            self._hidden = getattr(outputs, "last_hidden_state", None)

    def outputs(self, host: str, logits: Callable[[Tensor], Tensor]) -> Any:
        """Return what was caught, for cost functions: their gradients are let through where they are finite.

        Args:
            host: what errors call the host.
            logits: makes logits of hidden states, for hosts whose model returns none.

        Raises:
            AttachError: if the loss was not computed from one forward pass.
        """
        if len(self._outputs) != 1:
            raise AttachError(
                f"{host}.compute_loss called the model it was given {len(self._outputs)} times with gradients, so it "
                "is not clear what a cost's outputs are. A guard can act where the loss comes from one forward pass, "
                "model(**inputs)."
            )
        found = _finite(self._outputs[0])
        if self._hidden is None or not isinstance(found, ModelOutput) or "logits" in found:
            return found
        return _WithLogits(found, _finite(self._hidden), logits)


class _WithLogits(Mapping[Any, Any]):
    """A model's outputs, and the logits that it did not compute, made when a cost asks for them."""

    def __init__(self, outputs: ModelOutput, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        self._outputs, self._states, self._head = outputs, hidden, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outputs, name)

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else self._outputs[key]

    def __contains__(self, key: object) -> bool:
        return key in list(self)  # Mapping would make the logits to find out

    def __iter__(self) -> Iterator[str]:
        return iter([*self._outputs, "logits"])

    def __len__(self) -> int:
        return len(self._outputs) + 1

    @cached_property
    def logits(self) -> Tensor:
        logits: Tensor = _finite(self._head(self._states))  # the head has weights of its own to keep clean
        return logits


class _FiniteGradient(torch.autograd.Function):
    """x, whose gradient is 0 where it is not finite: a cost that fails must not reach the weights."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].nan_to_num(0.0, 0.0, 0.0)


def _finite(values: Any) -> Any:
    """Return outputs, nested as they may be, whose tensors let their gradients through where those are finite."""
    if isinstance(values, Tensor):
        return _FiniteGradient.apply(values) if values.requires_grad else values  # type: ignore[no-untyped-call]
    if isinstance(values, (tuple, list)):  # such as the hidden states of all layers
        found = [_finite(value) for value in values]
        return type(values)(*found) if hasattr(values, "_fields") else type(values)(found)
    if isinstance(values, dict):
        copied = copy.copy(values)
        for key, value in values.items():
            copied[key] = _finite(value)
        return copied
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        copied = copy.copy(values)
        for field in dataclasses.fields(values):
            object.__setattr__(copied, field.name, _finite(getattr(values, field.name, None)))  # it may be frozen
        return copied
    return values
