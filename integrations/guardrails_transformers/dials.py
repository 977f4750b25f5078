"""Dials of a trainer: the learning rate, label smoothing, and any number of it that its loss or its loop reads anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import TrainingArguments

from guardrails import AttachError, Dial, Guard
from guardrails.competence import Between

LEARNING_RATE = "learning_rate"
"""A factor on the learning rate that the host's own schedule gives."""

_IN_BACKWARD = ("lomo", "adalomo", "layerwise")
"""Ends of the names of optimizers that step while gradients are computed, a layer at a time."""

_STEPPING = ("Lomo", "AdaLomo", "LayerWiseDummyOptimizer")
"""The classes of the same."""

SMOOTHING = ("label_smoothing", "args.label_smoothing_factor")

_SET_UP = {field.name for field in dataclasses.fields(TrainingArguments)} - {"max_grad_norm"}
"""Arguments that the host reads once, when it is built or its training begins."""


class Target:
    """A number of the host that can be set.

    Args:
        owner: the object that has it.
        attribute: its name there.
        arguments: the host's; what they declare a float may have been given as 1, and is no whole number then.
    """

    def __init__(self, owner: Any, attribute: str, arguments: Any) -> None:
        self.owner, self.attribute = owner, attribute
        self.initial = getattr(owner, attribute)
        declared = next((str(each.type) for each in dataclasses.fields(arguments) if each.name == attribute), "")
        self._whole = isinstance(self.initial, int) and "float" not in declared

    def set(self, value: float) -> None:
        """Give it ``value``, rounded where it is a whole number."""
        setattr(self.owner, self.attribute, round(value) if self._whole else value)

    def restore(self) -> None:
        """Give it what it had."""
        setattr(self.owner, self.attribute, self.initial)


class Dials:
    """What a guard turns on a trainer.

    - ``learning_rate`` scales what the host's schedule gives, just for the optimizer's step: the schedule, its
      checkpoints and the logged rate stay those of the host. Optimizers that step elsewhere, or set their own rate, are
      refused.
    - ``label_smoothing`` of a host that was built with one above 0.
    - any other name is the path of an attribute from the trainer, such as ``beta`` of a DPO trainer or
      ``args.max_grad_norm``. Arguments that the host reads only once are refused; of other attributes, name one that
      is read anew in each step.

    Args:
        trainer: the host.
        guard: has the dials; looking at it changes nothing.
        drives: constraint to the attribute that is its multiplier.
        host: what errors call the trainer.

    Raises:
        AttachError: if there is no such number, or turning it would do nothing.
    """

    def __init__(self, trainer: Any, guard: Guard, drives: Mapping[str, str], host: str) -> None:
        dials = {part.name: part.value for part in guard.parts if isinstance(part, Dial)}
        dials.pop("penalty", None)
        self._scaled = LEARNING_RATE in dials
        self._rates: list[Any] = []
        self._groups: list[dict[str, Any]] = []
        if self._scaled:
            _check_rate(trainer, host)
        for name in set(dials) & set(SMOOTHING):
            _check_share(name, dials[name])
        for name, path in drives.items():
            if name not in {part.name for part in guard.constraints}:
                raise AttachError(f"drives names '{name}', but the guard has no such constraint.")
            if path == LEARNING_RATE:
                raise AttachError(
                    f"{_driver(name, path)} cannot be a factor on the rate. Use the Dial 'learning_rate'."
                )
        self._trainer, self._host = trainer, host
        self._named = [name for name in dials if name != LEARNING_RATE]
        self._drives = dict(drives)
        self._find()

    def _find(self) -> None:
        find = partial(_target, self._trainer, host=self._host)
        targets = {name: find(f"Dial '{name}'", name) for name in self._named}
        driven = {name: find(_driver(name, path), path) for name, path in self._drives.items()}
        _all_differ([*targets.values(), *driven.values()])
        self._targets, self._driven = targets, driven

    def renew(self, guard: Guard) -> None:
        """Turn what lies at the paths now, and put back what was turned until now: the host has made a new model.

        Raises:
            AttachError: if a path leads to no number any more.
        """
        self.restore()
        self._find()
        self.set(guard)

    def set(self, guard: Guard) -> None:
        """Set what is in force."""
        for name, target in self._targets.items():
            target.set(guard.dials[name])
        for name, target in self._driven.items():
            target.set(guard.multipliers[name])

    def before_step(self, optimizer: Any, guard: Guard) -> None:
        """Scale the learning rates for the step to come."""
        scale = guard.dials[LEARNING_RATE] if self._scaled else 1.0
        if scale != 1.0:
            groups = list(optimizer.param_groups)
            _check_own_rate(optimizer)
            self._groups, self._rates = groups, [group["lr"] for group in groups]
            for group, rate in zip(self._groups, self._rates, strict=True):
                group["lr"] = rate * scale

    def after_step(self) -> None:
        """Give the learning rates back to the host's schedule."""
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
        self._groups, self._rates = [], []

    def restore(self) -> None:
        """Put back what the trainer had before."""
        self.after_step()
        for target in [*self._targets.values(), *self._driven.values()]:
            target.restore()


