"""Which kind of host a trainer of TRL is: where a cost can act in it, or why it cannot."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from transformers import Trainer

from guardrails import AttachError

Kind: TypeAlias = Literal["groups", "pairs", "loss"]
"""Costs act in the advantages of groups of completions, in the ranking of pairs, or in the loss of a batch."""

_KINDS: dict[str, Kind] = {"GRPOTrainer": "groups", "RLOOTrainer": "groups", "OnlineDPOTrainer": "pairs"}

_TEACHER = (
    "it imitates a teacher token by token on completions that it samples while it trains, and no reward is weighed "
    "there that a cost could be weighed against. Guard a GRPOTrainer or RLOOTrainer on the same prompts"
)
_FOREIGN = (
    "it ranks a completion of the policy against one of another policy, so a cost could only be measured on half of "
    "what it learns from. Use OnlineDPOTrainer, which samples both from the policy"
)
_REFUSED = {
    "AsyncGRPOTrainer": (
        "completions are scored in another process, ahead of the training, so a decision could not act on the batch "
        "it was made on. Use GRPOTrainer"
    ),
    "A2POTrainer": (
        "it estimates the optimal value of every prompt once, before the first step, and regresses on the difference "
        "to it; a multiplier that moves later would contradict that value. Use GRPOTrainer or RLOOTrainer"
    ),
    "PPOTrainer": (
        "its own loop mixes the divergence into a reward that a value model is trained on, and calls none of the "
        "methods a guard needs. Use GRPOTrainer or RLOOTrainer"
    ),
    "XPOTrainer": _FOREIGN,
    "NashMDTrainer": _FOREIGN,
    **dict.fromkeys(
        (
            "AsyncDistillationTrainer",
            "DistillationTrainer",
            "GKDTrainer",
            "GOLDTrainer",
            "IWOPDTrainer",
            "SDFTTrainer",
            "SDPOTrainer",
            "SSDTrainer",
        ),
        _TEACHER,
    ),
}
"""Trainers of TRL, of any version, that cannot be guarded; by name, since many are loaded on demand only."""


def kind(trainer: Any) -> Kind:
    """Return what kind of host ``trainer`` is.

    Raises:
        AttachError: if it is none, or one of those that cannot be guarded, with the reason.

    Example:
        >>> kind("trainer")
        Traceback (most recent call last):
        guardrails.errors.AttachError: GuardrailsCallback(trainer, guard) guards an instance of one of TRL's trainers, \
such as GRPOTrainer, OnlineDPOTrainer or DPOTrainer, not str.
    """
    if not isinstance(trainer, Trainer):
        given = trainer.__name__ if isinstance(trainer, type) else type(trainer).__name__
        raise AttachError(
            "GuardrailsCallback(trainer, guard) guards an instance of one of TRL's trainers, such as GRPOTrainer, "
            f"OnlineDPOTrainer or DPOTrainer, not {given}."
        )
    for base in type(trainer).__mro__:
        if not base.__module__.startswith("trl."):
            continue
        if base.__name__ in _REFUSED:
            raise AttachError(f"{type(trainer).__name__} cannot be guarded: {_REFUSED[base.__name__]}.")
        if base.__name__ in _KINDS:
            return _KINDS[base.__name__]
    return "loss"
