"""A frozen ensemble at given states, asked for many actions: values, and their gradients by the actions, by hand.

Autograd would keep a graph, allocate every intermediate anew and follow the held inputs as well; the steps are few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

_WORTH_SELECTING = 0.7
"""Share of rows with a slope above which copying them out costs more than it saves."""


class _Activation(NamedTuple):
    """What stands between layers.

    Args:
        smooth: as autograd knows it, of a tensor that nobody else needs.
        forward: of x, in place or into the scratch it is given.
        backward: multiplies a gradient, in place, by the derivative at what ``forward`` left in x.
    """

    smooth: Callable[[torch.Tensor], torch.Tensor]
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_ATEN = torch.ops.aten
ACTIVATIONS: Mapping[str, _Activation] = {
    "relu": _Activation(
        torch.relu_,
        lambda x, scratch: x.relu_(),
        lambda gradient, x: _ATEN.threshold_backward.grad_input(gradient, x, 0.0, grad_input=gradient),
    ),
    "silu": _Activation(
        torch.nn.functional.silu,
        lambda x, scratch: _ATEN.silu.out(x, out=scratch),
        lambda gradient, x: _ATEN.silu_backward.grad_input(gradient, x, grad_input=gradient),
    ),
}
"""What may stand between layers, by name."""


class HeldEnsemble:
    """Outputs of M frozen perceptrons as a function of their last inputs, the first ones held.

    What the held inputs add to the first layer is computed once. Call it to have autograd reach the inputs, or,
    cheaper where many are asked one after another, `evaluate` them.

    Args:
        weights: of each layer, ``(members, n_in, n_out)``, at least two.
        biases: of each layer, ``(members, 1, n_out)``.
        activation: what stands between layers, by name.
        leading: ``(n_rows, n_leading)``, the inputs that are held.

    Example:
        >>> weights, biases = [torch.ones(1, 2, 3), torch.ones(1, 3, 1)], [torch.zeros(1, 1, 3), torch.zeros(1, 1, 1)]
        >>> held = HeldEnsemble(weights, biases, "relu", torch.tensor([[1.0]]))
        >>> at = held.evaluate(torch.tensor([[2.0]]))
        >>> at.outputs.tolist(), at.gradient(torch.ones(1, 1, 1)).tolist()
        ([[[9.0]]], [[3.0]])
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], activation: str, leading: torch.Tensor
    ) -> None:
        n_leading = leading.shape[1]
        self._weights = [each.detach() for each in weights]
        self._biases = [each.detach() for each in biases]
        self._activation = ACTIVATIONS[activation]
        self._members = len(self._weights[0])
        with torch.no_grad():
            self._held = torch.baddbmm(self._biases[0], self._spread(leading), self._weights[0][:, :n_leading])
        self._weights[0] = self._weights[0][:, n_leading:]
        self._scratch: dict[int, torch.Tensor] = {}

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unsqueeze(0).expand(self._members, -1, -1)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs, ``(members, n_rows, n_outputs)``, differentiable by the inputs."""
        hidden = torch.baddbmm(self._held, self._spread(inputs), self._weights[0])
        for weight, bias in zip(self._weights[1:], self._biases[1:], strict=True):
            hidden = affine(self._activation.smooth(hidden), weight, bias)
        return hidden

    @torch.no_grad()
    def evaluate(self, inputs: torch.Tensor) -> Evaluation:
        """Return the outputs without autograd, and with what `Evaluation.gradient` needs.

        Args:
            inputs: ``(n_rows, n_inputs - n_leading)``.
        """
        layers: list[torch.Tensor] = []
        hidden, biases = self._spread(inputs), [self._held, *self._biases[1:]]
        for weight, bias in zip(self._weights[:-1], biases, strict=False):
            layers.append(torch.baddbmm(bias, hidden, weight))
            hidden = self._activation.forward(layers[-1], self._room(layers[-1]))
        return Evaluation(affine(hidden, self._weights[-1], self._biases[-1]), layers, self)

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        """Return memory for what is not kept: the same for all evaluations, so that it stays in the cache."""
        return self._scratch.setdefault(like.shape[-1], torch.empty_like(like))

    def _pull(self, slopes: torch.Tensor, layers: Sequence[torch.Tensor], room: torch.Tensor) -> torch.Tensor:
        """Walk back through the layers; one that has been passed makes room for the gradient by the one below."""
        upper = slopes
        for layer, weight in zip(reversed(layers), reversed(self._weights), strict=False):
            turned = weight.transpose(1, 2)
            out = room if room.shape == layer.shape else torch.empty_like(layer)
            upper = torch.mul(upper, turned, out=out) if turned.shape[1] == 1 else torch.bmm(upper, turned, out=out)
            self._activation.backward(upper, layer)
            room = layer
        return torch.bmm(upper, self._weights[0].transpose(1, 2)).sum(dim=0)


class Evaluation:
    """Outputs of a `HeldEnsemble` at some inputs, and their gradient by them.

    Args:
        outputs: ``(members, n_rows, n_outputs)``.
        layers: what its hidden layers hold.
        ensemble: what was evaluated.
    """

    def __init__(self, outputs: torch.Tensor, layers: list[torch.Tensor], ensemble: HeldEnsemble) -> None:
        self.outputs = outputs
        self._layers, self._ensemble = layers, ensemble

    @torch.no_grad()
    def gradient(self, slopes: torch.Tensor) -> torch.Tensor:
        """Return ∂/∂inputs of Σ slopes · outputs, ``(n_rows, n_inputs - n_leading)``; once.

        Rows whose slopes are all 0 cost nothing where they are many.

        Args:
            slopes: ``(members, n_rows, n_outputs)``.
        """
        layers, self._layers = self._layers, []
        ensemble = self._ensemble
        rows = slopes.ne(0.0).any(dim=2).any(dim=0).nonzero().squeeze(1)
        if len(rows) > _WORTH_SELECTING * slopes.shape[1]:
            return ensemble._pull(slopes, layers, ensemble._room(layers[-1]))
        result = slopes.new_zeros(slopes.shape[1], ensemble._weights[0].shape[1])
        if len(rows):
            chosen = [layer[:, rows] for layer in layers]
            result[rows] = ensemble._pull(slopes[:, rows], chosen, torch.empty_like(chosen[-1]))
        return result


def affine(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return x W + b of every member; products of several with a single column are slower than the sums they are."""
    if weight.shape[-1] == 1 and len(weight) > 1:
        return (inputs * weight.transpose(1, 2)).sum(dim=-1, keepdim=True) + bias
    return torch.baddbmm(bias, inputs, weight)
