"""The divergence from the reference policy, as a cost whose multiplier is the host's ``beta``.

A constraint with ``cost="kl"`` bounds the mean divergence of what was just sampled, or holds it at a target
(Ziegler et al. 2019, `guardrails.schedulers.AdaptiveKL`). Its multiplier is not put into the advantages: it is
the weight of the KL term that the host has already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guardrails import AttachError, Constraint, Dial, Guard
from guardrails_trl.seams import LOG_PROBS, check_log_probs

KL = "kl"
"""What a constraint gives as its ``cost`` to read the divergence."""

_HIDDEN = -1.0
"""Stands for the divergence of a hidden completion until all are gathered; a divergence is never negative."""


def constraint_on_kl(guard: Guard, trainer: Any, host: str) -> Constraint | None:
    """Return the constraint that reads the divergence, or None.

    Raises:
        AttachError: if ``beta`` cannot follow its multiplier on this trainer, or follows something else too.
    """
    found = [part for part in guard.constraints if part.cost == KL]
    weight = next((part.name for part in found if part.name in guard.steering), None)
    if weight is not None:
        raise AttachError(
            f"Constraint '{weight}' is the weight of a Refinement and reads cost='kl', whose multiplier is beta: it "
            "cannot be the weight of corrections. Hold the divergence by a Constraint beside the Refinement, and give "
            "the weight another cost, such as a detector, or none, which is the edit ratio."
        )
    if not found:
        return None
    owner = f"Constraint '{found[0].name}'"
    if len(found) > 1:
        raise AttachError(
            f"{owner} and '{found[1].name}' both read cost='kl', but their multiplier is the one beta of {host}. Give "
            "one of them; sense='==' holds the divergence from both sides."
        )
    if any(isinstance(part, Dial) and part.name == "beta" for part in guard.parts):
        raise AttachError(f"{owner} turns beta, and so does the dial 'beta'. Give one of them.")
    if found[0].sense == ">=":
        raise AttachError(
            f"{owner}: a larger beta only lowers the divergence, so it cannot hold a lower limit. Give sense='<=', or "
            "sense='==' with AdaptiveKL()."
        )
    if trainer.beta == 0.0:
        raise AttachError(
            f"{owner} has nothing to measure on this {host}: it was built with beta=0, so no reference model was "
            "loaded. Build it with any beta above 0; the constraint's scheduler takes over from it."
        )
    if getattr(trainer, "tools", None) or getattr(trainer, "rollout_func", None):
        raise AttachError(
            f"{owner}: with tools or a rollout_func not every token of a completion is sampled by the policy, "
            f"and {host} does not say which before it scores. Leave out the constraint, or measure a divergence by a "
            "cost function."
        )
    check_log_probs(type(trainer), host)
    return found[0]


class _Call(NamedTuple):
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    log_probs: Tensor


class Divergence:
    """Measures the divergence of each completion from the log-probabilities that the host computes of it.

    The mean over its tokens of exp(r) - r - 1 with r = log π_ref - log π, which is never negative and in
    expectation the divergence in nats per token (Schulman's third estimator, as GRPO's own ``kl``). The host has
    both terms where it samples once for several updates, and RLOO always; a GRPO step with a batch of its own
    lacks the policy's, which costs it one further forward pass without gradient.

    Args:
        trainer: the trainer. Looking at it changes nothing.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._calls: list[_Call] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the log-probabilities that the host computes in this context."""
        trainer, original = self._trainer, getattr(self._trainer, LOG_PROBS)
        own = vars(trainer).get(LOG_PROBS)

        def watched(model: Any, *arguments: Any, **keywords: Any) -> Any:
            result = original(model, *arguments, **keywords)
            self._calls.append(_Call(arguments, keywords, result[0]))
            return result

        setattr(trainer, LOG_PROBS, watched)
        try:
            yield
        finally:
            if own is None:
                delattr(trainer, LOG_PROBS)
            else:
                setattr(trainer, LOG_PROBS, own)
            self._calls.clear()

    def cost(self, prompts: list[Any], **columns: Any) -> list[float]:
        """Return the divergence of each completion the host is scoring, in nats per token; a TRL reward function.

        Of completions that ``mask_truncated_completions`` hides, the host computes nothing: they are marked, and
        `of_all` has to replace them.
        """
        policy, reference = self._both()
        attention_mask, n_tokens = reference.arguments[1:3]
        mask = attention_mask[:, -n_tokens:].cpu()
        ratio = (reference.log_probs - policy).cpu().double()  # Apple's MPS has no float64
        per_token = (ratio.exp() - ratio - 1.0) * mask
        shown = mask.sum(dim=1)
        means = per_token.sum(dim=1) / shown.clamp(min=1)
        values: list[float] = torch.where(shown > 0, means, _HIDDEN).tolist()
        return values

    @staticmethod
    def of_all(values: Tensor) -> Tensor:
        """Return the gathered `cost` of all processes, with the mean of the shown completions for the hidden ones.

        So these move no mean. Where all are hidden nothing is known, and they are NaN, which counts as a violation.

        Args:
            values: ``(n_rows,)`` nats per token.

        Example:
            >>> Divergence.of_all(torch.tensor([0.25, -1.0, 0.75]))
            tensor([0.2500, 0.5000, 0.7500])
            >>> Divergence.of_all(torch.tensor([-1.0]))
            tensor([nan])
        """
        hidden = values == _HIDDEN
        return torch.where(hidden, values[~hidden].nanmean(), values)

    def _both(self) -> tuple[Tensor, _Call]:
        """Return the policy's log-probabilities, and the reference's, which the host computes last."""
        first, reference = self._calls[0], self._calls[-1]
        if first is not reference:
            return first.log_probs, reference
        compute: Callable[..., Any] = getattr(self._trainer, LOG_PROBS)
        with torch.no_grad():
            return compute(self._trainer.model, *reference.arguments, **reference.keywords)[0], reference
