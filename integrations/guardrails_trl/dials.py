"""Dials of a TRL host: the weight of the divergence from the reference, sampling temperature, completion length."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import trl
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from guardrails import AttachError, Constraint, Dial, Guard
from guardrails.competence import Between
from guardrails_trl.divergence import Divergence, constraint_on_kl
from guardrails_trl.seams import SUPPORTED, temperature_cells

BETA, TEMPERATURE, LENGTH = "beta", "temperature", "max_completion_length"


class Dials:
    """What a guard turns on a trainer: `before` each generation, `after` it has decided, and `back` once it evaluated.

    - ``beta``, the weight of the KL term. GRPO reads it in the loss, so a new value holds for the batch it was
      decided on. RLOO subtracts the term from the rewards when it scores, so there it holds from the next batch on.
      On GRPO a value of 0 saves no forward pass of the reference model, which has to stand by.
    - ``temperature`` of sampling, from the next batch on, in generation and in the log-probabilities of the loss.
    - ``max_completion_length`` in tokens, rounded, from the next batch on.

    ``beta`` may be the multiplier of a constraint on the divergence instead of a dial, see
    `guardrails_trl.divergence`; the same holds for when it acts.

    Evaluation generates and scores with the values in force too. A batch in training that it interrupts gets back the
    temperature and length it was generated with: at any other its importance ratios would not be those of sampling.

    Args:
        trainer: a trainer of TRL.
        guard: has the dials; looking at it changes nothing.
        host: what errors call the trainer.

    Raises:
        AttachError: if a dial cannot turn on this trainer as it was built, or its range is of no use there.
    """

    def __init__(self, trainer: Any, guard: Guard, host: str) -> None:
        self._trainer = trainer
        parts = {part.name: part.value for part in guard.parts if isinstance(part, Dial)}
        checks: dict[str, Callable[[Any, Between, str], None]] = {
            BETA: _check_beta,
            TEMPERATURE: _check_temperature,
            LENGTH: _check_length,
        }
        self.available = tuple(checks)
        self._names = [name for name in checks if name in parts]
        for name in self._names:
            checks[name](trainer, parts[name], host)
        held = constraint_on_kl(guard, trainer, host)
        if held is not None:
            self._names.append(BETA)
        self._held = None if held is None else held.name
        self._divergence = None if held is None else Divergence(trainer)
        self._initial = {name: getattr(trainer, name) for name in self._names}
        self._generated: dict[str, float] = {}
        self._heads = temperature_cells(trainer, host) if TEMPERATURE in self._names else []

    @property
    def steering(self) -> frozenset[str]:
        """Names of the constraints whose multiplier is a knob of the host, and nothing else."""
        return frozenset() if self._held is None else frozenset({self._held})

    def watching(self) -> AbstractContextManager[None]:
        """Return the context in which the host generates and scores a batch."""
        return nullcontext() if self._divergence is None else self._divergence.watching()

    def cost_functions(self, part: Constraint) -> list[Callable[..., list[float]]]:
        """Return what measures the cost of a constraint that turns a knob; nothing for any other constraint."""
        return [self._divergence.cost] if self._divergence is not None and part.name in self.steering else []

    def measured(self, costs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return costs that were gathered over all processes, with what a host hides from them filled in."""
        return {name: Divergence.of_all(rows) if name == self._held else rows for name, rows in costs.items()}

    def before(self, guard: Guard, *, training: bool) -> None:
        """Set what a generation reads, from what is in force in ``guard``.

        Args:
            guard: has the dials.
            training: whether the batch is one to train on, else to evaluate.
        """
        values = guard.dials
        for name in self._names:
            if name == BETA and isinstance(self._trainer, GRPOTrainer):
                # With a beta of 0 the host would skip the reference, and could not raise beta on this batch.
                self._set(BETA, self._initial[BETA])
            elif name == BETA and self._held is not None:
                # The least number above 0: the host measures the divergence, and weighs it with 0 in float32.
                self._set(BETA, max(guard.multipliers[self._held], sys.float_info.min))
            else:
                self._set(name, values[name])
        if training:
            self._generated = {name: values[name] for name in self._names if name != BETA}

    def after(self, guard: Guard) -> None:
        """Set what the losses on the batch read, from what is in force in ``guard``."""
        if BETA in self._names:
            self._set(BETA, guard.dials[BETA] if self._held is None else guard.multipliers[self._held])

    def back(self) -> None:
        """Set what the losses on the batch in training read, after evaluations since it was generated."""
        for name, value in self._generated.items():
            self._set(name, value)

    def restore(self) -> None:
        """Put back what the trainer had before."""
        for name, value in self._initial.items():
            self._set(name, value)

    def _set(self, name: str, value: float | None) -> None:
        trainer = self._trainer
        if name == LENGTH and value is not None:  # a host may have been built without a length
            value = round(value)
        setattr(trainer, name, value)
        if name != BETA:
            key = "max_new_tokens" if name == LENGTH else name
            setattr(trainer.generation_config, key, value)
        if name == TEMPERATURE:
            for cell in self._heads:
                cell.cell_contents = value


def _check_beta(trainer: Any, value: Between, host: str) -> None:
    if trainer.beta == 0.0:
        raise AttachError(
            f"Dial 'beta' has nothing to weigh on this {host}: it was built with beta=0, so no reference model was "
            "loaded. Build it with a beta above 0, such as the dial's tight end."
        )


def _check_temperature(trainer: Any, value: Between, host: str) -> None:
    _check_generation(trainer, TEMPERATURE, TEMPERATURE, host)
    if min(value.tight, value.loose) <= 0.0:
        raise AttachError("Dial 'temperature' reaches 0, where there is nothing left to sample. Give values above 0.")


def _check_length(trainer: Any, value: Between, host: str) -> None:
    _check_generation(trainer, LENGTH, "max_new_tokens", host)
    if min(value.tight, value.loose) < 1.0:
        raise AttachError(
            "Dial 'max_completion_length' reaches less than one token. Give whole numbers of tokens, at least 1."
        )


def _check_generation(trainer: Any, name: str, key: str, host: str) -> None:
    other = "vLLM" if trainer.use_vllm else "its rollout_func" if getattr(trainer, "rollout_func", None) else ""
    if other:
        raise AttachError(
            f"Dial '{name}' does not turn on this {host}: {other} generates, with settings of its own. Generate with "
            "transformers, or leave out the dial."
        )
    config = getattr(trainer, "generation_config", None)
    if not hasattr(config, key):
        raise AttachError(
            f"Dial '{name}' does not turn on this {host} of TRL {trl.__version__}: it has no generation_config.{key}. "
            f"Install {SUPPORTED}, or leave out the dial."
        )
    if getattr(config, key) != getattr(trainer, name):
        raise AttachError(
            f"Dial '{name}' does not turn on this {host}: its generation_kwargs set {key} to {getattr(config, key)!r} "
            f"beside the {name} of {getattr(trainer, name)!r}. Remove it from generation_kwargs."
        )