def steps_in_backward(trainer: Any) -> str:
    """Return the name of a trainer's optimizer if it steps while gradients are computed, else an empty text."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's wrapper, after a training
    own = getattr(trainer, "optimizer_cls_and_kwargs", None)
    kind = own[0] if own else type(optimizer) if optimizer is not None else None
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim)) if kind is None else kind.__name__
    return name if name in _STEPPING or (kind is None and name.endswith(_IN_BACKWARD)) else ""


def _driver(name: str, path: str) -> str:
    return f"Constraint '{name}', which drives '{path}',"


def _target(trainer: Any, owner: str, path: str, host: str) -> Target:
    if path in SMOOTHING:
        return _smoothing(trainer, owner, host)
    first, _, rest = path.partition(".")
    if first == "args" and (rest in _SET_UP or hasattr(trainer, rest)):
        cure = f"Name '{rest}', the trainer's own." if hasattr(trainer, rest) else "Leave it out."
        cure = "Use the dial 'learning_rate', a factor on it." if rest == LEARNING_RATE else cure
        raise AttachError(f"{owner} would turn {path}, which this {host} reads only once, before it trains. {cure}")
    *steps, last = path.split(".")
    found = trainer
    for step in [*steps, last]:
        if not hasattr(found, step):
            kind = type(found).__name__
            raise AttachError(
                f"{owner} has nothing to turn: the path '{path}' ends at {kind}, which has no '{step}'. Give the path "
                "of an attribute from the trainer, such as 'args.max_grad_norm'."
            )
        parent, found = found, getattr(found, step)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise AttachError(f"{owner} cannot turn '{path}': it is {found!r:.60}, not a number.")
    target = Target(parent, last, trainer.args)
    try:
        target.restore()
    except (AttributeError, TypeError) as error:
        raise AttachError(f"{owner} cannot turn '{path}': it cannot be set ({error}).") from error
    return target


def _smoothing(trainer: Any, owner: str, host: str) -> Target:
    smoother = getattr(trainer, "label_smoother", None)
    if smoother is None and hasattr(trainer, "label_smoothing"):
        return Target(trainer, "label_smoothing", trainer.args)
    if smoother is None:
        raise AttachError(
            f"{owner} has nothing to turn: this {host} was built without label smoothing. Build it with a "
            "label_smoothing_factor above 0, such as the dial's tight end."
        )
    if trainer.compute_loss_func is not None or getattr(trainer.args, "loss_type", "nll") != "nll":
        raise AttachError(f"{owner} has nothing to turn: the loss of this {host} does not smooth labels.")
    return Target(smoother, "epsilon", trainer.args)


def _check_rate(trainer: Any, host: str) -> None:
    if str(trainer.accelerator.distributed_type).rpartition(".")[2] == "DEEPSPEED":
        raise AttachError(
            f"Dial '{LEARNING_RATE}' does not turn on this {host}: DeepSpeed makes the optimizer's step where a "
            "callback cannot reach it. Leave the dial out."
        )
    name = steps_in_backward(trainer)
    if name:
        raise AttachError(
            f"Dial '{LEARNING_RATE}' does not turn on this {host}: the optimizer {name} steps while the gradients are "
            "computed, before a decision. Take another optimizer, such as optim='adamw_torch', or leave the dial out."
        )
    if trainer.optimizer is not None:
        _check_own_rate(trainer.optimizer)


def _check_own_rate(optimizer: Any) -> None:
    if any(group.get("lr") is None or group.get("relative_step") for group in optimizer.param_groups):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise AttachError(
            f"Dial '{LEARNING_RATE}' has nothing to turn: this {kind} sets a rate of its own at each step. Give it "
            "one, as in Adafactor(lr=..., relative_step=False), or leave the dial out."
        )


def _check_share(name: str, value: Between) -> None:
    if max(value.tight, value.loose) >= 1.0:
        raise AttachError(f"Dial '{name}' is the share of the smoothed labels: give values in [0, 1).")


def _all_differ(targets: list[Target]) -> None:
    seen = [(id(target.owner), target.attribute) for target in targets]
    for index, target in enumerate(targets):
        if seen[index] in seen[:index]:
            raise AttachError(f"Two parts of the guard would turn '{target.attribute}'. Leave one out.")
